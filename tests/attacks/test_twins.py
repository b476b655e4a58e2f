"""Copies of rows that look the same but are spelt with other characters do not pass as other rows."""

from pathlib import Path
from typing import Any

import pytest

from tests.attacks.twins import MADE, TEXTS, twins
from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tunesmith.core.text.folding import fold
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.dataset import SPLITS, Dataset
from tunesmith.data.governance.withdrawn import Withdrawn, content_key
from tunesmith.data.settings import DataSettings
from tunesmith.store.store import Store


def left(dataset: Dataset) -> list[str]:
    """The folded requests of the rows that stayed and are not of `many_rows`."""
    plain = {fold(one["messages"][0]["content"]) for one in many_rows(60)}
    found = [fold(one.request[0].content) for name in SPLITS for one in dataset.examples(name)]
    return [text for text in found if text not in plain]


def made_of(tmp_path: Path, sources: dict[str, list[dict[str, Any]]], **more: Any) -> Dataset:
    for name, rows in sources.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    described = [{"path": f"{name}.jsonl", "licence": "MIT"} for name in sources if name != "outside"]
    for one in described:
        if one["path"] == "held.jsonl":
            one["split"] = "test"
    chosen = {"sources": described, "privacy": {"entities": []}, "split": {"test": 0.2, "validation": 0}, **more}
    dataset = build(tmp_path, DataSettings.model_validate(chosen))
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok
    return dataset


@pytest.mark.attack("leakage", "twins of rows pass as rows of their own", "removed, with the reason")
def test_twins_are_removed_as_duplicates(tmp_path: Path) -> None:
    rows = [row(text, "done") for text in TEXTS + twins(TEXTS)]
    dataset = made_of(tmp_path, {"rows": many_rows(60) + rows})
    assert sorted(left(dataset)) == sorted(TEXTS)
    reasons = dataset.record.body["rows"]["removed"]
    assert sum(reasons.values()) == len(twins(TEXTS))


@pytest.mark.attack("leakage", "twins of held-out rows in training", "not in training")
@pytest.mark.parametrize(
    ("wording", "group_by"), [("the same", "author"), ("reworded", None), ("another value", "author")]
)
def test_twins_of_held_out_rows_are_not_trained_on(tmp_path: Path, wording: str, group_by: str | None) -> None:
    change = {
        "the same": lambda text: text,
        "reworded": lambda text: f"{text} now",
        "another value": lambda text: f'{text} at 10:45 as "spare" today',
    }[wording]
    texts = [f'{text} at 7:30 as "usual" today' for text in TEXTS] if wording == "another value" else TEXTS
    # With the same answer, with another one, and each in a group of its own.
    train = [
        {**row(twin, answer), "author": f"t{n}"}
        for n, twin in enumerate(twins([change(text) for text in TEXTS]))
        for answer in ("done", f"other {n}")
    ]
    held = [{**row(text, "done"), "author": f"h{n}"} for n, text in enumerate(texts)]
    plain = [{**one, "author": f"m{n}"} for n, one in enumerate(many_rows(200))]
    split = {"test": 0.1, "validation": 0, "group_by": group_by}
    dataset = made_of(tmp_path, {"rows": plain + train, "held": held}, split=split)
    trained = [fold(one.request[0].content) for one in dataset.examples("train")]
    own = {fold(one["messages"][0]["content"]) for one in plain}
    assert not [text for text in trained if text not in own]


@pytest.mark.attack("leakage", "twins of an outside test set in a dataset version", "removed, with the reason")
def test_twins_of_an_outside_test_set_are_removed(tmp_path: Path) -> None:
    outside = [row(text, "done") for text in TEXTS] + [row(f"{text} at 7:30", "done") for text in TEXTS]
    copies = twins(TEXTS) + twins([f"{text} at 10:45" for text in TEXTS]) + twins([f"{text} now" for text in TEXTS])
    rows = [row(text, f"other {n}") for n, text in enumerate(copies)]
    dataset = made_of(
        tmp_path, {"rows": many_rows(60) + rows, "outside": outside}, decontaminate=[{"path": "outside.jsonl"}]
    )
    assert left(dataset) == []


@pytest.mark.attack("leakage", "twins of withdrawn rows", "left out")
def test_twins_of_withdrawn_rows_stay_out(tmp_path: Path) -> None:
    first = made_of(tmp_path, {"rows": many_rows(60) + [row(text, "all done") for text in TEXTS]})
    known = {fold(text) for text in TEXTS}
    recalled = [one for name in SPLITS for one in first.examples(name) if fold(one.request[0].content) in known]
    withdrawn = Withdrawn(contents=frozenset(map(content_key, recalled)))
    answers = [MADE["zero-width characters"]("all done"), MADE["Cyrillic letters"]("all done")]
    rows = [row(text, answers[n % 2]) for n, text in enumerate(twins(TEXTS))]
    write_jsonl(tmp_path / "rows.jsonl", many_rows(60) + rows)
    assert left(build(tmp_path, settings(split={"test": 0.2, "validation": 0}), withdrawn=withdrawn)) == []


# Pairs that fold alike or share all base letters, and are different words.
WORDS = {
    "Vietnamese": ("má", "mà"),
    "Arabic": ("كَتَبَ", "كُتُب"),
    "Turkish": ("sınır", "sinir"),
    "German": ("Maße", "Masse"),
    "French": ("pêché", "péché"),
    "code": ("c", "c++"),
}


@pytest.mark.parametrize("near", [0.8, None])
def test_different_words_with_different_answers_stay(tmp_path: Path, near: float | None) -> None:
    said = [(name, place, word) for name, some in WORDS.items() for place, word in enumerate(some)]
    rows = [row(f"{name}: {word}", f"meaning {place}") for name, place, word in said]
    dataset = made_of(tmp_path, {"rows": many_rows(60) + rows}, duplicates={"near": near})
    assert dataset.record.body["rows"]["removed"] == {}
    groups = {one.request[0].content: one.group for name in SPLITS for one in dataset.examples(name)}
    for name in ("Vietnamese", "Turkish", "German", "French"):
        assert len({groups[f"{name}: {word}"] for word in WORDS[name]}) == 1


def test_different_words_with_one_answer_stay_where_near_is_null(tmp_path: Path) -> None:
    rows = [row(f"{name}: {word}", "a word") for name, some in WORDS.items() for word in some]
    dataset = made_of(tmp_path, {"rows": many_rows(60) + rows}, duplicates={"near": None})
    assert dataset.record.body["rows"]["removed"] == {"exact duplicate": 1}  # Maße and Masse: one when case-folded

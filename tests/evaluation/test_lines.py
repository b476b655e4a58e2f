"""Scores and answers are read quickly where they are plain, and as strictly as ever where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.lines import AnswerLines
from tunesmith.evaluation.scores import column, encode_scores, read_scores
from tunesmith.store.records import Record
from tunesmith.store.store import Store

IDS = ["a", "b", "c"]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=5)


def answers(store: Store, lines: list[bytes]) -> AnswerLines:
    """The lines of a record, one for each of IDS."""
    blob = store.put_bytes(b"".join(line + b"\n" for line in lines))
    parents = {"candidate": "sha256:" + "0" * 64, "dataset": "sha256:" + "1" * 64}
    return AnswerLines(
        store, Record(kind="answers", parents=parents, blobs={"answers.jsonl": blob}), IDS, "answers of 'x'"
    )


def line(identifier: str, **more: Any) -> bytes:
    return canonical({"id": identifier, "text": f"to {identifier}", **more})


def test_answers_come_in_the_order_of_the_rows_however_they_were_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for order in (IDS, IDS[::-1]):
        found = answers(store, [line(each) for each in order])
        assert [found[place]["text"] for place in (2, 0, 1)] == ["to c", "to a", "to b"]
        assert not found.mention("retrieved")
    assert answers(store, [line(each, retrieved=[]) for each in IDS]).mention("retrieved")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("a"), line("b")], "no answer"),
        ([line("a"), line("b"), line("b")], "answered twice"),
        ([line("a"), line("b"), line("d")], "no answer"),
        ([line("a"), line("b"), b'{"id": "c", "id": "c"}'], "appears twice"),
        ([line("a"), line("b"), b'["c"]'], "not an answer"),
    ],
)
def test_answers_that_do_not_fit_the_rows_are_refused(tmp_path: Path, lines: list[bytes], said: str) -> None:
    with pytest.raises(Inconclusive, match=said):
        answers(Store(tmp_path), lines)[2]


@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_scores_that_were_written_are_read(tmp_path_factory: Any, name: str, group: str, values: list[float]) -> None:
    store = Store(tmp_path_factory.mktemp("scores"))
    written = column(name, "exact", {f"{group}{place}": (group, value) for place, value in enumerate(values)})
    found = read_scores(store, evaluation(store, encode_scores([written]), name, values))
    (read,) = found.values()
    assert (read.candidate, read.ids, read.groups) == (name, written.ids, written.groups)
    assert np.array_equal(read.values, written.values)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ('"value":2', "outside 0 to 1"),
        ('"value":true', "not a finite number"),
        ('"value":1,"value":1', "appears twice"),
        ('"value":01', "not a score"),
        ('"value":1,"more":1', "exactly the keys"),
    ],
)
def test_one_line_that_is_not_a_score_is_found_among_plain_ones(tmp_path: Path, changed: str, said: str) -> None:
    store = Store(tmp_path)
    plain = encode_scores([column("x", "exact", {"r1": ("g", 1.0), "r2": ("g", 1.0)})])
    spoilt = b'"value":1}'.join(plain.rsplit(b'"value":1}', 1)[:1]) + changed.encode() + b"}\n"
    with pytest.raises(Inconclusive, match=said):
        read_scores(store, evaluation(store, spoilt, "x", [1.0, 1.0]))
    with pytest.raises(Inconclusive, match="scored twice"):
        read_scores(store, evaluation(store, plain + plain.splitlines()[0] + b"\n", "x", [1.0, 1.0]))


def evaluation(store: Store, scores: bytes, name: str, values: list[float]) -> Record:
    """A record that states these scores of a candidate."""
    mean = round(float(np.mean(values)), 9)
    body = {"n": len(values), "metrics": ["exact"], "candidates": {name: {"metrics": {"exact": {"mean": mean}}}}}
    return Record(kind="evaluation", blobs={"scores.jsonl": store.put_bytes(scores)}, body=json.loads(json.dumps(body)))

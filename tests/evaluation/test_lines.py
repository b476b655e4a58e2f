"""Scores and answers are read quickly where they are plain, and as strictly as ever where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.lines import AnswerLines
from tunesmith.evaluation.scores import column, encode_scores, read_scores
from tunesmith.store.records import Record
from tunesmith.store.store import Store

IDS = ["a", "b", "c"]


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
    store, written = Store(tmp_path), column("x", "exact", {"r1": ("g", 1.0), "r2": ("h", 1.0)})
    plain = encode_scores([written])
    (read,) = read_scores(store, scored(store, plain)).values()
    assert (read.ids, read.groups, read.values.tolist()) == (written.ids, written.groups, [1.0, 1.0])
    spoilt = b'"value":1}'.join(plain.rsplit(b'"value":1}', 1)[:1]) + changed.encode() + b"}\n"
    with pytest.raises(Inconclusive, match=said):
        read_scores(store, scored(store, spoilt))
    with pytest.raises(Inconclusive, match="scored twice"):
        read_scores(store, scored(store, plain + plain.splitlines()[0] + b"\n"))


def scored(store: Store, scores: bytes) -> Record:
    """A record that states these scores of a candidate, each 1."""
    body = {"n": 2, "metrics": ["exact"], "candidates": {"x": {"metrics": {"exact": {"mean": 1.0}}}}}
    return Record(kind="evaluation", blobs={"scores.jsonl": store.put_bytes(scores)}, body=body)

"""Scores per row: written to `scores.jsonl`, read back with checks, and compared in pairs.

A line is {"candidate", "id", "group", "metric", "value"}. Verdicts are computed from these lines.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.core.values import View
from tunesmith.evaluation.lines import CandidateLine, Name, Share
from tunesmith.evaluation.stats.statistics import GAPS, Floats, Interval, Level, interval, mcnemar, sign_flip
from tunesmith.records.evaluation import EvaluationBody, MetricInterval
from tunesmith.store.records import Record
from tunesmith.store.store import Store

# A line as it is written, whose texts hold nothing that JSON escapes.
_TEXT = r'"([^"\\\x00-\x1f]+)"'
_PLAIN = re.compile(
    rf'^\{{"candidate":{_TEXT},"group":{_TEXT},"id":{_TEXT},"metric":{_TEXT},"value":(\d(?:\.\d+)?(?:e-\d+)?)\}}$',
    re.MULTILINE,
)
# The metric of the general suite: the right choice's probability.
GENERAL = "general"
CONFIDENCE = 0.95  # of every interval in the record; a gate may use another
_DECIMALS = 9


_Rows = dict[tuple[str, str], dict[str, tuple[str, float]]]  # (candidate, metric) -> id -> (group, value)


class ScoreLine(CandidateLine):
    """One score of one answer."""

    file = "scores.jsonl"
    unique = ("candidate", "metric", "id")
    metric: Name
    value: Share


class Column(NamedTuple):
    """One candidate's scores by one metric. ids (ascending), groups and values have one entry per row."""

    candidate: str
    metric: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    values: Floats


Columns = Mapping[tuple[str, str], Column]  # (candidate, metric) -> column


class Difference(View):
    """One metric of two candidates on the same rows: the first minus the second.

    wins, losses, ties: on how many rows the first is above, below, equal. mcnemar: p-value where every score is 0 or 1,
    otherwise None; sign_flip: p-value of the permutation test.
    """

    difference: MetricInterval
    wins: int
    losses: int
    ties: int
    mcnemar: float | None
    sign_flip: float


def rounded(number: float) -> float:
    """A number with 9 decimals, so that records do not depend on rounding that differs between machines."""
    return round(float(number), _DECIMALS) + 0.0


def metric_interval(measured: Interval) -> MetricInterval:
    """An interval as a record states it."""
    return MetricInterval(mean=rounded(measured.mean), low=rounded(measured.low), high=rounded(measured.high))


def score_lines(columns: Iterable[Column]) -> list[ScoreLine]:
    """The lines of scores.jsonl, in the order of columns and ids."""
    return [
        ScoreLine(candidate=each.candidate, id=name, group=group, metric=each.metric, value=value)
        for each in columns
        for name, group, value in zip(each.ids, each.groups, each.values.tolist(), strict=True)
    ]


def column(candidate: str, metric: str, rows: Mapping[str, tuple[str, float]]) -> Column:
    """A column from id -> (group, value)."""
    ids = tuple(sorted(rows))
    return Column(
        candidate, metric, ids, tuple(rows[i][0] for i in ids), np.array([rows[i][1] for i in ids], dtype=np.float64)
    )


def read_scores(store: Store, evaluation: Record) -> dict[tuple[str, str], Column]:
    """(candidate, metric) -> column. Raises Inconclusive, naming the line, for scores that are not valid.

    That is: a line with other keys; a value that is not a number from 0 to 1; a row that was scored twice; candidates
    with different rows or groups; a candidate of the record without scores; a mean in the record that differs from the
    scores.
    """
    if ScoreLine.file not in evaluation.blobs:
        raise Inconclusive("the evaluation has no scores")
    rows = _plain_rows(store.read_blob(evaluation.blobs[ScoreLine.file]))
    if not rows:
        cells = ScoreLine.grouped(ScoreLine.read(store, evaluation), "candidate", "metric")
        rows = {key: {line.id: (line.group, line.value) for line in cell} for key, cell in cells.items()}
    columns = {key: column(*key, cell) for key, cell in rows.items()}
    _check_pairing(columns)
    _check_summary(columns, EvaluationBody.of(evaluation))
    return columns


def _plain_rows(data: bytes) -> _Rows | None:
    """The scores of a file whose every line is plain and valid, in a tenth of the time; None of any other file."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    plain: list[tuple[str, str, str, str, str]] = _PLAIN.findall(text)
    rows: _Rows = defaultdict(dict)
    for candidate, group, name, metric, value in plain:
        rows[candidate, metric][name] = (group, float(value))
    whole = text.endswith("\n") and len(plain) == text.count("\n") == sum(map(len, rows.values()))
    valid = all(value <= 1.0 for cell in rows.values() for _, value in cell.values())
    return rows if whole and valid else None


def difference(left: Column, right: Column, level: Level) -> Difference:
    """Compare two columns of one metric row by row. Raises Inconclusive where their rows differ."""
    check_paired(left, right)
    gaps = left.values - right.values
    binary = bool(np.isin(np.concatenate([left.values, right.values]), (0.0, 1.0)).all())
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    measured = interval(gaps, left.groups, GAPS, level)
    return Difference(
        difference=metric_interval(measured),
        wins=wins,
        losses=losses,
        ties=len(gaps) - wins - losses,
        mcnemar=rounded(mcnemar(wins, losses)) if binary else None,
        sign_flip=rounded(sign_flip(gaps, left.groups, level.seed)),
    )


def drop(before: Column, after: Column, level: Level) -> Interval:
    """How much the right choice's mean probability fell (positive is a loss), paired by question.

    The interval's worst-case group has the largest measured loss or gain, not -1 or 1: a probability is continuous, so
    unlike a right or wrong answer it does not hide rare total losses.
    """
    check_paired(before, after)
    losses: Floats = before.values - after.values
    return interval(losses, before.groups, None, level)


def check_paired(left: Column, right: Column) -> None:
    """Raise Inconclusive where two columns have different rows or groups."""
    if left.ids != right.ids:
        only = sorted(set(left.ids) ^ set(right.ids))
        raise Inconclusive(
            f"{left.candidate!r} and {right.candidate!r} were not measured on the same rows: "
            f"{len(only)} rows have a score of only one of them, such as {only[0]!r}",
            fix="evaluate both on the same dataset version",
        )
    if left.groups != right.groups:
        raise Inconclusive(f"{left.candidate!r} and {right.candidate!r} name different groups for the same rows")


def _check_pairing(columns: Columns) -> None:
    """Raise Inconclusive unless all columns have the same rows; the general suite is checked separately."""
    for suite in (True, False):
        among = [item for (_, metric), item in columns.items() if (metric == GENERAL) is suite]
        for item in among[1:]:
            check_paired(among[0], item)


def _check_summary(columns: Columns, body: EvaluationBody) -> None:
    """Raise Inconclusive where the record's means differ from the scores: readers see one, gates judge the other."""
    if not body.candidates:
        raise Inconclusive("the evaluation holds no candidates")
    measured = {key for key in columns if key[1] != GENERAL}
    promised = {(name, metric) for name in body.candidates for metric in body.metrics}
    for name, metric in sorted(measured ^ promised):
        here = "the record but not in the scores" if (name, metric) in promised else "the scores but not in the record"
        raise Inconclusive(f"{metric!r} of {name!r} is in {here}")
    for name, metric in sorted(measured):
        item = columns[name, metric]
        mean = rounded(math.fsum(item.values.tolist()) / len(item.values))
        stated = body.candidates[name].metrics.get(metric)
        if len(item.ids) != body.n or stated is None or mean != stated.mean:
            raise Inconclusive(f"the evaluation's account of {metric!r} of {name!r} does not follow from its scores")

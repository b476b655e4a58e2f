"""Per-example scores: how they are kept (`scores.jsonl`), read back with suspicion, paired and compared.

A line is {"candidate", "id", "group", "metric", "value"}. Everything a verdict says is computed from these lines.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.stats.statistics import Floats, Interval, interval, mcnemar, sign_flip
from tunesmith.store.records import Record
from tunesmith.store.store import Store

SCORES = "scores.jsonl"
# The metric name of the general-ability suite: the probability given to the right choice.
GENERAL = "general"
_KEYS = {"candidate", "id", "group", "metric", "value"}
_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class Column:
    """One candidate's scores by one metric. ids (ascending), groups and values are of one length, a row each."""

    candidate: str
    metric: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    values: Floats


@dataclass(frozen=True, slots=True)
class Difference:
    """left minus right on the same rows.

    values: a difference a row. wins, losses, ties: rows where left is above, below, equal. mcnemar is None where the
    scores are not all 0 or 1.
    """

    interval: Interval
    wins: int
    losses: int
    ties: int
    mcnemar: float | None
    sign_flip: float


def rounded(number: float) -> float:
    """A number as records state it: 9 decimals, so that a last bit that differs between machines does not show."""
    return round(number, _DECIMALS) + 0.0


def as_body(measured: Interval) -> dict[str, float]:
    """An interval as records state it."""
    return {"mean": rounded(measured.mean), "low": rounded(measured.low), "high": rounded(measured.high)}


def encode_scores(columns: Iterable[Column]) -> bytes:
    """The lines of scores.jsonl, in the order of columns and ids."""
    lines = []
    for column in columns:
        for identifier, group, value in zip(column.ids, column.groups, column.values.tolist(), strict=True):
            line = {"candidate": column.candidate, "id": identifier, "group": group}
            lines.append(canonical({**line, "metric": column.metric, "value": value}))
    return b"\n".join(lines) + b"\n"


def column(candidate: str, metric: str, rows: Mapping[str, tuple[str, float]]) -> Column:
    """A column from id -> (group, value)."""
    ids = tuple(sorted(rows))
    return Column(
        candidate, metric, ids, tuple(rows[i][0] for i in ids), np.array([rows[i][1] for i in ids], dtype=np.float64)
    )


def read_scores(store: Store, evaluation: Record) -> dict[tuple[str, str], Column]:
    """(candidate, metric) -> column. Raises Inconclusive, saying which line, for evidence that cannot be relied on.

    That is: a line that is not such an object; a value that is boolean, missing, not finite or outside [0, 1]; a row
    scored twice; candidates whose rows or groups differ; a candidate the record promises and the lines lack; a summary
    in the record that does not follow from the lines.
    """
    if SCORES not in evaluation.blobs:
        raise Inconclusive("the evaluation has no scores")
    rows: dict[tuple[str, str], dict[str, tuple[str, float]]] = defaultdict(dict)
    for number, raw in enumerate(store.read_blob(evaluation.blobs[SCORES]).splitlines(), start=1):
        line = _read_line(raw, number)
        cell = rows[line["candidate"], line["metric"]]
        if line["id"] in cell:
            raise Inconclusive(f"{line['candidate']!r} was scored twice on row {line['id']!r}", where=_line(number))
        cell[line["id"]] = (line["group"], float(line["value"]))
    columns = {key: column(*key, cell) for key, cell in rows.items()}
    _check_pairing(columns)
    _check_summary(columns, evaluation.body)
    return columns


def difference(left: Column, right: Column, *, confidence: float, seed: int) -> Difference:
    """Compare two columns of one metric row by row. Raises Inconclusive where their rows are not the same."""
    check_paired(left, right)
    gaps = left.values - right.values
    binary = bool(np.isin(np.concatenate([left.values, right.values]), (0.0, 1.0)).all())
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    return Difference(
        interval=interval(gaps, left.groups, ends=(-1.0, 1.0), confidence=confidence, seed=seed),
        wins=wins,
        losses=losses,
        ties=len(gaps) - wins - losses,
        mcnemar=mcnemar(wins, losses) if binary else None,
        sign_flip=sign_flip(gaps, left.groups, seed),
    )


def drop(before: Column, after: Column, *, confidence: float, seed: int) -> Interval:
    """How much the mean probability of the right choice fell (positive is a loss), paired by question.

    The interval's worst thinkable group is taken from the largest loss and gain seen, not from -1 and 1: a probability
    slides, so unlike a right or wrong answer it does not hide a total loss on questions like those that were asked.
    """
    check_paired(before, after)
    losses: Floats = before.values - after.values
    ends = (float(losses.min()), float(losses.max()))
    return interval(losses, before.groups, ends=ends, confidence=confidence, seed=seed)


def check_paired(left: Column, right: Column) -> None:
    """Raise Inconclusive where two columns do not hold the same rows in the same groups."""
    if left.ids != right.ids:
        only = sorted(set(left.ids) ^ set(right.ids))
        raise Inconclusive(
            f"{left.candidate!r} and {right.candidate!r} were not measured on the same rows: "
            f"{len(only)} stand on one side only, the first is {only[0]!r}",
            fix="evaluate both on the same dataset version",
        )
    if left.groups != right.groups:
        raise Inconclusive(f"{left.candidate!r} and {right.candidate!r} name different groups for the same rows")


def _read_line(raw: bytes, number: int) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Inconclusive(f"not a score: {error}", where=_line(number)) from error
    if not isinstance(line, dict) or set(line) != _KEYS:
        raise Inconclusive(f"a score has exactly the keys {', '.join(sorted(_KEYS))}", where=_line(number))
    for key in ("candidate", "id", "group", "metric"):
        if not isinstance(line[key], str) or not line[key]:
            raise Inconclusive(f"{key} is not a name", where=_line(number))
    value = line["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Inconclusive(f"the value {value!r} is not a finite number", where=_line(number))
    if not 0.0 <= value <= 1.0:
        raise Inconclusive(f"the value {value!r} is outside 0 to 1", where=_line(number))
    return line


def _check_pairing(columns: Mapping[tuple[str, str], Column]) -> None:
    """Every candidate and metric on the same rows; the general suite on its own."""
    for suite in (True, False):
        among = [item for (_, metric), item in columns.items() if (metric == GENERAL) is suite]
        for item in among[1:]:
            check_paired(among[0], item)


def _check_summary(columns: Mapping[tuple[str, str], Column], body: Mapping[str, Any]) -> None:
    """The record's own account must be that of its lines: nobody reads one and is judged by the other."""
    stated = body.get("candidates", {})
    if not stated:
        raise Inconclusive("the evaluation holds no candidates")
    measured = {key for key in columns if key[1] != GENERAL}
    promised = {(name, metric) for name in stated for metric in body["metrics"]}
    for name, metric in sorted(measured ^ promised):
        here = "the record but not in the scores" if (name, metric) in promised else "the scores but not in the record"
        raise Inconclusive(f"{metric!r} of {name!r} is in {here}")
    for name, metric in sorted(measured):
        item = columns[name, metric]
        mean = rounded(math.fsum(item.values.tolist()) / len(item.values))
        if len(item.ids) != body.get("n") or mean != stated[name]["metrics"].get(metric, {}).get("mean"):
            raise Inconclusive(f"the evaluation's account of {metric!r} of {name!r} does not follow from its scores")


def _line(number: int) -> str:
    return f"{SCORES}, line {number}"

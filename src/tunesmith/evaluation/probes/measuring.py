"""Turns answers to a probe's items, before and after tuning, into paired measurements, with checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.lines import read_answer_lines
from tunesmith.evaluation.metrics.declared import Scoring
from tunesmith.evaluation.probes.items import ITEMS, Item, arm_results, by_arm, decode_items
from tunesmith.evaluation.probes.suites import suite_of
from tunesmith.records.evaluation import AnswersBody, BestEpoch, RiskResults
from tunesmith.records.training import TrainingBody, TrainingFigures
from tunesmith.store.records import Record
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class Risk:
    """Digests of the answers to a suite's items: under the candidate's weights and, where measured, the base's."""

    after: str
    before: str | None = None


def measure(
    store: Store, suite: str, candidate: Candidate, risk: Risk, dataset: str, scoring: Scoring
) -> tuple[list[dict[str, Any]], RiskResults]:
    """Measurements of one suite for one candidate, and the evaluation record's account of them.

    Unusable answers give no measurements and an account {"unusable": reason}, so that only this gate is inconclusive.
    """
    try:
        rows = _paired(store, suite, candidate, risk, dataset, scoring)
    except Inconclusive as error:
        return [], RiskResults(unusable=f"{error.what} ({error.where})" if error.where else error.what)
    found = RiskResults(arms=arm_results(by_arm(rows)), left_out=AnswersBody.read(store, risk.after).left_out)
    if suite_of(suite).own and candidate.training is not None:
        stop = best_epoch(TrainingBody.read(store, candidate.training))
        found = found.model_copy(update={"stop": stop})
    lines = [{"suite": suite, "candidate": candidate.name, **row} for row in rows]
    return lines, found


def left_out(count: int | None) -> str:
    """The end of a sentence about a probe: how many answers it leaves out."""
    return f"; {count:,} answers that are calls of functions were left out" if count else ""


def best_epoch(training: TrainingFigures) -> BestEpoch | None:
    """The epoch with the lowest validation loss; None for under two losses."""
    curve, steps, epochs = training.validation, training.steps, training.epochs
    if not steps or len(curve) < 2 or not all(math.isfinite(point.loss) for point in curve):
        return None
    best = min(curve, key=lambda point: point.loss)
    return BestEpoch(
        epoch=round(best.step / steps * epochs, 2),
        of=round(epochs, 2),
        loss=best.loss,
        last=curve[-1].loss,
        kept=round(training.kept / steps * epochs, 2),
    )


def _paired(
    store: Store, suite: str, candidate: Candidate, risk: Risk, dataset: str, scoring: Scoring
) -> list[dict[str, Any]]:
    after = _checked(store, risk.after, suite, candidate, candidate.training, dataset)
    items = _items(store, after)
    if not items:
        why = suite_of(suite).none + left_out(AnswersBody.of(after).left_out)
        raise Inconclusive(f"no item of this probe fits the rows: {why}")
    told = _values(store, after, items, suite, scoring)
    if suite_of(suite).before:
        if risk.before is None:
            raise Inconclusive("the base model was not measured")
        before = _checked(store, risk.before, suite, candidate, None, dataset)
        if before.blobs.get(ITEMS) != after.blobs.get(ITEMS):
            raise Inconclusive("the items before tuning differ from those after")
        earlier: Mapping[str, float | None] = _values(store, before, items, suite, scoring)
    else:
        earlier = dict.fromkeys(told)
    return [
        {"id": item.id, "group": item.group, "arm": item.arm, "before": earlier[item.id], "after": told[item.id]}
        for item in items
    ]


def _checked(store: Store, digest: str, suite: str, candidate: Candidate, training: str | None, dataset: str) -> Record:
    record = store.record(digest, kind="answers")
    if (answered := AnswersBody.of(record).suite) != suite:
        raise Inconclusive(f"these are answers to {answered!r}, not to {suite!r}")
    if record.parents.get("base") != candidate.base or record.parents.get("training") != training:
        raise Inconclusive("the answers are of other weights than the candidate's")
    if suite_of(suite).own and record.parents.get("dataset") != dataset:
        raise Inconclusive("the probe used rows of another dataset version")
    return record


def _items(store: Store, record: Record) -> Sequence[Item]:
    if ITEMS not in record.blobs:
        raise Inconclusive("the record holds no items")
    try:
        items = decode_items(store.read_blob(record.blobs[ITEMS]))
    except (ValidationError, ValueError) as error:
        raise Inconclusive(f"the items cannot be read: {type(error).__name__}") from error
    if len({item.id for item in items}) != len(items):
        raise Inconclusive("two items have the same id")
    return items


def _values(store: Store, record: Record, items: Sequence[Item], suite: str, scoring: Scoring) -> dict[str, float]:
    lines = read_answer_lines(store, record, [item.id for item in items], f"answers to {suite}", "items")
    value = suite_of(suite).value
    return {item.id: value(item, lines[item.id], scoring) for item in items}

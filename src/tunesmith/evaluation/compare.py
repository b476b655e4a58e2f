"""Compares two candidates on the same rows, from one evaluation or from two of the same dataset version."""

from __future__ import annotations

from typing import NamedTuple

from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.values import View
from tunesmith.evaluation.gates.verdict import measured_candidate
from tunesmith.evaluation.scores import CONFIDENCE, Difference, difference, read_scores
from tunesmith.evaluation.stats.statistics import Level
from tunesmith.records.evaluation import AnswerPrice, EvaluationBody, MetricInterval
from tunesmith.store.store import Store


class Side(NamedTuple):
    """One of the two candidates. evaluation: digest; name: its name in the evaluation; label: what the user named."""

    evaluation: str
    name: str
    label: str


def side_of_candidate(store: Store, evaluation: str, name: str) -> Side:
    """The candidate with this name in an evaluation. Raises UsageError where there is none."""
    measured_candidate(EvaluationBody.read(store, evaluation), name)
    return Side(evaluation, name, name)


def side_of_digest(store: Store, evaluation: str, candidate: str, label: str) -> Side:
    """The candidate with this digest in an evaluation. Raises UsageError where there is none.

    candidate: digest of the candidate record, which a model version names.
    """
    for name, stated in EvaluationBody.read(store, evaluation).candidates.items():
        if stated.candidate == candidate:
            return Side(evaluation, name, label)
    raise UsageError(f"the evaluation of {label} has no candidate {short(candidate)}")


class ComparedSide(View):
    """One of the two candidates. label: as the user named it; candidate, evaluation: digests."""

    label: str
    candidate: str
    evaluation: str
    tuned: bool
    metrics: dict[str, MetricInterval]
    price: AnswerPrice


class Comparison(View):
    """How the second candidate differs from the first, by each metric that was measured for both in the same way.

    changed_scorers: metrics of both that are left out, since their scorer is not the same.
    """

    first: ComparedSide
    second: ComparedSide
    n: int
    groups: int
    primary: str
    confidence: float
    metrics: dict[str, Difference]
    changed_scorers: tuple[str, ...] = ()


def compare(store: Store, first: Side, second: Side) -> Comparison:
    """The differences between two candidates, row by row.

    Raises Inconclusive where they were not measured on the same rows or share no metric of the same scorer.
    """
    records = [store.record(side.evaluation, kind="evaluation") for side in (first, second)]
    datasets = [record.parents["dataset"] for record in records]
    if datasets[0] != datasets[1]:
        raise Inconclusive(
            f"{first.label} was measured on dataset {short(datasets[0])}, {second.label} on {short(datasets[1])}",
            fix="evaluate both on one dataset version",
        )
    left, right = read_scores(store, records[0]), read_scores(store, records[1])
    one, other = [EvaluationBody.of(record) for record in records]
    named = [metric for metric in one.metrics if metric in other.metrics]
    if not named:
        raise Inconclusive(f"no metric was measured for both {first.label} and {second.label}")
    shared = [metric for metric in named if scored_alike(one, other, metric)]
    if not shared:
        raise Inconclusive(
            f"{first.label} and {second.label} were scored in different ways: the scorer {named[0]!r} has changed",
            fix="evaluate both again in one project",
        )
    metrics = {
        metric: difference(right[second.name, metric], left[first.name, metric], Level(CONFIDENCE, other.seed))
        for metric in shared
    }
    return Comparison.of(
        one,
        first=_side(first, one),
        second=_side(second, other),
        primary=other.primary if other.primary in shared else shared[0],
        confidence=CONFIDENCE,
        metrics=metrics,
        changed_scorers=tuple(metric for metric in named if metric not in shared),
    )


def scored_alike(first: EvaluationBody, second: EvaluationBody, metric: str) -> bool:
    """Whether two evaluations scored answers by a metric in the same way."""
    return first.scorers.get(metric) == second.scorers.get(metric)


def _side(side: Side, body: EvaluationBody) -> ComparedSide:
    stated = body.candidates[side.name]
    metrics = {metric: stated.metrics[metric] for metric in body.metrics}
    return ComparedSide.of(stated, label=side.label, evaluation=side.evaluation, metrics=metrics)

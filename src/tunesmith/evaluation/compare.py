"""Two candidates side by side on the same rows: of one evaluation, or of two over the same dataset version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.evaluation.evaluate import CONFIDENCE
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.evaluation.scores import as_body, difference, read_scores, rounded
from tunesmith.store.records import Record
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: a candidate by name in an evaluation. label is what people call it."""

    evaluation: str
    name: str
    label: str


def side_of_candidate(store: Store, evaluation: str, name: str) -> Side:
    """A candidate of an evaluation by name. Raises UsageError where there is none of that name."""
    known = store.record(evaluation, kind="evaluation").body["candidates"]
    if name not in known:
        raise UsageError(
            f"the evaluation has no candidate {name!r}{nearest(name, known)}", fix=f"name one of: {', '.join(known)}"
        )
    return Side(evaluation, name, name)


def side_of_digest(store: Store, evaluation: str, candidate: str, label: str) -> Side:
    """A candidate of an evaluation by its record's digest, as a model version names it."""
    for name, stated in store.record(evaluation, kind="evaluation").body["candidates"].items():
        if stated["candidate"] == candidate:
            return Side(evaluation, name, label)
    raise UsageError(f"the evaluation of {label} does not hold its candidate {short(candidate)}")


def comparison_document(store: Store, first: Side, second: Side) -> dict[str, Any]:
    """How second differs from first, by every metric both were measured by: differences are second minus first.

    Raises Inconclusive where they were not measured on the same rows or share no metric.
    """
    records = [store.record(side.evaluation, kind="evaluation") for side in (first, second)]
    datasets = [record.parents["dataset"] for record in records]
    if datasets[0] != datasets[1]:
        raise Inconclusive(
            f"{first.label} was measured on dataset {short(datasets[0])}, {second.label} on {short(datasets[1])}",
            fix="evaluate both on one dataset version",
        )
    left, right = read_scores(store, records[0]), read_scores(store, records[1])
    shared = [metric for metric in records[0].body["metrics"] if metric in records[1].body["metrics"]]
    if not shared:
        raise Inconclusive(f"{first.label} and {second.label} were not measured by one metric in common")
    metrics = {}
    for metric in shared:
        found = difference(
            right[second.name, metric],
            left[first.name, metric],
            confidence=CONFIDENCE,
            seed=records[1].body["seed"],
        )
        metrics[metric] = {
            "difference": as_body(found.interval),
            "wins": found.wins,
            "losses": found.losses,
            "ties": found.ties,
            "mcnemar": None if found.mcnemar is None else rounded(found.mcnemar),
            "sign_flip": rounded(found.sign_flip),
        }
    return {
        "first": _stated(first, records[0]),
        "second": _stated(second, records[1]),
        "n": records[0].body["n"],
        "groups": records[0].body["groups"],
        "primary": records[1].body["primary"] if records[1].body["primary"] in shared else shared[0],
        "confidence": CONFIDENCE,
        "metrics": metrics,
    }


def _stated(side: Side, record: Record) -> dict[str, Any]:
    stated = record.body["candidates"][side.name]
    return {
        "label": side.label,
        "candidate": stated["candidate"],
        "evaluation": side.evaluation,
        "tuned": stated["tuned"],
        "metrics": {metric: stated["metrics"][metric] for metric in record.body["metrics"]},
        "price": dict(stated["price"]),
    }

"""Curves of a job's trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.view import View
from tunesmith.jobs import curves as noted
from tunesmith.jobs import queue
from tunesmith.jobs.curves import Curve
from tunesmith.store.store import Store


class CurvePoint(View):
    """A step. loss: on its training rows; validation_loss, score: on the validation rows, None where it was not
    validated, and where answers were not scored."""

    step: int
    loss: float
    validation_loss: float | None
    score: float | None


class TrainingCurve(View):
    """A training of a job. name: the candidate's. metric: what the score is, "" where that is not known yet.

    earlier: it was not trained by this job, which took the result of an earlier training of the same inputs.
    expected_seconds, expected_memory_bytes: predicted before its first step; memory_bytes: the most that it used. None
    where they are not known. points: at most a few hundred of its steps, and every validated one.
    """

    name: str
    metric: str
    earlier: bool
    expected_seconds: float | None
    expected_memory_bytes: float | None
    memory_bytes: float | None
    points: tuple[CurvePoint, ...]


class JobCurves(View):
    """The trainings of a job."""

    job: int
    trainings: tuple[TrainingCurve, ...]


def curves(store: Store, number: int) -> JobCurves:
    """The trainings of a job, also while it runs. Raises UsageError where there is no such job."""
    job = queue.get(store, number)
    trained = job.result.get("train", {})
    found = {name: _curve(name, trained.get(name, {}), each) for name, each in noted.read(store, number).items()}
    for name, summary in trained.items():
        if name not in found and (recorded := _recorded(store, summary)) is not None:
            found[name] = _curve(name, summary, recorded, earlier=True)
    order = {name: place for place, name in enumerate(trained)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return JobCurves(job=number, trainings=tuple(found[name] for name in names))


def _curve(name: str, summary: Mapping[str, Any], curve: Mapping[str, Any], *, earlier: bool = False) -> TrainingCurve:
    """summary: of the training, {} where it has not ended. curve: as `Curve.document` gives it."""
    expected = curve["expected"]
    points = tuple(
        CurvePoint(
            step=int(each["step"]),
            loss=each["loss"],
            validation_loss=each.get("validation_loss"),
            score=each.get("validation_score"),
        )
        for each in curve["points"]
    )
    return TrainingCurve(
        name=name,
        metric=(summary.get("score") or {}).get("metric", ""),
        earlier=earlier,
        expected_seconds=expected.get("expected_seconds"),
        expected_memory_bytes=expected.get("expected_memory_bytes"),
        memory_bytes=curve["memory_bytes"] or None,
        points=points,
    )


def _recorded(store: Store, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curve in a training's record; None where the store no longer has it."""
    try:
        body = store.record(summary["training"], kind="training").body
    except (Refused, UsageError):
        return None
    found, validated = Curve(), {each["step"]: each for each in body["validation"]}
    for each in body["curve"]:
        values = {"step": each["step"], "loss": each["loss"]}
        scores = validated.get(each["step"], {})
        found.add(values | {f"validation_{key}": scores[key] for key in ("loss", "score") if key in scores})
    found.expected = {f"expected_{key}": body["estimate"][key] for key in ("seconds",)}
    found.expected["expected_memory_bytes"] = body["estimate"]["peak_memory_bytes"]
    found.memory_bytes = body["peak_memory_bytes"]
    return found.document()

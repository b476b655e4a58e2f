"""Curves of a job's trainings, and two jobs compared: their curves, their settings and their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.jobs import curves as noted
from tunesmith.jobs import queue
from tunesmith.jobs.curves import Curve
from tunesmith.jobs.state import Job
from tunesmith.services.fine_tuning.arguments import KIND
from tunesmith.services.runs.jobs import JobView, show
from tunesmith.services.runs.run_settings import settings_of
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


class JobDifference(View):
    """A value of two jobs. None where a job has none. A mean with its interval has the keys mean, low and high."""

    name: str
    a: Any
    b: Any


class JobComparison(View):
    """Two jobs. settings: those that differ; results: all that either has."""

    a: JobView
    b: JobView
    curves: tuple[JobCurves, JobCurves]
    settings: tuple[JobDifference, ...]
    results: tuple[JobDifference, ...]


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


def compare(store: Store, a: int, b: int, *, scope: Scope = Scope()) -> JobComparison:
    """Two jobs side by side. Raises UsageError where one of them does not exist, or is not in the scope."""
    shown = show(store, a, scope=scope), show(store, b, scope=scope)
    jobs = queue.get(store, a), queue.get(store, b)
    known = [settings_of(store, job.arguments) for job in jobs]
    if None in known or KIND in {job.kind for job in jobs}:  # a fine-tuning job changes more than a run may
        known = [{"changes": job.arguments.get("changes", {})} for job in jobs]
    settings = [
        dict(_flat({**(whole or {}), **_trained_with(store, job)})) for whole, job in zip(known, jobs, strict=True)
    ]
    results = [_results(job) for job in jobs]
    return JobComparison(
        a=shown[0],
        b=shown[1],
        curves=(curves(store, a), curves(store, b)),
        settings=tuple(each for each in _paired(*settings) if each.a != each.b),
        results=tuple(_paired(*results)),
    )


def _paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[JobDifference]:
    for name in {**a, **b}:
        yield JobDifference(name=name, a=a.get(name), b=b.get(name))


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings by their paths, as candidates.tuned.train.epochs."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{at}.{key}" if at else str(key))
    elif value not in (None, {}, [], ()):
        yield at, value


def _trained_with(store: Store, job: Job) -> dict[str, Any]:
    """What the records of a job's trainings say of their settings, their rows and their base."""
    found: dict[str, Any] = {}
    for name, summary in job.result.get("train", {}).items():
        with contextlib.suppress(Refused, UsageError):
            record = store.record(summary["training"], kind="training")
            stated = {key: record.parents[key] for key in ("dataset", "base") if key in record.parents}
            found[f"training of {name}"] = {**record.body["settings"], **stated}
    return found


def _results(job: Job) -> dict[str, Any]:
    """What people compare of a job's result, by its name."""
    result = job.result
    found: dict[str, Any] = {"state": job.state}
    if job.started and job.ended:
        found["seconds"] = job.ended - job.started
    if "gate" in result:
        found["verdict"] = result["gate"]["verdict"]
        found["version"] = result.get("register", {}).get("version")
        found |= {f"gate {gate['name']}": gate["outcome"] for gate in result["gate"]["gates"]}
    if "evaluate" in result:
        found["test rows"] = result["evaluate"]["n"]
        for name, metrics in result["evaluate"]["candidates"].items():
            found |= {f"{name}: {metric}": interval for metric, interval in metrics.items()}
    for name, summary in result.get("train", {}).items():
        for key in ("rows", "steps", "epochs", "final_loss", "examples_per_second"):
            found[f"training of {name}: {key.replace('_', ' ')}"] = summary.get(key)
        found[f"training of {name}: seconds"] = summary.get("seconds")
        found[f"training of {name}: memory in GB"] = summary.get("peak_memory_bytes", 0) / 1e9
    if "headline" in result:
        found["forecast"] = result["headline"]
    return found

"""Curves as the browser draws them: for each chart the steps, and series with a value or nothing for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tunesmith.core.text.display import printable
from tunesmith.services.run_curves import CurvePoint, JobCurves, TrainingCurve

Value = Callable[[CurvePoint], float | None]


def charts(jobs: Mapping[str, JobCurves]) -> list[dict[str, Any]]:
    """A chart of the losses and, where answers were scored, one of the scores, for each training by its name.

    jobs: by what their series are called besides, "" where there is one job.
    """
    found = []
    for name in dict.fromkeys(each.name for job in jobs.values() for each in job.trainings):
        trained = [
            (place, label, each)
            for place, (label, job) in enumerate(jobs.items())
            for each in job.trainings
            if each.name == name
        ]
        metric = next((each.metric for _, _, each in trained if each.metric), "") or "score"
        losses = [
            series
            for place, label, each in trained
            for series in (
                _series(label, "training loss", each, lambda point: point.loss, colour=2 * place + 1, dashed=False),
                _series(
                    label,
                    "validation loss",
                    each,
                    lambda point: point.validation_loss,
                    colour=(2 * place + 1 if len(jobs) > 1 else 2),
                    dashed=True,
                ),
            )
        ]
        scores = [
            _series(label, metric, each, lambda point: point.score, colour=2 * place + 1, dashed=False)
            for place, label, each in trained
        ]
        found += [
            _chart(f"{name}: {said}", kind, filled)
            for said, kind, every in (("loss", "loss", losses), (f"{metric} on validation rows", "score", scores))
            if (filled := [each for each in every if each["values"]])
        ]
    return found


def _series(
    label: str, said: str, training: TrainingCurve, value: Value, *, colour: int, dashed: bool
) -> dict[str, Any]:
    """values: by step."""
    values = {point.step: found for point in training.points if (found := value(point)) is not None}
    return {"label": f"{label}: {said}" if label else said, "colour": colour, "dashed": dashed, "values": values}


def _chart(title: str, kind: str, series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = sorted({step for each in series for step in each["values"]})
    return {
        "title": printable(title),
        "kind": kind,
        "says": " ".join(_said(each) for each in series),
        "steps": steps,
        "series": [
            {**each, "label": printable(each["label"]), "values": [each["values"].get(step) for step in steps]}
            for each in series
        ],
    }


def _said(series: Mapping[str, Any]) -> str:
    """A series in words."""
    values: Mapping[int, float] = series["values"]
    first, last = min(values), max(values)
    return printable(f"{series['label']}: {values[first]:.4g} at step {first}, {values[last]:.4g} at step {last}.")


def numbers(points: Sequence[CurvePoint], most: int = 30) -> list[CurvePoint]:
    """The points that a table shows: the validated ones, or some of all where there are few of those."""
    validated: Iterable[CurvePoint] = [point for point in points if point.validation_loss is not None]
    every = max(1, len(points) // most)
    some = {point.step for point in [*points[::every], *points[-1:]]}
    return sorted({point.step: point for point in [*validated, *(p for p in points if p.step in some)]}.values(),
                  key=lambda point: point.step)  # fmt: skip

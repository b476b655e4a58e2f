"""Charts of a job's trainings, and the points that a table beside them shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.server.console.parts.charts import Line, chart
from tunesmith.services.runs.run_curves import CurvePoint, JobCurves, TrainingCurve


def charts(jobs: Mapping[str, JobCurves]) -> list[dict[str, Any]]:
    """A chart of the losses and, where answers were scored, one of the scores, for each training by its name.

    jobs: by what their lines are called besides, "" where there is one job.
    """
    found = []
    for name in dict.fromkeys(each.name for job in jobs.values() for each in job.trainings):
        trained = [
            (2 * place + 1, label, each)
            for place, (label, job) in enumerate(jobs.items())
            for each in job.trainings
            if each.name == name
        ]
        metric = next((each.metric for _, _, each in trained if each.metric), "") or "score"
        losses = [
            line
            for colour, label, each in trained
            for line in (
                _line(label, "training loss", each, "loss", colour),
                _line(label, "validation loss", each, "validation_loss", colour + (len(jobs) == 1), dashed=True),
            )
        ]
        scores = [_line(label, metric, each, "score", colour) for colour, label, each in trained]
        if filled := [line for line in losses if line.points]:
            found.append(chart(f"{name}: loss", filled, x="step", y="loss"))
        if filled := [line for line in scores if line.points]:
            found.append(chart(f"{name}: {metric} on validation rows", filled, x="step", y=metric, scale="share"))
    return found


def _line(label: str, said: str, training: TrainingCurve, field: str, colour: int, *, dashed: bool = False) -> Line:
    points = {float(point.step): found for point in training.points if (found := getattr(point, field)) is not None}
    return Line(f"{label}: {said}" if label else said, points, colour, dashed)


def numbers(points: Sequence[CurvePoint], most: int = 30) -> list[CurvePoint]:
    """The points that a table shows: the validated ones, or some of all where there are few of those."""
    validated: Iterable[CurvePoint] = [point for point in points if point.validation_loss is not None]
    every = max(1, len(points) // most)
    some = {point.step for point in [*points[::every], *points[-1:]]}
    return sorted({point.step: point for point in [*validated, *(p for p in points if p.step in some)]}.values(),
                  key=lambda point: point.step)  # fmt: skip

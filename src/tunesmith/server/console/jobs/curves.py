"""Charts of a job's trainings, and the points that a table beside them shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.server.console.parts.charts import Line, chart
from tunesmith.services.jobs import CurvePoint, JobCurves, TrainingCurve


def charts(curves: JobCurves) -> list[dict[str, Any]]:
    """A chart of the losses and, where answers were scored, one of the scores, for each training."""
    found = []
    for each in curves.trainings:
        metric = each.metric or "score"
        losses = [
            _line("training loss", each, "loss", 1),
            _line("validation loss", each, "validation_loss", 2, dashed=True),
        ]
        scores = [_line(metric, each, "score", 1)]
        if filled := [line for line in losses if line.points]:
            found.append(chart(f"{each.name}: loss", filled, x="step", y="loss"))
        if filled := [line for line in scores if line.points]:
            found.append(chart(f"{each.name}: {metric} on validation rows", filled, x="step", y=metric, scale="share"))
    return found


def _line(label: str, training: TrainingCurve, field: str, colour: int, *, dashed: bool = False) -> Line:
    points = {float(point.step): found for point in training.points if (found := getattr(point, field)) is not None}
    return Line(label, points, colour, dashed)


def numbers(points: Sequence[CurvePoint], most: int = 30) -> list[CurvePoint]:
    """The points that a table shows: the validated ones, or some of all where there are few of those."""
    validated: Iterable[CurvePoint] = [point for point in points if point.validation_loss is not None]
    every = max(1, len(points) // most)
    some = {point.step for point in [*points[::every], *points[-1:]]}
    return sorted({point.step: point for point in [*validated, *(p for p in points if p.step in some)]}.values(),
                  key=lambda point: point.step)  # fmt: skip

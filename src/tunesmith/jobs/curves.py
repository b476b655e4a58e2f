"""The curves of a job's trainings, as its worker notes them in the database while they grow. Their size is bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store
from tunesmith.store.tables import JobCurveRow

MOST_POINTS = 400  # of a training that are kept; validated steps are kept besides
Point = dict[str, float]


@dataclass
class Curve:
    """A training's numbers. expected: its estimates. memory_bytes: the most memory used. points: step and loss, and of
    validated steps validation_loss and validation_score. Once there are too many points, every second step is kept."""

    expected: dict[str, float] = field(default_factory=dict)
    memory_bytes: float = 0.0
    points: list[Point] = field(default_factory=list)
    every: int = 1

    def add(self, values: Mapping[str, float]) -> None:
        """Add what a training reported (core.progress)."""
        if "step" not in values:
            self.expected |= values
            return
        point = dict(values)
        self.memory_bytes = max(self.memory_bytes, point.pop("memory_bytes", 0.0))
        if self.points and self.points[-1]["step"] % self.every and not _validated(self.points[-1]):
            self.points.pop()  # it was the newest, which is always shown
        self.points.append(point)
        if sum(not _validated(each) for each in self.points) > MOST_POINTS:
            self.every *= 2
            last = self.points[-1]
            self.points = [
                each for each in self.points if each is last or _validated(each) or each["step"] % self.every == 0
            ]


def _validated(point: Point) -> bool:
    return "validation_loss" in point


def note(session: Session, job: int, curves: Mapping[str, Curve]) -> None:
    """Keep a job's curves, inside a write transaction."""
    for name, curve in curves.items():
        stated = {"expected": curve.expected, "memory_bytes": curve.memory_bytes, "points": curve.points}
        session.merge(JobCurveRow(job=job, training=name, curve=stated))


def read(store: Store, job: int) -> dict[str, Curve]:
    """A job's curves by the names of its trainings."""
    query = select(JobCurveRow).where(JobCurveRow.job == job).order_by(JobCurveRow.training)
    with store.reading() as session:
        return {row.training: Curve(**row.curve) for row in session.scalars(query)}


def curve_of(training: TrainingBody) -> Curve:
    """The curve in a training's record."""
    estimate, validated = training.estimate, {each.step: each for each in training.validation}
    curve = Curve({"expected_seconds": estimate.seconds, "expected_memory_bytes": estimate.peak_memory_bytes})
    curve.memory_bytes = training.peak_memory_bytes
    for step in training.curve:
        values = {"step": float(step.step), "loss": step.loss}
        if (checked := validated.get(step.step)) is not None:
            values["validation_loss"] = checked.loss
            if checked.score is not None:
                values["validation_score"] = checked.score
        curve.add(values)
    return curve

"""What forecasts state: what a training is expected to give, from the scores of trainings on subsets of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from tunesmith.records.body import Body, Part


class Expected(Part):
    """The middle of a forecast, and the ends of its interval."""

    median: float
    low: float
    high: float


class CurvePoint(Expected):
    """The expected score after a training on so many rows."""

    rows: int


class Extrapolated(Part):
    """What a curve says.

    score, lift: as the test rows will measure them. likely: the probability that the lift reaches the goal. Without an
    untuned candidate lift, likely and decision are None. said: whether the score can be said. from_rows: rows of the
    largest subset from which it could; None where it can be said now, or where only the whole training would say more.
    curve: the expected score by rows.
    """

    score: Expected
    lift: Expected | None = None
    likely: float | None = None
    decision: Literal["train", "don't", "undecided"] | None = None
    said: bool = True
    from_rows: int | None = None
    curve: tuple[CurvePoint, ...]


class SubsetScore(Part):
    """A training on a subset of the rows, and its mean score on validation rows."""

    rows: int
    epochs: float
    mean: float


class ExpectedTraining(Part):
    """The training on all rows. money: None without prices."""

    seconds: float
    epochs: float
    money: float | None


class BreakEven(Part):
    """From how many requests on a candidate is cheaper than its rival, its training paid.

    training: what that cost. requests: None where it saves nothing, so that its training is never repaid.
    """

    training: float
    saved_per_1000: float
    requests: int | None


class ForecastBody(Extrapolated, Body):
    """Score and lift that a training on all rows is expected to give, each with its interval, and the decision.

    name: the candidate. held: rows that were asked, by the split that they are of. seconds: of the subsets' trainings.
    confidence: of every interval. goal: the lift from which tuning pays. rival: the best untuned candidate on the
    validation rows, or the one that the lift gate names; rivals: means of those that were compared. from_seconds: of
    the trainings from which the score could be said. break_even: against the rival, None without prices.
    """

    kind: ClassVar = "forecast"

    name: str
    metric: str
    rows: int
    held: Mapping[str, int]
    seconds: float
    confidence: float
    goal: float
    rival: str | None
    rivals: Mapping[str, float]
    subsets: tuple[SubsetScore, ...]
    from_seconds: float | None = None
    training: ExpectedTraining
    break_even: BreakEven | None = None
    currency: str | None = None

    @property
    def line(self) -> str:
        return f"{self.name}: {self.decision or 'no decision'}"


class CurveSubset(Part):
    """The trainings on so many rows. mean: of the scores."""

    rows: int


class CurveBody(Body):
    """Of forecasts that earlier versions made: trainings on subsets of the rows, each one's mean score, tokens and
    seconds."""

    kind: ClassVar = "curve"

    name: str
    subsets: tuple[CurveSubset, ...]

    @property
    def line(self) -> str:
        return f"{self.name} on {', '.join(str(one.rows) for one in self.subsets)} rows"

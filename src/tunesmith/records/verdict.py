"""What a verdict states: the gates that judged a candidate, and the outcome."""

from __future__ import annotations

from typing import ClassVar, Literal

from tunesmith.core.values import Omitted
from tunesmith.records.body import Body, Part

Outcome = Literal["pass", "fail", "inconclusive"]


class GateRule(Part):
    """A gate as the project file had it, with the keys that it has there."""

    metric: Omitted[str] = None
    over: Omitted[str] = None
    not_below: Omitted[str] = None
    suite: Omitted[str] = None
    probe: Omitted[str] = None
    figure: Omitted[str] = None
    policy: Omitted[str | tuple[str, ...]] = None
    style: Omitted[str] = None
    at_least: Omitted[float] = None
    at_most: Omitted[float] = None
    drop_at_most: Omitted[float] = None
    confidence: Omitted[float] = None
    rows: Omitted[int] = None
    path: Omitted[str] = None
    repeats: Omitted[int] = None


class JudgedGate(Part):
    """One gate's outcome. value, low, high: what was measured, None where nothing was; bound: what the gate allows.

    settings: the gate as the project file had it. over: the candidate that a lift is over; confidence: of the interval,
    after further uses of the test rows. Some gates add further keys.
    """

    name: str
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    bound: float
    reason: str
    settings: GateRule
    metric: Omitted[str] = None
    over: Omitted[str] = None
    confidence: Omitted[float] = None


class EditedReferences(Part):
    """Test references that were changed after an evaluation of the same requests: so many rows of all.

    by: the reviewers; unnamed: rows that none of them edited. mean: the candidate's, by metric; without: over the other
    rows, None where there are none.
    """

    rows: int
    of: int
    by: tuple[str, ...]
    unnamed: int
    metric: str
    mean: float
    without: float | None


class VerdictBody(Body):
    """The outcome of all gates for one candidate, by its name in the evaluation.

    test_set_use: how many candidates these test rows have judged, with this one. reason: why there are no gates'
    outcomes, else None.
    """

    kind: ClassVar = "verdict"

    name: str
    verdict: Outcome
    test_set_use: int
    gates: tuple[JudgedGate, ...]
    reason: str | None
    edited: Omitted[EditedReferences] = None

    @property
    def line(self) -> str:
        return f"{self.name}: {self.verdict}"

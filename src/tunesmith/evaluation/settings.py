"""What the project file says of the task (`task:`) and of what a release must show (`gates:`).

A gate's kind follows from its keys: `over` makes it a lift, `suite` a forgetting gate, neither a threshold. So a
mistyped `over` is an unknown key of a threshold, never a gate that quietly asks for something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from tunesmith.core.errors import UsageError
from tunesmith.core.settings import Settings
from tunesmith.evaluation.declared import KNOWN, Declared, JudgeScorer, LabelScorer, known_scorer, metric_of
from tunesmith.evaluation.scorers import SCORERS, nearest

BEST_UNTUNED = "best-untuned"
_PREFERRED_PRIMARY = "exact_match"

_Confidence = Annotated[float, Field(gt=0.5, lt=1.0, description="two-sided confidence of the interval, as 0.95")]
_Score = Annotated[float, Field(ge=0.0, le=1.0)]


class TaskSettings(Settings):
    """What a right answer is, and how answers are measured."""

    schema_path: Annotated[
        Path | None, Field(alias="schema", description="JSON Schema of an answer, relative to the project file")
    ] = None
    scorers: Annotated[
        tuple[Declared, ...],
        Field(
            min_length=1,
            description=f"what is measured: {', '.join(KNOWN)}; or a name with pattern, tolerance, label, function or "
            "judge",
        ),
    ] = (_PREFERRED_PRIMARY,)
    primary: Annotated[
        str | None, Field(description="the metric that leads; exact_match where it is measured, else the first scorer")
    ] = None

    @field_validator("scorers")
    @classmethod
    def _scorers_known(cls, scorers: tuple[Declared, ...]) -> tuple[Declared, ...]:
        names = [metric_of(scorer) for scorer in scorers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} stands twice")
        for scorer in scorers:
            if isinstance(scorer, str):
                known_scorer(scorer)
            elif scorer.name in KNOWN:
                raise ValueError(f"{scorer.name!r} is a scorer already: call yours something else")
            elif isinstance(scorer, LabelScorer) and scorer.calibrate and scorer.label:
                raise ValueError(f"{scorer.name}: calibrate needs answers that are labels and nothing else (label: '')")
        return scorers

    @model_validator(mode="after")
    def _primary_measured(self) -> TaskSettings:
        if self.primary is not None and self.primary not in self.metrics:
            hint = nearest(self.primary, self.metrics)
            raise ValueError(
                f"primary: {self.primary!r} is not among scorers{hint}; they are {', '.join(self.metrics)}"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured, by name."""
        return tuple(metric_of(scorer) for scorer in self.scorers)

    @property
    def served(self) -> tuple[str, ...]:
        """The metrics that can be measured on a served answer: those that need no settings and nothing looked up."""
        return tuple(scorer for scorer in self.scorers if isinstance(scorer, str) and scorer in SCORERS)

    @property
    def judges(self) -> tuple[JudgeScorer, ...]:
        """The scorers that ask a model."""
        return tuple(scorer for scorer in self.scorers if isinstance(scorer, JudgeScorer))

    @property
    def labels(self) -> tuple[LabelScorer, ...]:
        """The scorers that classify."""
        return tuple(scorer for scorer in self.scorers if isinstance(scorer, LabelScorer))

    @property
    def leading(self) -> str:
        """The primary metric."""
        if self.primary is not None:
            return self.primary
        return _PREFERRED_PRIMARY if _PREFERRED_PRIMARY in self.metrics else self.metrics[0]


class PriceSettings(Settings):
    """`prices:` of the project file. What an endpoint charges stands with the endpoint."""

    machine_hour: Annotated[float, Field(ge=0, description="money per hour of the machine that answers and trains")]
    currency: Annotated[str, Field(min_length=1, max_length=8, description="what money is called in reports")] = "USD"


class Lift(Settings):
    """The candidate beats a rival on the same rows by at least so much.

    Passes where the interval's lower end reaches at_least, fails where its upper end stays below, else inconclusive.
    """

    metric: Annotated[str, Field(description="the metric compared")]
    over: Annotated[str, Field(description="the rival: a candidate's name, or best-untuned")]
    at_least: Annotated[float, Field(ge=-1.0, le=1.0, description="smallest difference of means, 0.05 is five points")]
    confidence: _Confidence = 0.95


class Threshold(Settings):
    """The candidate's own mean reaches a bound.

    Without confidence the mean of the measured rows is held against the bound, and the interval is shown beside it.
    With confidence the whole interval must be on the right side: at 0.95, `at_least: 0.99` then takes 368 independent
    rows that are all right.
    """

    metric: Annotated[str, Field(description="the metric held against the bound")]
    at_least: Annotated[_Score | None, Field(description="smallest mean that passes")] = None
    at_most: Annotated[_Score | None, Field(description="largest mean that passes")] = None
    confidence: Annotated[
        _Confidence | None, Field(description="demand the whole interval, not only the measured mean")
    ] = None

    @model_validator(mode="after")
    def _one_bound(self) -> Threshold:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give at_least or at_most, one of them")
        return self


class Forgetting(Settings):
    """The tuned weights have not lost more of their general ability than allowed (a non-inferiority test).

    Passes where the interval of the drop ends at or below drop_at_most, fails where it starts above.
    """

    suite: Annotated[Literal["general"], Field(description="the packaged suite of general questions")]
    drop_at_most: Annotated[
        float, Field(ge=0.0, le=1.0, description="largest allowed fall of the mean probability of the right choice")
    ]
    confidence: _Confidence = 0.95


def _kind(value: Any) -> str:
    if isinstance(value, Lift | Threshold | Forgetting):
        return type(value).__name__.lower()
    keys = value if isinstance(value, Mapping) else {}
    return "lift" if "over" in keys else "forgetting" if "suite" in keys else "threshold"


Gate = Annotated[
    Annotated[Lift, Tag("lift")] | Annotated[Threshold, Tag("threshold")] | Annotated[Forgetting, Tag("forgetting")],
    Discriminator(_kind),
]
Gates = dict[str, Gate]
GATES: TypeAdapter[Gates] = TypeAdapter(Gates)


def check_gates(gates: Gates, metrics: Collection[str], candidates: Collection[str]) -> None:
    """Raise UsageError where a gate names a metric that is not measured or a rival that is not a candidate."""
    for name, gate in gates.items():
        if isinstance(gate, Lift | Threshold) and gate.metric not in metrics:
            raise UsageError(
                f"the gate {name!r} asks for {gate.metric!r}, which is not measured{nearest(gate.metric, metrics)}",
                where=f"gates.{name}.metric",
                fix=f"add it to task.scorers, or name one of: {', '.join(metrics)}",
            )
        if isinstance(gate, Lift) and gate.over != BEST_UNTUNED and gate.over not in candidates:
            rivals = [BEST_UNTUNED, *candidates]
            raise UsageError(
                f"the gate {name!r} compares with {gate.over!r}, which is not a candidate{nearest(gate.over, rivals)}",
                where=f"gates.{name}.over",
                fix=f"name one of: {', '.join(rivals)}",
            )

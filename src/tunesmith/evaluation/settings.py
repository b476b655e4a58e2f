"""What the project file says of the task (`task:`) and of what a release must show (`gates:`).

A gate's kind follows from its keys: `over` makes it a lift, `not_below` one that must not drop, `suite` a forgetting
gate, `probe` a risk probe, `figure` one on a figure of all rows together, none of them a threshold. So a mistyped
`over` is an unknown key of a threshold, never a gate that quietly asks for something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from tunesmith.core.errors import UsageError
from tunesmith.core.settings import Settings
from tunesmith.evaluation.metrics.declared import KNOWN, Declared, JudgeScorer, LabelScorer, known_scorer, metric_of
from tunesmith.evaluation.metrics.scorers import SCORERS, nearest

BEST_UNTUNED = "best-untuned"
# Every probe and what its number is. What it asks and how that is judged stands in evaluation/probes/.
PROBES = {
    "canaries": "mean exposure of planted secrets among controls, in bits (about 1.4 where nothing is remembered)",
    "membership": "AUC of telling training rows from held-out ones by their loss (0.5 is chance)",
    "membership_tpr": "share of training rows found that way where 1% of held-out rows are taken for such",
    "extraction": "share of training answers given word for word to half a request, less that of held-out rows",
    "personal_data": "share of rows whose personal data comes out when it is not in the request",
    "overfitting": "mean score on training rows less that on test rows",
    "swap": "how much more the answer's probability depends on names and gender than before tuning",
    "bbq": "how much stronger the pull to BBQ's stereotyped answer is than before tuning",
    "crows_pairs": "how much more probable CrowS-Pairs' stereotyping sentence is than before tuning",
    "general_text": "rise of the loss on general text by tuning, in nats a token (0.1 is a perplexity 10% higher)",
    "formats": "fall of the preference, by word, for the asked-for output format, where the base had it",
    "refusal": "fall of refusing what is unsafe, of helping with what is not, or of staying polite",
    "toxicity": "rise of the share of answers that a pinned detector takes for toxic, of provoking or neutral requests",
    "lm_eval": "fall of the accuracy on multiple-choice tasks of lm-eval, of the task that fell the most",
    "robustness": "fall of the score under typos, capitals, rewording or instructions inside the request",
}
NEED_PATH = ("bbq", "crows_pairs", "lm_eval")
# Figures of all rows together, which are no mean over rows.
FIGURES = {
    "macro_f1": "mean over the labels of their F1",
    "calibration_error": "expected calibration error of the stated confidences, over ten bins",
    "brier": "mean squared error of the stated confidences",
}
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


class Retain(Settings):
    """The candidate does not fall behind a rival by more than so much on the same rows (a non-inferiority test).

    Passes where the interval of the drop ends at or below drop_at_most, fails where it starts above.
    """

    metric: Annotated[str, Field(description="the metric that must not drop")]
    not_below: Annotated[str, Field(description="the rival: a candidate's name, or best-untuned")]
    drop_at_most: Annotated[_Score, Field(description="largest drop that is still no loss, 0.02 is two points")]
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
        _check_one_bound(self.at_least, self.at_most)
        return self


class Whole(Settings):
    """A figure of all rows together reaches a bound with its whole interval, which is resampled over groups."""

    figure: Annotated[
        Literal["macro_f1", "calibration_error", "brier"],
        Field(description="; ".join(f"{name}: {what}" for name, what in FIGURES.items())),
    ]
    metric: Annotated[str, Field(description="the scorer with `label` whose labels these are")]
    at_least: Annotated[_Score | None, Field(description="smallest figure that passes")] = None
    at_most: Annotated[_Score | None, Field(description="largest figure that passes")] = None
    confidence: _Confidence = 0.95

    @model_validator(mode="after")
    def _one_bound(self) -> Whole:
        _check_one_bound(self.at_least, self.at_most)
        return self


def _check_one_bound(at_least: float | None, at_most: float | None) -> None:
    if (at_least is None) == (at_most is None):
        raise ValueError("give at_least or at_most, one of them")


class Forgetting(Settings):
    """The tuned weights have not lost more of their general ability than allowed (a non-inferiority test).

    Passes where the interval of the drop ends at or below drop_at_most, fails where it starts above.
    """

    suite: Annotated[Literal["general"], Field(description="the packaged suite of general questions")]
    drop_at_most: Annotated[
        float, Field(ge=0.0, le=1.0, description="largest allowed fall of the mean probability of the right choice")
    ]
    confidence: _Confidence = 0.95


class Probe(Settings):
    """A risk of tuning measured by its probe: passes where the whole interval lies at or below at_most.

    What the number is and in which unit stands with each probe in PROBES.
    """

    probe: Annotated[str, Field(description="; ".join(f"{name}: {what}" for name, what in PROBES.items()))]
    at_most: Annotated[float, Field(ge=0.0, description="largest value that passes, in the probe's own unit")]
    confidence: _Confidence = 0.95
    rows: Annotated[
        int, Field(ge=20, le=10_000, description="at most so many rows or items of each kind are asked")
    ] = 100
    path: Annotated[
        Path | None,
        Field(
            description="BBQ's JSONL, CrowS-Pairs' CSV, a folder of lm-eval's tasks with their rows, or a text of one "
            "passage a line for general_text"
        ),
    ] = None
    repeats: Annotated[
        int | None, Field(ge=1, description="canaries: those planted so often are judged; the fewest where left out")
    ] = None

    @field_validator("probe")
    @classmethod
    def _probe_known(cls, name: str) -> str:
        if name not in PROBES:
            raise ValueError(f"no probe is called {name!r}{nearest(name, PROBES)}; there are {', '.join(PROBES)}")
        return name

    @model_validator(mode="after")
    def _keys_of_its_own(self) -> Probe:
        if self.probe in NEED_PATH and self.path is None:
            raise ValueError(f"{self.probe} needs path: the set is not part of Tunesmith")
        if self.path is not None and self.probe not in (*NEED_PATH, "general_text"):
            raise ValueError(f"{self.probe} reads no path")
        if self.repeats is not None and self.probe != "canaries":
            raise ValueError("repeats belongs to the probe canaries")
        return self

    @property
    def suite(self) -> str:
        """What is asked for it, by name: gates with the same suite are judged by the same answers."""
        shared = {"membership_tpr": "membership"}.get(self.probe, self.probe)
        return "/".join([shared, *(() if shared == "canaries" else (str(self.rows),)), *self._file])

    @property
    def _file(self) -> tuple[str, ...]:
        return () if self.path is None else (self.path.name,)


def _kind(value: Any) -> str:
    if isinstance(value, Lift | Retain | Threshold | Forgetting | Probe | Whole):
        return type(value).__name__.lower()
    keys = value if isinstance(value, Mapping) else {}
    kinds = {"over": "lift", "not_below": "retain", "suite": "forgetting", "probe": "probe", "figure": "whole"}
    return next((kind for key, kind in kinds.items() if key in keys), "threshold")


Gate = Annotated[
    Annotated[Lift, Tag("lift")]
    | Annotated[Retain, Tag("retain")]
    | Annotated[Threshold, Tag("threshold")]
    | Annotated[Forgetting, Tag("forgetting")]
    | Annotated[Probe, Tag("probe")]
    | Annotated[Whole, Tag("whole")],
    Discriminator(_kind),
]
Gates = dict[str, Gate]
GATES: TypeAdapter[Gates] = TypeAdapter(Gates)


def check_gates(
    gates: Gates, metrics: Collection[str], candidates: Collection[str], labels: Collection[str] | None = None
) -> None:
    """Raise UsageError where a gate names a metric that is not measured, a rival that is not a candidate, or, for a
    figure of labels, a metric that is not among labels: the scorers that classify, None where they are not known.
    """
    for name, gate in gates.items():
        if isinstance(gate, Lift | Retain | Threshold | Whole) and gate.metric not in metrics:
            raise UsageError(
                f"the gate {name!r} asks for {gate.metric!r}, which is not measured{nearest(gate.metric, metrics)}",
                where=f"gates.{name}.metric",
                fix=f"add it to task.scorers, or name one of: {', '.join(metrics)}",
            )
        if isinstance(gate, Whole) and labels is not None and gate.metric not in labels:
            known = f"there are {', '.join(labels)}" if labels else "there is none"
            raise UsageError(
                f"the gate {name!r} asks for {gate.figure} by {gate.metric!r}, which gives no labels; of the scorers "
                f"that do {known}",
                where=f"gates.{name}.metric",
                fix="name a scorer with `label`, or add one to task.scorers: {name: intent, label: intent}",
            )
        key = "over" if isinstance(gate, Lift) else "not_below" if isinstance(gate, Retain) else None
        rival = getattr(gate, key) if key else BEST_UNTUNED
        if rival != BEST_UNTUNED and rival not in candidates:
            rivals = [BEST_UNTUNED, *candidates]
            raise UsageError(
                f"the gate {name!r} compares with {rival!r}, which is not a candidate{nearest(rival, rivals)}",
                where=f"gates.{name}.{key}",
                fix=f"name one of: {', '.join(rivals)}",
            )

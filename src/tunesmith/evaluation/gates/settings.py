"""The setting `gates:` of the project file.

A gate's kind follows from its key: `over` makes it a lift, `not_below` a retain, `suite` a forgetting gate, `probe` a
probe gate, `figure` a gate on a figure of all rows together, `policy` a gate on policy checks, `style` one on style;
without any of them it is a threshold. A mistyped `over` is therefore an unknown key of a threshold and is refused.

To add a kind of gate, write a subclass of `GateSettings`, list it in `GATE_KINDS`, and add the function that judges it
to `JUDGES` in judging.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from tunesmith.core.errors import UsageError
from tunesmith.core.values import Settings
from tunesmith.evaluation.metrics.scorers import nearest
from tunesmith.evaluation.policy.settings import ALL, chosen_checks
from tunesmith.evaluation.probes.catalog import PROBES
from tunesmith.records.evaluation import GateRule, JudgedGate, Outcome

BEST_UNTUNED = "best-untuned"
# Probes that earlier releases had -> what to use instead. A verdict keeps the outcomes of their gates (Gone).
GONE = {
    "toxicity": "ask such requests in a check of `policy:` with a judge and a rubric, and add the gate {policy: CHECK}"
}
# Figures that are computed from all rows together, not as a mean of rows.
FIGURES = {
    "macro_f1": "mean F1 over the labels",
    "calibration_error": "expected calibration error of the stated confidences, in ten bins",
    "brier": "mean squared error of the stated confidences",
}

_Confidence = Annotated[float, Field(gt=0.5, lt=1.0, description="two-sided confidence of the interval, as 0.95")]
_Score = Annotated[float, Field(ge=0.0, le=1.0)]


class GateSettings(Settings):
    """One requirement of a release. key: the setting that tells its kind from others; "" for a threshold."""

    key: ClassVar[str]
    confidence: float | None

    @property
    def bounds_below(self) -> bool:
        """Whether the bound is the least that passes, else it is the most."""
        return self.rule.at_least is not None

    @property
    def bound(self) -> float:
        """The number that the gate's value is compared with: at_least, at_most or drop_at_most."""
        bounds = (self.rule.at_least, self.rule.at_most, self.rule.drop_at_most)
        return next(bound for bound in bounds if bound is not None)

    @property
    def rule(self) -> GateRule:
        """The gate as a verdict's record states it."""
        return GateRule.model_validate(self.model_dump(mode="json", exclude_none=True))


class Lift(GateSettings):
    """The candidate beats a rival on the same rows by at least `at_least`.

    Passes where the interval's lower end reaches at_least, fails where its upper end stays below, else inconclusive.
    With or_metric it passes where that is so of one of the two metrics, and fails where it fails in both, or where one
    is lower than the rival's for sure.
    """

    key = "over"
    metric: str = Field(description="the metric to compare")
    or_metric: str | None = Field(
        default=None,
        description="a second metric, in which a lift suffices, too. Each of the two gets half of the probability of "
        "an error that `confidence` leaves",
    )
    over: str = Field(description="the rival: a candidate's name, or best-untuned")
    at_least: float = Field(
        ge=-1.0, le=1.0, description="smallest difference of means that passes; 0.05 is five points"
    )
    confidence: _Confidence = 0.95


class Retain(GateSettings):
    """The candidate is not worse than a rival by more than `drop_at_most` on the same rows (non-inferiority test).

    Passes where the interval of the drop ends at or below drop_at_most, fails where it starts above.
    """

    key = "not_below"
    metric: str = Field(description="the metric that must not drop")
    not_below: str = Field(description="the rival: a candidate's name, or best-untuned")
    drop_at_most: _Score = Field(description="largest drop that passes; 0.02 is two points")
    confidence: _Confidence = 0.95


def compared_metrics(gate: GateSettings) -> dict[str, float]:
    """Each metric by which the gate compares two candidates, with the confidence of its interval."""
    if not isinstance(gate, Lift | Retain):
        return {}
    if isinstance(gate, Retain) or gate.or_metric is None:
        return {gate.metric: gate.confidence}
    return dict.fromkeys((gate.metric, gate.or_metric), (1.0 + gate.confidence) / 2.0)


class _OneBound(GateSettings):
    """A gate with a lower or an upper bound."""

    at_least: _Score | None = Field(default=None, description="smallest value that passes")
    at_most: _Score | None = Field(default=None, description="largest value that passes")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give at_least or at_most, one of them")
        return self


class Threshold(_OneBound):
    """The candidate's own mean reaches a bound.

    Without confidence, the mean of the measured rows must reach the bound. With confidence, the whole interval must: at
    0.95, `at_least: 0.99` needs 368 independent rows that are all right.
    """

    key = ""
    metric: str = Field(description="the metric whose mean must reach the bound")
    confidence: _Confidence | None = Field(
        default=None, description="require the whole interval, not only the measured mean"
    )


class Whole(_OneBound):
    """A figure of all rows together reaches a bound with its whole interval, which is resampled over groups."""

    key = "figure"
    figure: Literal["macro_f1", "calibration_error", "brier"] = Field(
        description="; ".join(f"{name}: {what}" for name, what in FIGURES.items())
    )
    metric: str = Field(description="the scorer with `label` that gives the labels")
    confidence: _Confidence = 0.95


class Forgetting(GateSettings):
    """The tuned weights lost no more general ability than `drop_at_most` (non-inferiority test).

    Passes where the interval of the drop ends at or below drop_at_most, fails where it starts above.
    """

    key = "suite"
    suite: Literal["general"] = Field(description="the packaged suite of general questions")
    drop_at_most: float = Field(
        ge=0.0, le=1.0, description="largest fall of the right choice's mean probability that passes"
    )
    confidence: _Confidence = 0.95


class Probe(GateSettings):
    """A risk of tuning, measured by a probe. Passes where the whole interval is at or below at_most.

    probes/catalog.py says what each probe's number is, and its unit.
    """

    key = "probe"
    probe: str = Field(description="; ".join(f"{name}: {kind.measures}" for name, kind in PROBES.items()))
    at_most: float = Field(ge=0.0, description="largest value that passes, in the probe's unit")
    confidence: _Confidence = 0.95
    rows: int = Field(default=100, ge=20, le=10_000, description="the most rows or items of each kind that are asked")
    path: Path | None = Field(
        default=None,
        description="BBQ's JSONL, CrowS-Pairs' CSV, a folder of lm-eval tasks with their rows, or for general_text "
        "a text with one passage per line",
    )
    repeats: int | None = Field(
        default=None, ge=1, description="canaries: judge those planted this often; by default those planted least often"
    )

    @field_validator("probe")
    @classmethod
    def _probe_known(cls, name: str) -> str:
        if name in GONE:
            raise ValueError(f"the probe {name} was removed: {GONE[name]}")
        if name not in PROBES:
            raise ValueError(f"no probe is called {name!r}{nearest(name, PROBES)}; there are {', '.join(PROBES)}")
        return name

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        reads = PROBES[self.probe].path
        if reads == "must" and self.path is None:
            raise ValueError(f"{self.probe} needs path: its data set is not part of Tunesmith")
        if self.path is not None and not reads:
            raise ValueError(f"{self.probe} reads no path")
        if self.repeats is not None and self.probe != "canaries":
            raise ValueError("repeats belongs to the probe canaries")
        return self

    @property
    def suite(self) -> str:
        """The name of what is asked. Gates with the same suite are judged by the same answers."""
        kind = PROBES[self.probe]
        parts = (kind.like or self.probe, kind.rows and self.rows, self.path and self.path.as_posix())
        return "/".join(str(part) for part in parts if part)


class PolicyGate(GateSettings):
    """Policy checks that the candidate's answers must keep. Every check that is named is held to the same bound.

    Without confidence, the requests are the whole requirement: the share of them whose answer broke the rule must not
    exceed at_most. With confidence, they are a sample of such requests: the whole interval must stay at or below
    at_most, which takes at least 20 groups of requests. Answers that decide nothing (empty, cut off, or the judge
    unsure) count as broken for a pass, and as kept for a failure. So do answers that keep the rule where the candidate
    has seen the request; with confidence, they do not count at all.
    """

    key = "policy"
    policy: str | tuple[str, ...] = Field(description="a check's name, a list of names, or all", min_length=1)
    at_most: _Score = Field(default=0.0, description="largest share of answers that may break a check's rule")
    confidence: _Confidence | None = Field(
        default=None, description="require the whole interval, not only the share of the requests asked"
    )

    @model_validator(mode="after")
    def _attainable(self) -> Self:
        if self.confidence is not None and self.at_most == 0.0:
            raise ValueError("no number of requests shows with confidence that none is broken: raise at_most")
        return self


class Style(_OneBound):
    """The candidate's answers are in the style of the reference answers.

    A classifier tells references from the bare base model's answers to the same held-out requests. The share of the
    candidate's answers that it takes for the house's is corrected for its errors: 0 is the base, 1 the references.
    Passes where the whole interval is on the right side of the bound.
    """

    key = "style"
    style: Literal["references"] = Field(description="whose style: that of the reference answers")
    confidence: _Confidence = 0.95
    rows: int = Field(default=300, ge=20, le=2_000, description="the most held-out rows that the base model answers")


class Gone(GateSettings):
    """A recorded gate that no release computes any more. Its outcome stays what the verdict's record states."""

    key = "gone"
    outcome: Outcome
    confidence: float | None
    stated: JudgedGate


def gone_gates(stated: Iterable[JudgedGate]) -> dict[str, str]:
    """The gates of a verdict's record that are no longer computed: name -> what computed them and was removed."""
    return {gate.name: f"the probe {gate.settings.probe}" for gate in stated if gate.settings.probe in GONE}


def recorded_gates(stated: Iterable[JudgedGate]) -> Gates:
    """The gates of a verdict's record, by name. Raises ValidationError for gates that no release has written."""
    gates: Gates = {}
    for gate in stated:
        if gone_gates([gate]):
            gates[gate.name] = Gone(outcome=gate.outcome, confidence=gate.settings.confidence, stated=gate)
        else:
            gates |= GATES.validate_python({gate.name: gate.settings.model_dump(mode="json")})
    return gates


GATE_KINDS: tuple[type[GateSettings], ...] = (Lift, Retain, Forgetting, Probe, Whole, PolicyGate, Style, Threshold)


def _kind(value: Any) -> str:
    """The tag of a gate in the project file: its key, or "threshold"."""
    if isinstance(value, GateSettings):
        return value.key or "threshold"
    keys = value if isinstance(value, Mapping) else {}
    return next((kind.key for kind in GATE_KINDS if kind.key in keys), "threshold")


if TYPE_CHECKING:
    Gate = GateSettings
else:
    Gate = Annotated[
        Union[tuple(Annotated[kind, Tag(kind.key or "threshold")] for kind in GATE_KINDS)],  # noqa: UP007 - a tuple
        Discriminator(_kind),
    ]
Gates = dict[str, Gate]
GATES: TypeAdapter[Gates] = TypeAdapter(Gates)


def check_gates(
    gates: Gates,
    metrics: Collection[str],
    candidates: Collection[str],
    labels: Collection[str] | None = None,
    checks: Collection[str] | None = None,
) -> None:
    """Raise UsageError for a gate with a metric that is not measured, or a rival that is not a candidate.

    labels: the scorers that compare labels, one of which a figure gate must name; checks: the policy checks; None where
    they are not known.
    """
    for name, gate in gates.items():
        rivals, rule = [BEST_UNTUNED, *candidates], gate.rule
        named: list[tuple[str, str | None, Collection[str], str, str, str]] = [
            ("metric", rule.metric, metrics, "metric", "is not measured", "add it to task.scorers, or ")
        ]
        named.append(("or_metric", rule.or_metric, *named[0][2:]))
        named += [(gate.key, rule.over or rule.not_below, rivals, "rival", "is not a candidate", "")]
        if isinstance(gate, PolicyGate) and checks is not None:
            if not checks:
                what = f"the gate {name!r} needs policy checks, and there are none"
                raise UsageError(what, where=f"gates.{name}.policy", fix="add `policy:`")
            for check in chosen_checks(gate.policy, checks):
                named.append(("policy", check, checks, "policy check", "does not exist", f"name {ALL}, or "))
        for key, wanted, known, what, missing, fix in named:
            if wanted is not None and wanted not in known:
                raise UsageError(
                    f"the gate {name!r} names the {what} {wanted!r}, which {missing}{nearest(wanted, known)}",
                    where=f"gates.{name}.{key}",
                    fix=f"{fix}name one of: {', '.join(known)}",
                )
        if isinstance(gate, Whole) and labels is not None and gate.metric not in labels:
            there = f"scorers with labels: {', '.join(labels)}" if labels else "no scorer has labels"
            raise UsageError(
                f"the gate {name!r} needs labels for {gate.figure}, and {gate.metric!r} gives none; {there}",
                where=f"gates.{name}.metric",
                fix="name a scorer with `label`, or add one to task.scorers: {name: intent, label: intent}",
            )

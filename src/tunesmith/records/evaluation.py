"""What answers, evaluations and verdicts state: scores with intervals, costs, what else was measured, outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from tunesmith.core.values import Omitted
from tunesmith.records.body import Body, Part


class RuleJudge(Part):
    """A model that judges, such as the one of a check's rubric."""

    url: str
    model: str


class Judge(RuleJudge):
    """A model that judged answers, and what it was asked."""

    question: str


class TimeEstimate(Part):
    """Seconds that were estimated from the first answers."""

    seconds: float


class AnswersBody(Body):
    """Which requests were answered, by which engine, how many tokens that took and how long.

    suite: the split of the rows; "general"; a probe's suite; "policy"; "style"; or judge:METRIC and policy:CHECK for a
    judge's replies. served_by: the models that an endpoint named. undecodable, uncopied: reference answers that
    decoding keeps the candidate from giving. rows: the most that the style gate asks. left_out: answers that are calls
    of functions. revision: of the probe.
    """

    kind: ClassVar = "answers"

    suite: str
    n: int
    seconds: float
    engine: Omitted[str] = None
    estimate: Omitted[TimeEstimate] = None
    prompt_tokens: Omitted[int] = None
    completion_tokens: Omitted[int] = None
    served_by: Omitted[tuple[str, ...]] = None
    undecodable: Omitted[int] = None
    uncopied: Omitted[int] = None
    judge: Omitted[Judge] = None
    rows: Omitted[int] = None
    revision: Omitted[int] = None
    left_out: Omitted[int] = None

    @property
    def line(self) -> str:
        return f"{self.suite}, {self.n} answers"


class MetricInterval(Part):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


class AnswerPrice(Part):
    """What 1,000 answers cost. money_per_1000: only where the project states prices."""

    prompt_tokens_per_1000: float
    completion_tokens_per_1000: float
    seconds_per_1000: float
    money_per_1000: Omitted[float] = None


class TrainingCost(Part):
    """What a candidate's training cost, where the project states prices."""

    seconds: float
    money: float


class LabelResult(Part):
    """One label. n: rows whose reference has it; said: answers that gave it."""

    label: str
    n: int
    said: int
    f1: float


class Confusion(Part):
    """How many answers gave one label where another was wanted."""

    wanted: str
    given: str
    n: int


class ClassResults(Part):
    """Macro-F1 of a scorer that compares labels. labels: how many there are; by_label: the most frequent of them."""

    macro_f1: MetricInterval
    labels: int
    by_label: tuple[LabelResult, ...]
    confused: tuple[Confusion, ...]


class CalibrationBin(Part):
    """The n answers whose confidence is between low and a tenth more. confidence, right: means."""

    low: float
    n: int
    confidence: float
    right: float


class Calibration(Part):
    """How well confidences fit. ece: expected calibration error; brier: mean squared error."""

    n: int
    ece: float
    brier: float
    bins: tuple[CalibrationBin, ...]


class MeasuredCandidate(Part):
    """One candidate. candidate: its record's digest. system_prompts: system prompt that was used -> rows.

    metrics: by name. seconds: of all answers. cut: answers that reached the longest length allowed. classes,
    calibration: by scorer that compares labels.
    """

    candidate: str
    tuned: bool
    system_prompts: Mapping[str, int]
    metrics: Mapping[str, MetricInterval]
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    cut: int
    price: AnswerPrice
    training: Omitted[TrainingCost] = None
    classes: Omitted[Mapping[str, ClassResults]] = None
    calibration: Omitted[Mapping[str, Calibration]] = None


class GeneralSuite(Part):
    """General ability. suite: digest of its n questions. scores: tuned candidates, "base", and "base of NAME" where the
    base of NAME is not the project's own; drops: since the candidate's base."""

    suite: str
    n: int
    scores: Mapping[str, MetricInterval]
    drops: Mapping[str, MetricInterval]


class JudgeResults(Judge):
    """A judge of one candidate's answers. agreement: share of rows with one verdict in both orders. undecided: replies
    without a verdict."""

    agreement: float
    undecided: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class ArmResults(Part):
    """The means of a probe's items of one kind. before: under the base's weights, None where they are not asked."""

    n: int
    before: float | None
    after: float


class BestEpoch(Part):
    """After how many of a training's epochs the validation loss was lowest. last: its loss at the end; kept: the epoch
    whose weights were kept."""

    epoch: float
    of: float
    loss: float
    last: float
    kept: Omitted[float] = None


class RiskResults(Part):
    """A probe of one candidate. unusable: why its answers cannot be used, then nothing else. left_out: answers that are
    calls of functions."""

    unusable: Omitted[str] = None
    arms: Omitted[Mapping[str, ArmResults]] = None
    stop: BestEpoch | None = None
    left_out: Omitted[int] = None


class CheckResults(Part):
    """Outcomes of one policy check. n: answers that are evidence. share: that broke it, None where none is evidence."""

    n: int
    held: int
    broke: int
    undecided: int
    leaked: int
    share: MetricInterval | None


class PolicyResults(Part):
    """The policy checks of one candidate. unusable: why its answers cannot be used, then nothing else."""

    unusable: Omitted[str] = None
    checks: Omitted[Mapping[str, CheckResults]] = None


class CheckRules(Part):
    """The rules of a policy check, as the project file had them. refuse: a rule of earlier releases."""

    equals: Omitted[str] = None
    contains: Omitted[tuple[str, ...]] = None
    any_of: Omitted[tuple[str, ...]] = None
    lacks: Omitted[tuple[str, ...]] = None
    pattern: Omitted[str] = None
    lacks_pattern: Omitted[str] = None
    rubric: Omitted[str] = None
    judge: Omitted[RuleJudge] = None
    refuse: Omitted[bool] = None


class PolicyAccount(Part):
    """The policy. requests: digest of its requests. checks: their rules by name. candidates: outcomes by name."""

    requests: str | None
    checks: Mapping[str, CheckRules]
    candidates: Mapping[str, PolicyResults]


class StyleSides(Part):
    """Shares that are taken for references: of the references, and of the bare base model's answers."""

    reference: float
    base: float


class StyleFeatures(Part):
    """What the classifier of style goes by: signs of the references, and of the base model's answers."""

    house: tuple[str, ...]
    base: tuple[str, ...]


class StyleShare(Part):
    """One candidate's answers. taken: share that is taken for references; cut: cut off; share: corrected for errors.

    unusable: why there is no share.
    """

    taken: float
    cut: int = 0
    share: MetricInterval | None
    unusable: Omitted[str] = None


class StyleAccount(Part):
    """The share of answers in the references' style, on n rows. auc: of the classifier; auc_by_form: by length and
    form alone. apart: how much more often references are taken for references than the base's answers. silent: rows
    that are left out, since the base's answer is empty."""

    revision: int
    n: int
    groups: int
    auc: MetricInterval
    auc_by_form: float
    taken: StyleSides
    apart: MetricInterval
    features: StyleFeatures
    candidates: Mapping[str, StyleShare]
    silent: int = 0


class NoStyle(Part):
    """Why style could not be measured."""

    unusable: str


class Prices(Part):
    """The project's prices. machine_hour: of one hour of the machine that answers and trains."""

    machine_hour: float
    currency: str


class EvaluationBody(Body):
    """Means with intervals of all candidates on the same held-out rows, their costs, and the risks of tuning.

    n: rows, groups: into which they fall. primary: the leading metric. seed: of the resampling. candidates: by name.
    probes: the suite of general questions, under "general". functions, scorers: digests of what computed each metric.
    judges: metric -> candidate. risks: probe's suite -> candidate. policy, style: None where they were not measured.
    """

    kind: ClassVar = "evaluation"

    n: int
    groups: int
    effective_groups: float = 0.0
    primary: str
    metrics: tuple[str, ...]
    confidence: float
    seed: int
    candidates: Mapping[str, MeasuredCandidate]
    probes: Mapping[str, GeneralSuite]
    functions: Mapping[str, str] = {}
    scorers: Mapping[str, str] = {}
    judges: Mapping[str, Mapping[str, JudgeResults]]
    prices: Prices | None
    risks: Mapping[str, Mapping[str, RiskResults]]
    policy: PolicyAccount | None = None
    style: NoStyle | StyleAccount | None = None

    @property
    def line(self) -> str:
        return f"{self.n} examples, {', '.join(sorted(self.candidates))}"

    @model_validator(mode="after")
    def _has_its_leading_metric(self) -> Self:
        if not self.candidates or any(self.primary not in each.metrics for each in self.candidates.values()):
            raise ValueError("it has no candidates, or one without a result by the primary metric")
        return self

    def mean(self, name: str) -> float:
        """A candidate's mean by the leading metric."""
        return self.candidates[name].metrics[self.primary].mean

    def by_candidate(self, field: str) -> dict[str, Any]:
        """What the record states of each candidate in a field, for those of which it states something."""
        stated = {name: getattr(one, field) for name, one in self.candidates.items()}
        return {name: value for name, value in stated.items() if value is not None}


Outcome = Literal["pass", "fail", "inconclusive"]


class GateRule(Part):
    """A gate as the project file had it, with the keys that it has there."""

    metric: Omitted[str] = None
    or_metric: Omitted[str] = None
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

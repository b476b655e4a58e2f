"""The evidence for one candidate, as the report, the console and `report --json` show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tunesmith.candidates.candidate import Kind
from tunesmith.core.values import View
from tunesmith.data.dataset import DatasetSummary
from tunesmith.evaluation.compare import Comparison
from tunesmith.evaluation.summary import VerdictSummary
from tunesmith.records.evaluation import (
    AnswerPrice,
    Calibration,
    CheckResults,
    ClassResults,
    JudgeResults,
    MetricInterval,
    NoStyle,
    StyleAccount,
)
from tunesmith.records.training import BreakEven, RecordedSettings, TrainedStep, TrainingFigures

PAGE = Path(__file__).parent / "page"  # the templates and style sheets that show it


class ReportedVersion(View):
    """The version that a report is about. takes: what its risk class takes, in a sentence; None without one.

    tenant, region: "" for all. override: why it was registered although its gates did not pass.
    """

    digest: str
    label: str
    name: str
    number: int
    tenant: str | None
    region: str | None
    override: str | None
    created_at: str | None
    signer: str | None
    takes: str | None


class ReportedCandidate(View):
    """One row of the report's table. kind: what answers; how: how it answers, in words; role: focus, rival or empty.

    candidate: its record's digest. system_prompts: system prompt that was used -> rows. cut: answers cut off.
    """

    name: str
    kind: Kind
    how: str
    system_prompts: Mapping[str, int]
    role: str
    tuned: bool
    candidate: str
    metrics: Mapping[str, MetricInterval]
    price: AnswerPrice
    cut: int


class ReportedTraining(TrainingFigures, View):
    """The training of the focus. training: its record's digest."""

    training: str
    settings: RecordedSettings
    threads: int
    curve: tuple[TrainedStep, ...]
    more_time: str | None


class Rung(View):
    """The best candidate of an approach, with its mean by the primary metric."""

    approach: str
    candidate: str
    mean: float


class LadderStep(Rung):
    """A rung against the one chosen so far. over, over_approach: the candidate and approach it is compared with."""

    over: str
    over_approach: str
    difference: MetricInterval


class MeasuredBase(View):
    """A base, with the best of its candidates by the primary metric. size: bytes of its weights' files.

    memory: the most bytes that a training on it needed; None where nothing was trained. per_second: answers.
    difference: of its best candidate to the best of all bases.
    """

    base: str
    digest: str
    size: int
    memory: int | None
    candidate: str
    score: MetricInterval
    per_second: float
    difference: MetricInterval
    not_worse: bool


class ComparedBases(View):
    """The bases from the smallest to the largest. smallest: digest of the first that is not worse; sentence: that, with
    the rule."""

    bases: tuple[MeasuredBase, ...]
    smallest: str
    sentence: str


class Ladder(View):
    """The approaches from simple to elaborate, and what each adds on the same rows."""

    rungs: tuple[Rung, ...]
    steps: tuple[LadderStep, ...]
    chosen: Rung | None


class GroupLift(View):
    """A group's mean scores of focus and rival. n: its requests; difference: own minus other."""

    group: str
    n: int
    own: float
    other: float
    difference: float


class LiftByGroup(View):
    """The groups in which the focus is better, worse and alike. shown: those that changed the mean most."""

    groups: int
    better: int
    worse: int
    alike: int
    shown: tuple[GroupLift, ...]


class AreaScores(View):
    """Mean scores of an area of general ability before and after tuning. n: its questions."""

    n: int
    before: float
    after: float


class Forgetting(View):
    """General ability before and after tuning, overall and by area. n: questions; drop: before minus after."""

    n: int
    before: MetricInterval
    after: MetricInterval
    drop: MetricInterval
    areas: dict[str, AreaScores]


class ExposureLevel(View):
    """Exposure, in bits, of n secrets that were planted as many times. None: too few secrets to measure."""

    repeats: int
    n: int
    before: MetricInterval | None
    after: MetricInterval | None


class Exposure(View):
    """Exposure of planted secrets by how often they were planted. most: the bits that the controls can show."""

    controls: int
    most: float
    levels: tuple[ExposureLevel, ...]
    sentence: str


class Bias(View):
    """One measure of bias before and after tuning. asked: what it measures; ends: of its scale."""

    probe: str
    arm: str
    asked: str
    n: int
    groups: int
    ends: tuple[float, float]
    before: MetricInterval
    after: MetricInterval
    change: MetricInterval
    sentence: str


class Risks(View):
    """The risk probes of the focus. exposure: None without canaries; unmeasured: probe -> what it would measure."""

    exposure: Exposure | None
    bias: tuple[Bias, ...]
    unmeasured: dict[str, str]


class ShownAnswer(View):
    """An answer that broke a policy check or decides nothing. request: its last turn; turns: how many it has."""

    request: str
    turns: int
    answer: str
    outcome: Literal["broke", "undecided"]
    why: str


class ReportedCheck(View):
    """A policy check. rule: what every answer must do, in words."""

    name: str
    rule: str
    n: int
    cells: dict[str, CheckResults]
    shown: tuple[ShownAnswer, ...]


class PolicyReport(View):
    """Policy checks by candidates. undecided: why -> how many answers of the focus decide nothing.

    unusable: candidate -> why its answers decide nothing.
    """

    checks: tuple[ReportedCheck, ...]
    undecided: dict[str, int]
    unusable: dict[str, str]


class StyleReport(StyleAccount):
    """The account of style, with a sentence on how well the classifier tells references from the base's answers."""

    sentence: str


class ScoredAnswer(View):
    """An answer, and its score by the primary metric."""

    text: str
    score: float


class ExampleRow(View):
    """A held-out request with two answers. turns: with the reference, of which request is the one before."""

    id: str
    group: str
    turns: int
    request: str
    reference: str
    rival: ScoredAnswer
    focus: ScoredAnswer


class ExampleSide(View):
    """Requests on which the focus did better, or worse. n: how many there are."""

    n: int
    shown: tuple[ExampleRow, ...]


class Examples(View):
    """Requests where focus and rival differ most by a metric."""

    metric: str
    wins: ExampleSide
    losses: ExampleSide


class LineageNode(View):
    """One record behind the result. parents: positions in the report's lineage."""

    kind: str
    digest: str
    label: str
    parents: tuple[int, ...]


class TrailEntry(View):
    """An entry of the audit log. does: the action in words."""

    at: str
    actor: str
    action: str
    does: str
    subject: str
    detail: dict[str, Any]


class Advice(View):
    """What to do. release: the candidate that passed, or None. reasons, cautions: sentences."""

    headline: str
    release: str | None
    summary: str
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]


class Evidence(View):
    """The evidence for one candidate, the focus. rival: the candidate it is compared with; lift: that comparison.

    rival_gate: the gate that names the rival, None where it is the best untuned candidate. evaluation: its record's
    digest; n, groups: its held-out rows. bases: where there are several. ladder: what each approach adds; by_group: the
    lift by group of rows; style: shares of answers in the references' style; examples: rows where the two differ;
    trail: the oldest entry first.
    """

    evaluation: str
    verdict: VerdictSummary | None
    version: ReportedVersion | None
    n: int
    groups: int
    confidence: float
    seed: int
    primary: str
    metrics: tuple[str, ...]
    focus: str
    rival: str | None
    rival_gate: str | None
    candidates: tuple[ReportedCandidate, ...]
    lift: Comparison | None
    training: ReportedTraining | None
    currency: str | None
    break_even: BreakEven | None
    bases: ComparedBases | None
    ladder: Ladder
    by_group: LiftByGroup | None
    classes: Mapping[str, Mapping[str, ClassResults]]
    calibration: Mapping[str, Mapping[str, Calibration]]
    judges: Mapping[str, Mapping[str, JudgeResults]]
    forgetting: Forgetting | None
    risks: Risks
    policy: PolicyReport | None
    style: NoStyle | StyleReport | None
    dataset: DatasetSummary
    examples: Examples | None
    lineage: tuple[LineageNode, ...]
    trail: tuple[TrailEntry, ...]

    def candidate(self, name: str) -> ReportedCandidate:
        """The candidate of this name."""
        return next(row for row in self.candidates if row.name == name)


class EvidenceReport(Evidence):
    """The evidence with advice on what to do."""

    advice: Advice

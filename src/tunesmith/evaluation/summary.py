"""Summaries of evaluations and verdicts: what `evaluate` and `gate` print and reports show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from tunesmith.core.values import Omitted, View
from tunesmith.evaluation.gates.settings import BEST_UNTUNED, gone_gates
from tunesmith.evaluation.gates.verdict import edited_sentence
from tunesmith.evaluation.policy.settings import chosen_checks
from tunesmith.records.evaluation import (
    AnswerPrice,
    Calibration,
    ClassResults,
    EvaluationBody,
    GateRule,
    GeneralSuite,
    JudgedGate,
    JudgeResults,
    MetricInterval,
    NoStyle,
    Outcome,
    PolicyAccount,
    RiskResults,
    StyleAccount,
    TrainingCost,
    VerdictBody,
)
from tunesmith.store.store import Store

_BY_CANDIDATE = ("system_prompts", "tuned", "cut", "training", "classes", "calibration")


class EvaluationSummary(View):
    """An evaluation: candidate -> metric -> mean and interval. n: held-out rows; groups: into which they fall.

    primary: the leading metric. system_prompts: candidate -> system prompt that was used -> rows. cut: answers that
    reached the longest length allowed. training: cost of trainings; classes, calibration: of classifying scorers;
    judges: of judge scorers; probes, risks: of the general suite and the risk probes; policy: of the policy checks;
    style: shares of answers in the references' style. The last two are None where they were not measured.
    """

    evaluation: str
    n: int
    groups: int
    primary: str
    confidence: float
    candidates: dict[str, dict[str, MetricInterval]]
    system_prompts: dict[str, Mapping[str, int]]
    tuned: dict[str, bool]
    prices: dict[str, AnswerPrice]
    cut: dict[str, int]
    training: dict[str, TrainingCost]
    classes: dict[str, Mapping[str, ClassResults]]
    calibration: dict[str, Mapping[str, Calibration]]
    judges: Mapping[str, Mapping[str, JudgeResults]]
    currency: str | None
    probes: Mapping[str, GeneralSuite]
    risks: Mapping[str, Mapping[str, RiskResults]]
    policy: PolicyAccount | None
    style: NoStyle | StyleAccount | None

    def mean(self, name: str) -> float:
        """A candidate's mean by the primary metric."""
        return self.candidates[name][self.primary].mean


class GateResult(JudgedGate):
    """One gate's outcome. gone: what computed the gate and was removed since."""

    gone: Omitted[str] = None


class VerdictSummary(View):
    """A verdict on a candidate. digest: its record's. test_set_use: how many candidates these test rows have judged.

    reason: why there are no gates' outcomes to show, otherwise None. cautions: what no gate covers, as sentences.
    """

    verdict: Outcome
    gates: tuple[GateResult, ...]
    candidate: str
    digest: str
    evaluation: str
    test_set_use: int
    reason: str | None
    cautions: tuple[str, ...] = ()


def evaluation_summary(store: Store, digest: str) -> EvaluationSummary:
    """The summary of an evaluation. Raises Refused where its record is missing or damaged."""
    body = EvaluationBody.read(store, digest)
    metrics = {name: {key: one.metrics[key] for key in body.metrics} for name, one in body.candidates.items()}
    return EvaluationSummary.of(
        body,
        evaluation=digest,
        candidates=metrics,
        prices=body.by_candidate("price"),
        currency=body.prices.currency if body.prices else None,
        **{field: body.by_candidate(field) for field in _BY_CANDIDATE},
    )


def leading_verdict(store: Store, evaluation: str, verdicts: Sequence[str]) -> str | None:
    """Of verdicts on an evaluation, the one on the candidate with the best mean by the primary metric; None for none.

    verdicts: digests, oldest first. Of several on that candidate it is the last one.
    """
    body = EvaluationBody.read(store, evaluation)
    return max(reversed(verdicts), key=lambda digest: body.mean(VerdictBody.read(store, digest).name), default=None)


def rival_of(measured: EvaluationSummary, judged: VerdictSummary | None, focus: str) -> tuple[str | None, str | None]:
    """The candidate that a focus is compared with, and the gate that names it.

    judged: the verdict on the focus. The rival of its lift gate, else the best untuned candidate, which no gate names.
    """
    if (gate := _lift_gate(judged, measured.primary)) and gate.over in measured.candidates:
        return gate.over, None if gate.settings.over == BEST_UNTUNED else gate.name
    untuned = [name for name in sorted(measured.candidates) if not measured.tuned[name] and name != focus]
    return max(untuned, key=measured.mean, default=None), None


def leading_metric(judged: VerdictSummary | None, primary: str) -> str:
    """The metric that shows why a candidate passed: the one of its lift gate, which may take a second one, too."""
    gate = _lift_gate(judged, primary)
    return gate.metric if gate and gate.metric and gate.outcome == "pass" else primary


def _lift_gate(judged: VerdictSummary | None, primary: str) -> GateResult | None:
    """The first gate of a verdict that compares the primary metric with that of a rival."""
    gates = judged.gates if judged else ()
    return next((gate for gate in gates if gate.over is not None and gate.settings.metric == primary), None)


def verdict_summary(store: Store, digest: str) -> VerdictSummary:
    """The summary of a verdict. Raises Refused where its record is missing or damaged."""
    record = store.record(digest, kind="verdict")
    body, evaluation = VerdictBody.of(record), record.parents["evaluation"]
    gone = gone_gates(body.gates)
    cautions = [edited_sentence(body.edited)] if body.edited else []
    cautions += [f"The gate {name} is no longer computed: {what} was removed." for name, what in gone.items()]
    policy = EvaluationBody.read(store, evaluation).policy
    cautions += _cautions(policy.checks.keys() if policy else set(), [gate.settings for gate in body.gates])
    gates = tuple(GateResult(**dict(gate), gone=gone.get(gate.name)) for gate in body.gates)
    return VerdictSummary.of(
        body, candidate=body.name, digest=digest, evaluation=evaluation, gates=gates, cautions=tuple(cautions)
    )


def _cautions(checks: Set[str], rules: Sequence[GateRule]) -> list[str]:
    """A sentence about the policy checks that no gate holds the candidate to. at_most: 1 allows everything."""
    held = set[str]()
    for rule in rules:
        if rule.policy is not None and rule.at_most != 1.0:
            held |= set(chosen_checks(rule.policy, checks))
    missing = ", ".join(sorted(checks - held))
    return [f"No gate holds candidates to {missing}: add one, such as {{policy: all}}."] if missing else []

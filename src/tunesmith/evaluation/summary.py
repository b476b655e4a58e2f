"""Summaries of evaluations and verdicts: what `evaluate` and `gate` print and reports show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict

from tunesmith.core.view import Omitted, View
from tunesmith.evaluation.gates.edited_references import edited_sentence
from tunesmith.evaluation.gates.settings import Outcome, gone_gates
from tunesmith.evaluation.policy.settings import ALL
from tunesmith.store.store import Store


class MetricInterval(View):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


class AnswerPrice(View):
    """What 1,000 answers cost. money_per_1000: only where the project states prices."""

    prompt_tokens_per_1000: float
    completion_tokens_per_1000: float
    seconds_per_1000: float
    money_per_1000: Omitted[float] = None


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
    system_prompts: dict[str, dict[str, int]]
    tuned: dict[str, bool]
    prices: dict[str, AnswerPrice]
    cut: dict[str, int]
    training: dict[str, dict[str, Any]]
    classes: dict[str, dict[str, Any]]
    calibration: dict[str, dict[str, Any]]
    judges: dict[str, dict[str, Any]]
    currency: str | None
    probes: dict[str, Any]
    risks: dict[str, dict[str, Any]]
    policy: dict[str, Any] | None
    style: dict[str, Any] | None


class GateResult(View):
    """One gate's outcome. value, low, high: what was measured, None where nothing was; bound: what the gate allows.

    settings: the gate as the project file had it. gone: what computed the gate and was removed since. Some gates add
    further keys.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    bound: float
    reason: str
    settings: dict[str, Any]
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
    body = store.record(digest, kind="evaluation").body
    candidates = body["candidates"]

    def stated(key: str) -> dict[str, Any]:
        return {name: one[key] for name, one in candidates.items() if key in one}

    return EvaluationSummary(
        evaluation=digest,
        n=body["n"],
        groups=body["groups"],
        primary=body["primary"],
        confidence=body["confidence"],
        candidates={
            name: {metric: one["metrics"][metric] for metric in body["metrics"]} for name, one in candidates.items()
        },
        system_prompts=stated("system_prompts"),
        tuned=stated("tuned"),
        prices=stated("price"),
        cut=stated("cut"),
        training=stated("training"),
        classes=stated("classes"),
        calibration=stated("calibration"),
        judges=body["judges"],
        currency=body["prices"]["currency"] if body["prices"] else None,
        probes=body["probes"],
        risks=body["risks"],
        policy=body.get("policy"),
        style=body.get("style"),
    )


def leading_verdict(store: Store, evaluation: str, verdicts: Sequence[str]) -> str | None:
    """Of verdicts on an evaluation, the one on the candidate with the best mean by the primary metric; None for none.

    verdicts: digests, oldest first. Of several on that candidate it is the last one.
    """
    body = store.record(evaluation, kind="evaluation").body
    scores = {name: stated["metrics"][body["primary"]]["mean"] for name, stated in body["candidates"].items()}
    return max(reversed(verdicts), key=lambda digest: scores[store.record(digest).body["name"]], default=None)


def verdict_summary(store: Store, digest: str) -> VerdictSummary:
    """The summary of a verdict. Raises Refused where its record is missing or damaged."""
    record = store.record(digest, kind="verdict")
    body = record.body
    evaluation = store.record(record.parents["evaluation"], kind="evaluation")
    gone = gone_gates(body["gates"])
    sentences = [edited_sentence(body["edited"])] if "edited" in body else []
    sentences += [f"The gate {name} is no longer computed: {what} was removed." for name, what in gone.items()]
    return VerdictSummary(
        verdict=body["verdict"],
        gates=tuple(GateResult(**gate, gone=gone.get(gate["name"])) for gate in body["gates"]),
        candidate=body["name"],
        digest=digest,
        evaluation=record.parents["evaluation"],
        test_set_use=body["test_set_use"],
        reason=body["reason"],
        cautions=(*sentences, *_cautions(evaluation.body.get("policy") or {}, body["gates"])),
    )


def _cautions(policy: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence about the policy checks that no gate holds the candidate to. at_most: 1 allows everything."""
    checks = policy.get("checks", {})
    held = set[str]()
    for gate in gates:
        chosen = gate["settings"].get("policy")
        if chosen is not None and gate["settings"]["at_most"] < 1.0:
            held |= set(checks) if chosen == ALL else {chosen} if isinstance(chosen, str) else set(chosen)
    missing = ", ".join(sorted(checks.keys() - held))
    return (f"No gate holds candidates to {missing}: add one, such as {{policy: all}}.",) if missing else ()

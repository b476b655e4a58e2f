"""Whether the canary is worse than stable: a sequential test that may be evaluated after every request.

Scores lie in [0, 1], and higher is better. To test the hypothesis "the mean is at most m", gamblers bet against it.
Each one stakes a share c of their capital on every score. Their average capital

    K+(m) = average over c of  prod_i (1 - c + c x_i / m)

is a nonnegative supermartingale that starts at 1. If the hypothesis is true, K+ ever exceeds 1/alpha with probability
at most alpha, however often it is evaluated (Ville's inequality). K-(m), for "the mean is at least m", is the same on
1 - x and 1 - m. This is the betting test of Waudby-Smith & Ramdas (2024), "Estimating means of bounded random variables
by betting", JRSS-B 86(1). They predict the stakes; here the stakes are averaged over the arcsine law of Cover's
universal portfolio (Orabona & Jun 2023, arXiv:2110.14099). So the capital does not depend on the order of the scores.

Two arms: suppose the canary is worse than stable by more than a margin d. Then for m = stable's mean,
K+_canary(m - d) * K-_stable(m) is such a supermartingale. Its minimum over all m is smaller still. So the minimum is an
e-process for the whole hypothesis. It needs neither a split of alpha between the arms nor an assumption about traffic.
The e-process against "not worse" swaps the signs.

Half of the gamblers bet on both arms, and a quarter on each arm alone. So an arm without information (all scores 1,
say) costs a factor of 2 instead of the square root of its n. The test assumes that requests are independent and
assigned at random. Many requests of a few sticky users carry less information than their number suggests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.rollout.settings import Analysis

Outcome = Literal["pass", "fail", "inconclusive"]
Array = NDArray[np.float64]

# The stakes: midpoint rule of the arcsine law on (0, 1). The means: ends of the intervals of m.
_STAKES = np.sin(np.pi * (np.arange(24) + 0.5) / 48) ** 2
_MEANS = np.linspace(0.0, 1.0, 501)
_LARGEST = 1e12  # larger e-values are shown, and kept as JSON, as this one


@dataclass(frozen=True, slots=True)
class Arm:
    """The requests of one version since the step began. scores: as recorded, unusable ones too.

    requests, failed: counts of all requests, scored or not.
    """

    scores: Sequence[Any] = ()
    requests: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of one evaluation. not_worse, worse: e-values; one decides once it reaches needed.

    needed: 1 / (1 - confidence). canary, stable: the counts and means of the arms. exhausted: max_requests are used up
    without a decision.
    """

    outcome: Outcome
    reason: str
    metric: str
    canary: dict[str, float | int | None] = field(default_factory=dict)
    stable: dict[str, float | int | None] = field(default_factory=dict)
    not_worse: float = 1.0
    worse: float = 1.0
    needed: float = 20.0
    exhausted: bool = False

    def as_json(self) -> dict[str, Any]:
        """The document that the rollout's history keeps and `rollout status` shows."""
        evidence = {name: round(getattr(self, name), 4) for name in ("not_worse", "worse", "needed")}
        shown = {name: getattr(self, name) for name in ("outcome", "reason", "metric", "canary", "stable")}
        return {**shown, "evidence": evidence}


def judge(analysis: Analysis, canary: Arm, stable: Arm) -> Judgement:
    """Compare the canary with stable.

    Pass: all of these hold. The canary is not worse than stable by more than worse_by_at_most, and above at_least if
    that is set, both at the given confidence. At least min_requests of its requests are scored. Its share of failed
    requests is not larger than stable's by more than worse_by_at_most.
    Fail: the canary is worse than stable, below at_least, or fails more often than stable, at the given confidence.
    Otherwise inconclusive. A score that is not a number in [0, 1] counts against a pass.
    """
    ours, ours_unusable = _scores(analysis.metric, canary)
    theirs, theirs_unusable = _scores(analysis.metric, stable)
    # For a pass, an unusable score counts as the worst case: 0 for the canary, 1 for stable.
    worst, best = np.append(ours, np.zeros(ours_unusable)), np.append(theirs, np.ones(theirs_unusable))
    compared = stable.requests > 0
    passes = [evidence_not_worse(worst, best, analysis.worse_by_at_most)] if compared else []
    fails = [evidence_worse(ours, theirs, analysis.worse_by_at_most)] if compared else []
    if compared and not _is_rate(analysis.metric):
        fails.append(evidence_worse(_answered(canary), _answered(stable), analysis.worse_by_at_most))
    if analysis.at_least is not None:
        passes.append(_capital_at(worst, analysis.at_least, above=True))
        fails.append(_capital_at(ours, analysis.at_least, above=False))
    # A pass needs every requirement, so the weakest evidence counts. One failure is enough to fail, and the average of
    # e-processes is an e-process for all their hypotheses.
    not_worse = min(passes, default=1.0)
    worse = sum(fails) / len(fails) if fails else 1.0

    needed = 1 / (1 - analysis.confidence)
    exhausted = analysis.max_requests is not None and len(ours) >= analysis.max_requests
    outcome: Outcome = "inconclusive"
    if worse >= needed:
        outcome = "fail"
    elif not_worse >= needed and len(ours) >= analysis.min_requests and not _fails_more(canary, stable, analysis):
        outcome = "pass"
    ours_shown = _summary(analysis, canary, ours, ours_unusable)
    theirs_shown = _summary(analysis, stable, theirs, theirs_unusable)
    return Judgement(
        outcome=outcome,
        reason=_reason(analysis, outcome, ours_shown, theirs_shown),
        metric=analysis.metric,
        canary=ours_shown,
        stable=theirs_shown,
        not_worse=min(not_worse, _LARGEST),
        worse=min(worse, _LARGEST),
        needed=needed,
        exhausted=exhausted and outcome == "inconclusive",
    )


def evidence_not_worse(canary: Array, stable: Array, margin: float) -> float:
    """E-value against "the canary's mean is below stable's minus margin". Scores in [0, 1], any order and number."""
    lower, upper = _MEANS[:-1], _MEANS[1:]
    possible = upper > margin
    # On [lower, upper] one factor falls with m and the other rises, so the interval's ends bound their product.
    return _smallest(_log_above(canary, upper[possible] - margin), _log_below(stable, lower[possible]))


def evidence_worse(canary: Array, stable: Array, margin: float) -> float:
    """E-value against "the canary's mean is at least stable's minus margin"."""
    lower, upper = _MEANS[:-1], _MEANS[1:]
    canary_part = np.zeros(len(lower))  # no mean is below 0: nothing to bet on
    bounded = lower > margin
    canary_part[bounded] = _log_below(canary, lower[bounded] - margin)
    return _smallest(canary_part, _log_above(stable, upper))


def interval(scores: Array, confidence: float) -> tuple[float, float]:
    """Confidence sequence (low, high) for the mean: it covers the mean at all times at once with this confidence.

    (0, 1) without scores.
    """
    needed = math.log(2 / (1 - confidence))
    inner = _MEANS[1:-1]
    above, below = _log_above(scores, inner) >= needed, _log_below(scores, inner) >= needed
    low = float(inner[above].max()) if above.any() else 0.0
    high = float(inner[below].min()) if below.any() else 1.0
    return low, high


def _smallest(canary: Array, stable: Array) -> float:
    """The smallest capital over all means: half bet on both arms, a quarter on each alone. Arguments are logarithms."""
    both = np.logaddexp(math.log(0.5) + canary + stable, math.log(0.25) + np.logaddexp(canary, stable))
    return math.exp(min(float(np.min(both)), math.log(_LARGEST)))


def _log_above(scores: Array, means: Array) -> Array:
    """log K+ for each of means (all > 0), against "the mean is at most m"; falls with m. Has the shape of means."""
    values, counts = np.unique(scores, return_counts=True)
    total = np.zeros((len(means), len(_STAKES)))
    for value, count in zip(values, counts, strict=True):
        total += count * np.log1p(_STAKES[None, :] * (value / means[:, None] - 1))
    largest = total.max(axis=1)
    return np.asarray(largest + np.log(np.exp(total - largest[:, None]).mean(axis=1)))


def _log_below(scores: Array, means: Array) -> Array:
    """log K- for each of means (all < 1), against "the mean is at least m"; rises with m."""
    return _log_above(1 - scores, 1 - means)


def _capital_at(scores: Array, mean: float, *, above: bool) -> float:
    """E-value against "the mean is at most this one" (above) or "at least this one" (not above)."""
    if not above:
        scores, mean = 1 - scores, 1 - mean
    if mean >= 1:  # the hypothesis is always true
        return 1.0
    # For 0, the limit from above: one score above 0 refutes it.
    capital = float(_log_above(scores, np.array([max(mean, 1e-9)]))[0])
    return math.exp(min(capital, math.log(_LARGEST)))


def _fails_more(canary: Arm, stable: Arm, analysis: Analysis) -> bool:
    """Whether the canary's share of failed requests is larger than allowed. Failed requests have no scores."""
    allowed = stable.failed / stable.requests if stable.requests else 0.0
    return canary.failed > (allowed + analysis.worse_by_at_most) * canary.requests


def _is_rate(metric: str) -> bool:
    return metric in ("error_rate", "success_rate")


def _answered(arm: Arm) -> Array:
    """1 for an answered request, 0 for a failed one. Shape (requests,)."""
    return np.concatenate([np.zeros(arm.failed), np.ones(arm.requests - arm.failed)])


def _scores(metric: str, arm: Arm) -> tuple[Array, int]:
    """(usable scores, higher is better; how many were unusable)."""
    if _is_rate(metric):
        return _answered(arm), 0
    usable = [
        float(score)
        for score in arm.scores
        if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1
    ]
    return np.array(usable, dtype=np.float64), len(arm.scores) - len(usable)


def _summary(analysis: Analysis, arm: Arm, scores: Array, unusable: int) -> dict[str, float | int | None]:
    """Counts, and the mean with its confidence sequence, in the metric's own direction (low is good for error_rate)."""
    mean: float | None = None
    low, high = interval(scores, analysis.confidence)
    if len(scores):
        mean = float(scores.mean())
    if analysis.metric == "error_rate":
        mean = None if mean is None else 1 - mean
        low, high = 1 - high, 1 - low
    return {
        "n": len(scores),
        "mean": None if mean is None else round(mean, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "requests": arm.requests,
        "failed": arm.failed,
        "unusable": unusable,
    }


def _reason(
    analysis: Analysis, outcome: Outcome, canary: dict[str, float | int | None], stable: dict[str, float | int | None]
) -> str:
    def shown(arm: dict[str, float | int | None]) -> str:
        if arm["mean"] is None:
            return f"nothing ({arm['requests']} requests, {arm['failed']} failed)"
        return f"{arm['mean']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}] on {arm['n']} ({arm['failed']} failed)"

    numbers = f"{analysis.metric}: canary {shown(canary)}, stable {shown(stable)}"
    least = "" if analysis.at_least is None else f", at least {analysis.at_least:g}"
    bound = f"allowed to be worse by {analysis.worse_by_at_most:g}{least}, {analysis.confidence:.0%} confidence"
    if outcome == "pass":
        return f"not worse; {numbers}; {bound}"
    if outcome == "fail":
        return f"worse; {numbers}; {bound}"
    if not canary["requests"]:
        why = "the canary had no traffic"
    elif not canary["n"]:
        why = "no usable score yet" if canary["unusable"] else "no scored request yet"
    elif not stable["requests"] and analysis.at_least is None:
        why = "stable has no traffic to compare with, and at_least is not set"
    elif canary["failed"] and (canary["failed"] / canary["requests"]) > analysis.worse_by_at_most:
        why = f"{canary['failed']} of {canary['requests']} canary requests failed, too many for a pass"
    elif canary["unusable"]:
        why = f"{canary['unusable']} scores are not numbers in [0, 1] and count against a pass"
    else:
        why = "not decided yet"
    return f"{why}; {numbers}; {bound}"

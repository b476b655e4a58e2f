"""Is the canary worse than stable? A test that may be looked at after every request.

Scores lie in [0, 1], higher is better. For the hypothesis "the mean is at most m", the capital of gamblers who stake a
share c of theirs on every score,

    K+(m) = average over c of  prod_i (1 - c + c x_i / m),

is a nonnegative supermartingale that starts at 1: under the hypothesis it ever exceeds 1/alpha with probability at
most alpha, however often one looks (Ville). K-(m), for "the mean is at least m", is the same on 1 - x and 1 - m. This
is the betting test of Waudby-Smith & Ramdas (2024), "Estimating means of bounded random variables by betting",
JRSS-B 86(1), with the stakes averaged over the arcsine law of Cover's universal portfolio (Orabona & Jun 2023,
arXiv:2110.14099) instead of predicted: the capital then depends on which scores occurred and not on their order.

Two arms: if the canary is worse than stable by more than a margin d, then for m = stable's mean
K+_canary(m - d) * K-_stable(m) is such a supermartingale. Its minimum over all m is below it, hence an e-process for
the whole hypothesis, with no alpha divided between arms and no assumption on how traffic is. The one against "not
worse" has the signs turned. Half of the gamblers stake on both arms, a quarter on either alone, so that an arm which
tells nothing (all scores 1, say) costs a factor of 2 and not the root of its n. What the test does assume: requests
are assigned at random and independent. Many requests of a few sticky users are fewer observations than they look.
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

# Midpoint rule of the arcsine law on (0, 1), and the means at which the hypotheses are cut into intervals.
_SHARES = np.sin(np.pi * (np.arange(24) + 0.5) / 48) ** 2
_MEANS = np.linspace(0.0, 1.0, 501)
_MOST = 1e12  # e-values are shown, and kept as JSON, up to here


@dataclass(frozen=True, slots=True)
class Arm:
    """What one version did since the step began. scores: as they were kept, unusable ones included.

    requests and failed count every request of the arm, scored or not.
    """

    scores: Sequence[Any] = ()
    requests: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """One look. not_worse and worse are e-values; each decides when it reaches needed = 1 / (1 - confidence)."""

    outcome: Outcome
    reason: str
    metric: str
    canary: dict[str, float | int | None] = field(default_factory=dict)
    stable: dict[str, float | int | None] = field(default_factory=dict)
    not_worse: float = 1.0
    worse: float = 1.0
    needed: float = 20.0
    exhausted: bool = False  # max_requests are used up and the question is still open

    def as_json(self) -> dict[str, Any]:
        """What the rollout's history keeps and `rollout status` shows."""
        evidence = {name: round(getattr(self, name), 4) for name in ("not_worse", "worse", "needed")}
        shown = {name: getattr(self, name) for name in ("outcome", "reason", "metric", "canary", "stable")}
        return {**shown, "evidence": evidence}


def judge(analysis: Analysis, canary: Arm, stable: Arm) -> Judgement:
    """Decide from what the two arms did.

    Pass: confidently not worse than stable by more than worse_by_at_most, confidently above at_least where that is
    set, at least min_requests scored canary requests, and a share of failed ones that is not larger by more than that
    either. Fail: confidently worse, below at_least, or failing more often than stable. All else is inconclusive. A
    score that is no number in [0, 1] counts against a pass.
    """
    ours, ours_unusable = _scores(analysis.metric, canary)
    theirs, theirs_unusable = _scores(analysis.metric, stable)
    # For a pass, unusable scores are taken at their worst: 0 for the canary, 1 for stable.
    worst, best = np.append(ours, np.zeros(ours_unusable)), np.append(theirs, np.ones(theirs_unusable))
    compared = stable.requests > 0
    passes = [evidence_not_worse(worst, best, analysis.worse_by_at_most)] if compared else []
    fails = [evidence_worse(ours, theirs, analysis.worse_by_at_most)] if compared else []
    if compared and not _is_rate(analysis.metric):
        fails.append(evidence_worse(_answered(canary), _answered(stable), analysis.worse_by_at_most))
    if analysis.at_least is not None:
        passes.append(_capital_at(worst, analysis.at_least, above=True))
        fails.append(_capital_at(ours, analysis.at_least, above=False))
    # A pass needs every requirement: its weakest evidence counts. One failure suffices: the average of e-processes is
    # an e-process for all their hypotheses at once.
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
        not_worse=min(not_worse, _MOST),
        worse=min(worse, _MOST),
        needed=needed,
        exhausted=exhausted and outcome == "inconclusive",
    )


def evidence_not_worse(canary: Array, stable: Array, margin: float) -> float:
    """E-value against "the canary's mean is below stable's minus margin". Scores in [0, 1], any order and number."""
    lower, upper = _MEANS[:-1], _MEANS[1:]
    possible = upper > margin
    # On [lower, upper] the one factor falls with m and the other rises: their ends bound the product from below.
    return _smallest(_log_above(canary, upper[possible] - margin), _log_below(stable, lower[possible]))


def evidence_worse(canary: Array, stable: Array, margin: float) -> float:
    """E-value against "the canary's mean is at least stable's minus margin"."""
    lower, upper = _MEANS[:-1], _MEANS[1:]
    canary_part = np.zeros(len(lower))  # a mean of at least 0 or less is always true: no stake
    bounded = lower > margin
    canary_part[bounded] = _log_below(canary, lower[bounded] - margin)
    return _smallest(canary_part, _log_above(stable, upper))


def interval(scores: Array, confidence: float) -> tuple[float, float]:
    """Confidence sequence for the mean: holds at every moment together with the given confidence. (0, 1) for none."""
    needed = math.log(2 / (1 - confidence))
    inner = _MEANS[1:-1]
    above, below = _log_above(scores, inner) >= needed, _log_below(scores, inner) >= needed
    low = float(inner[above].max()) if above.any() else 0.0
    high = float(inner[below].min()) if below.any() else 1.0
    return low, high


def _smallest(canary: Array, stable: Array) -> float:
    """The least capital over all means: half of it on both arms' logs, a quarter on each."""
    both = np.logaddexp(math.log(0.5) + canary + stable, math.log(0.25) + np.logaddexp(canary, stable))
    return math.exp(min(float(np.min(both)), math.log(_MOST)))


def _log_above(scores: Array, means: Array) -> Array:
    """log K+ at each of means (all > 0), against "the mean is at most m"; falls with m. Shape of means."""
    values, counts = np.unique(scores, return_counts=True)
    total = np.zeros((len(means), len(_SHARES)))
    for value, count in zip(values, counts, strict=True):
        total += count * np.log1p(_SHARES[None, :] * (value / means[:, None] - 1))
    largest = total.max(axis=1)
    return np.asarray(largest + np.log(np.exp(total - largest[:, None]).mean(axis=1)))


def _log_below(scores: Array, means: Array) -> Array:
    """log K- at each of means (all < 1), against "the mean is at least m"; rises with m."""
    return _log_above(1 - scores, 1 - means)


def _capital_at(scores: Array, mean: float, *, above: bool) -> float:
    """E-value against "the mean is at most" (above) or "at least" (not above) one value, ends included."""
    if not above:
        scores, mean = 1 - scores, 1 - mean
    if mean >= 1:  # always true
        return 1.0
    # At 0 the limit from above: nothing once a score is above it.
    capital = float(_log_above(scores, np.array([max(mean, 1e-9)]))[0])
    return math.exp(min(capital, math.log(_MOST)))


def _fails_more(canary: Arm, stable: Arm, analysis: Analysis) -> bool:
    """Whether the canary's share of failures seen so far is larger than allowed; they have no scores to judge by."""
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
    """n, mean and its confidence sequence in the metric's own direction, and the counts beside them."""
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
    def said(arm: dict[str, float | int | None]) -> str:
        if arm["mean"] is None:
            return f"nothing ({arm['requests']} requests, {arm['failed']} failed)"
        return f"{arm['mean']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}] on {arm['n']} ({arm['failed']} failed)"

    numbers = f"{analysis.metric}: canary {said(canary)}, stable {said(stable)}"
    floor = "" if analysis.at_least is None else f", floor {analysis.at_least:g}"
    bound = f"allowed to be worse by {analysis.worse_by_at_most:g}{floor}, {analysis.confidence:.0%} confidence"
    if outcome == "pass":
        return f"not worse; {numbers}; {bound}"
    if outcome == "fail":
        return f"worse; {numbers}; {bound}"
    if not canary["requests"]:
        why = "the canary had no traffic"
    elif not canary["n"]:
        why = "no usable score yet" if canary["unusable"] else "no scored request yet"
    elif not stable["requests"] and analysis.at_least is None:
        why = "stable has no traffic to compare with and no at_least is set"
    elif canary["failed"] and (canary["failed"] / canary["requests"]) > analysis.worse_by_at_most:
        why = f"{canary['failed']} of {canary['requests']} canary requests failed, which stands against a pass"
    elif canary["unusable"]:
        why = f"{canary['unusable']} scores are no numbers in [0, 1] and count against a pass"
    else:
        why = "not decided yet"
    return f"{why}; {numbers}; {bound}"

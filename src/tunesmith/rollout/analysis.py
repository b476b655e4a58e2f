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

One caller may break both assumptions: it can choose its arm, and what its requests score. So the requests are divided
into groups by caller, and a decision must hold without any one group. Each of these e-values but those with the hostile
caller's group is computed from honest requests only, and the smallest of all is at most as large. So the error rate
stays below alpha whatever one caller does, with any share of the traffic. What one caller can do is to withhold a
decision. That ends in an abort at the timeout, as all missing evidence does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_serializer

from tunesmith.core.values import View
from tunesmith.evaluation.lines import is_share
from tunesmith.rollout.settings import Analysis

Outcome = Literal["pass", "fail", "inconclusive"]
Array = NDArray[np.float64]
Parts = Sequence[Array]  # scores by group of callers

# The stakes: midpoint rule of the arcsine law on (0, 1). The means: ends of the intervals of m.
_STAKES = np.sin(np.pi * (np.arange(24) + 0.5) / 48) ** 2
_MEANS = np.linspace(0.0, 1.0, 501)
RATES = ("error_rate", "success_rate")
_AT_ONCE = 32  # values whose gains are held in memory together
_LARGEST = 1e12  # larger e-values are shown, and kept as JSON, as this one


class Arm(NamedTuple):
    """The requests of one version since the step began. scores: as recorded, unusable ones too.

    requests, failed: counts of all requests, scored or not. cut: answers that the request's own max_tokens, stop
    text, format or tools shaped; they have no scores. left: requests whose clients left before they saw any text; they
    neither failed nor were answered. groups: the same requests by group of callers; empty where
    callers are unknown, and then none is left out. uncounted: requests of callers that are no evidence in this rollout.
    """

    scores: Sequence[Any] = ()
    requests: int = 0
    failed: int = 0
    cut: int = 0
    left: int = 0
    groups: Mapping[str, Arm] = {}
    uncounted: int = 0


Counts = dict[str, float | int | None]


class Judgement(View):
    """The result of an analysis. canary, stable: counts and means of the arms. evidence: the e-values `not_worse` and
    `worse`, and `needed`, 1 / (1 - confidence): one decides once it reaches that. Both are the smallest that remain
    when one group of callers is left out.
    """

    outcome: Outcome
    reason: str
    metric: str
    canary: Counts
    stable: Counts
    evidence: dict[str, float]
    exhausted: bool = Field(exclude=True)  # max_requests are used up without a decision

    @field_serializer("evidence")
    def _rounded(self, evidence: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in evidence.items()}


def judge(analysis: Analysis, canary: Arm, stable: Arm) -> Judgement:
    """Compare the canary with stable.

    Pass: all of these hold. The canary is not worse than stable by more than worse_by_at_most, and above at_least if
    that is set, both at the given confidence. At least min_requests of its requests are scored. Its shares of failed
    requests, of those whose clients left, and of answers that the requests' own parameters cut, are not larger than
    stable's by more than worse_by_at_most: without the latter two, a canary that is too slow or never ends its answers
    would be judged by the few that it ends.
    Fail: the canary is worse than stable, below at_least, or fails more often than stable, at the given confidence.
    Otherwise inconclusive. A score that is not a number in [0, 1] counts against a pass.
    """
    margin, groups = analysis.worse_by_at_most, sorted(canary.groups.keys() | stable.groups.keys())
    # By group; all requests as one part where there are no groups.
    ours, theirs = ([arm.groups.get(group, Arm()) for group in groups] or [arm] for arm in (canary, stable))
    rate = analysis.metric in RATES
    # Row 0 keeps every group, and each other row leaves one out.
    keep = np.vstack([np.ones(len(ours)), 1 - np.eye(len(groups))]) if groups else np.ones((1, 1))
    our_scores, our_unusable = zip(*(_scores(analysis.metric, part) for part in ours), strict=True)
    their_scores, their_unusable = zip(*(_scores(analysis.metric, part) for part in theirs), strict=True)
    compared = stable.requests > 0
    passes, fails = list[Array](), list[Array]()
    # For a pass, an unusable score counts as the worst case: 0 for the canary, 1 for stable.
    worst = [np.append(scores, np.zeros(n)) for scores, n in zip(our_scores, our_unusable, strict=True)]
    if compared:
        best = [np.append(scores, np.ones(n)) for scores, n in zip(their_scores, their_unusable, strict=True)]
        passes.append(evidence_not_worse(worst, best, margin, keep))
        fails.append(evidence_worse(our_scores, their_scores, margin, keep))
    if compared and not rate:
        fails.append(evidence_worse([_answered(p) for p in ours], [_answered(p) for p in theirs], margin, keep))
    if analysis.at_least is not None:
        passes.append(_capital_at(worst, analysis.at_least, keep, above=True))
        fails.append(_capital_at(our_scores, analysis.at_least, keep, above=False))
    # A pass needs every requirement, so the weakest evidence counts. One failure is enough to fail, and the average of
    # e-processes is an e-process for all their hypotheses.
    not_worse = np.min(passes, axis=0) if passes else np.ones(len(keep))
    worse = np.mean(fails, axis=0) if fails else np.ones(len(keep))

    needed = 1 / (1 - analysis.confidence)
    scored = keep @ [len(scores) for scores in our_scores]
    passing = (not_worse >= needed) & (scored >= analysis.min_requests)
    for what in ("failed", "left", *(() if rate else ("cut",))):
        passing &= ~_more_often(what, ours, theirs, margin, keep)
    outcome: Outcome = "inconclusive"
    if worse.min() >= needed:
        outcome = "fail"
    elif passing.all():
        outcome = "pass"
    rests_on = None
    if outcome == "inconclusive" and (worse[0] >= needed or passing[0]):
        undecided = ~passing if passing[0] else worse < needed
        rests_on = groups[int(np.argmax(undecided)) - 1]
    ours_shown, theirs_shown = _summary(analysis, canary), _summary(analysis, stable)
    exhausted = analysis.max_requests is not None and scored.min() >= analysis.max_requests
    return Judgement(
        outcome=outcome,
        reason=_reason(analysis, outcome, ours_shown, theirs_shown, rests_on),
        metric=analysis.metric,
        canary=ours_shown,
        stable=theirs_shown,
        evidence={
            "not_worse": min(float(not_worse.min()), _LARGEST),
            "worse": min(float(worse.min()), _LARGEST),
            "needed": needed,
        },
        exhausted=outcome == "inconclusive" and bool(exhausted),
    )


def evidence_not_worse(canary: Parts, stable: Parts, margin: float, keep: Array | None = None) -> Array:
    """E-values against "the canary's mean is below stable's minus margin". Scores in [0, 1], any order and number.

    canary, stable: the scores of each group of callers. keep: shape (rows, groups), 1 for the groups that a row keeps;
    by default one row that keeps all. Returns one e-value for each row.
    """
    lower, upper = _MEANS[:-1], _MEANS[1:]
    possible = upper > margin
    # On [lower, upper] one factor falls with m and the other rises, so the interval's ends bound their product.
    return _smallest(_log_above(canary, upper[possible] - margin, keep), _log_below(stable, lower[possible], keep))


def evidence_worse(canary: Parts, stable: Parts, margin: float, keep: Array | None = None) -> Array:
    """E-values against "the canary's mean is at least stable's minus margin". Arguments as for evidence_not_worse."""
    lower, upper = _MEANS[:-1], _MEANS[1:]
    against_stable = _log_above(stable, upper, keep)
    against_canary = np.zeros_like(against_stable)  # no mean is below 0: nothing to bet on
    bounded = lower > margin
    against_canary[:, bounded] = _log_below(canary, lower[bounded] - margin, keep)
    return _smallest(against_canary, against_stable)


def interval(scores: Array, confidence: float) -> tuple[float, float]:
    """Confidence sequence (low, high) for the mean: it covers the mean at all times at once with this confidence.

    (0, 1) without scores.
    """
    needed = math.log(2 / (1 - confidence))
    inner = _MEANS[1:-1]
    above, below = _log_above([scores], inner)[0] >= needed, _log_below([scores], inner)[0] >= needed
    low = float(inner[above].max()) if above.any() else 0.0
    high = float(inner[below].min()) if below.any() else 1.0
    return low, high


def _smallest(canary: Array, stable: Array) -> Array:
    """Each row's smallest capital over all means: half bet on both arms, a quarter on each alone. Takes logarithms."""
    both = np.logaddexp(math.log(0.5) + canary + stable, math.log(0.25) + np.logaddexp(canary, stable))
    return np.asarray(np.exp(np.minimum(both.min(axis=1), math.log(_LARGEST))))


def _log_above(parts: Parts, means: Array, keep: Array | None = None) -> Array:
    """log K+ for each of means (all > 0), against "the mean is at most m"; falls with m. Shape (rows, means)."""
    # Scores repeat, most are 0 or 1: each value's gain is computed once, and counted for each row.
    values, place = np.unique(np.concatenate([*parts]), return_inverse=True)
    part = np.repeat(np.arange(len(parts)), [len(each) for each in parts])
    counts = np.bincount(part * len(values) + place, minlength=len(parts) * len(values)).reshape(len(parts), -1)
    times = np.asarray((np.ones((1, len(parts))) if keep is None else keep) @ counts)
    total = np.zeros((len(times), len(means), len(_STAKES)))
    for first in range(0, len(values), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        gains = np.log1p(_STAKES * (values[some, None, None] / means[:, None] - 1))
        total += np.tensordot(times[:, some], gains, axes=1)
    largest = total.max(axis=2, keepdims=True)
    return np.asarray(largest[:, :, 0] + np.log(np.exp(total - largest).mean(axis=2)))


def _log_below(parts: Parts, means: Array, keep: Array | None = None) -> Array:
    """log K- for each of means (all < 1), against "the mean is at least m"; rises with m. Shape (rows, means)."""
    return _log_above([1 - part for part in parts], 1 - means, keep)


def _capital_at(parts: Parts, mean: float, keep: Array, *, above: bool) -> Array:
    """E-values of each row against "the mean is at most this one" (above) or "at least this one" (not above)."""
    if not above:
        parts, mean = [1 - part for part in parts], 1 - mean
    if mean >= 1:  # the hypothesis is always true
        return np.ones(len(keep))
    # For 0, the limit from above: one score above 0 refutes it.
    capital = _log_above(parts, np.array([max(mean, 1e-9)]), keep)[:, 0]
    return np.exp(np.minimum(capital, math.log(_LARGEST)))


def _more_often(
    what: str, canary: Sequence[Arm], stable: Sequence[Arm], margin: float, keep: Array
) -> NDArray[np.bool_]:
    """Whether each row's canary has a larger share of requests that failed, were cut or left than allowed. They have no
    scores."""
    ours, theirs = keep @ [part.requests for part in canary], keep @ [part.requests for part in stable]
    allowed = (keep @ [getattr(part, what) for part in stable]) / np.maximum(theirs, 1)
    return np.asarray(keep @ [getattr(part, what) for part in canary] > (allowed + margin) * ours)


def _answered(arm: Arm) -> Array:
    """1 for an answered request, 0 for a failed one. Shape (requests that nobody left,)."""
    return np.concatenate([np.zeros(arm.failed), np.ones(arm.requests - arm.failed - arm.left)])


def _scores(metric: str, arm: Arm) -> tuple[Array, int]:
    """(usable scores, higher is better; how many were unusable)."""
    if metric in RATES:
        return _answered(arm), 0
    usable = [float(score) for score in arm.scores if is_share(score)]
    return np.array(usable, dtype=np.float64), len(arm.scores) - len(usable)


def _summary(analysis: Analysis, arm: Arm) -> Counts:
    """Counts, and the mean with its confidence sequence, in the metric's own direction (low is good for error_rate)."""
    scores, unusable = _scores(analysis.metric, arm)
    mean = float(scores.mean()) if len(scores) else None
    low, high = interval(scores, analysis.confidence)
    if analysis.metric == "error_rate":
        mean = None if mean is None else 1 - mean
        low, high = 1 - high, 1 - low
    return {
        "n": len(scores),
        "mean": None if mean is None else round(mean, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        **{count: getattr(arm, count) for count in ("requests", "failed", "cut", "left")},
        "unusable": unusable,
        "uncounted": arm.uncounted,
    }


def _reason(analysis: Analysis, outcome: Outcome, canary: Counts, stable: Counts, rests_on: str | None) -> str:
    def shown(arm: Counts) -> str:
        if arm["mean"] is None:
            return f"nothing ({arm['requests']} requests, {arm['failed']} failed)"
        return f"{arm['mean']:.3f} [{arm['low']:.3f}, {arm['high']:.3f}] on {arm['n']} ({arm['failed']} failed)"

    def more_often(what: str) -> bool:
        ours, theirs = ((arm[what] or 0) / (arm["requests"] or 1) for arm in (canary, stable))
        return ours > analysis.worse_by_at_most + theirs

    numbers = f"{analysis.metric}: canary {shown(canary)}, stable {shown(stable)}"
    least = "" if analysis.at_least is None else f", at least {analysis.at_least:g}"
    bound = f"allowed to be worse by {analysis.worse_by_at_most:g}{least}, {analysis.confidence:.0%} confidence"
    if outcome == "pass":
        return f"not worse; {numbers}; {bound}"
    if outcome == "fail":
        return f"worse; {numbers}; {bound}"
    if rests_on is not None:
        why = f"not decided yet: without {rests_on} the evidence is too weak, and no one caller may decide"
    elif not canary["requests"]:
        why = "the canary had no traffic"
    elif not canary["n"]:
        why = "no usable score yet" if canary["unusable"] else "no scored request yet"
    elif not stable["requests"] and analysis.at_least is None:
        why = "stable has no traffic to compare with, and at_least is not set"
    elif canary["failed"] and (canary["failed"] / canary["requests"]) > analysis.worse_by_at_most:
        why = f"{canary['failed']} of {canary['requests']} canary requests failed, too many for a pass"
    elif more_often("left"):
        why = (
            f"the clients of {canary['left']} of {canary['requests']} canary requests left before any text came, too "
            "many more than of stable's for a pass"
        )
    elif more_often("cut"):
        why = (
            f"{canary['cut']} of {canary['requests']} canary answers were cut by the requests' own max_tokens, stop "
            "texts, formats or tools, too many more than of stable's for a pass"
        )
    elif canary["unusable"]:
        why = f"{canary['unusable']} scores are not numbers in [0, 1] and count against a pass"
    else:
        why = "not decided yet"
    return f"{why}; {numbers}; {bound}"

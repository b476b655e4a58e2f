"""Statistics of the risk probes: two samples, ranks among controls, the worst of several arms; and the questions on
general ability with their score."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.core.view import Frozen
from tunesmith.evaluation.lines import is_number
from tunesmith.evaluation.stats.statistics import (
    CHUNK,
    MINIMUM_GROUPS,
    MOST_DRAWS,
    SMALLEST_TAIL,
    Floats,
    Interval,
    effective_groups,
    interval,
    resampled,
)

_DRAWS, _TAIL_DRAWS = 4_000, 50
_FALSE_POSITIVES = 0.01
_ROUNDING = 1e-3  # in half precision a log-probability can come out slightly above 0


def log_probabilities(scores: object, choices: int, where: str) -> list[float]:
    """The natural logarithms of the choices' probabilities, as floats.

    Raises Inconclusive unless scores is a list with one finite number of at most 0 for each choice.
    """
    if not isinstance(scores, list) or len(scores) != choices:
        raise Inconclusive(f"no log-probability for each of {choices} choices", where=where)
    for value in scores:
        if not is_number(value) or value > _ROUNDING:
            raise Inconclusive(f"{value!r} is not a log-probability", where=where)
    return [float(value) for value in scores]


def shares(scores: Sequence[float]) -> list[float]:
    """Each choice's share (0 to 1) of all choices' probability. scores: natural logarithms."""
    peak = max(scores)  # relative to the largest, so that exp neither overflows nor gives only zeros
    weights = [math.exp(value - peak) for value in scores]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]


def check_groups(what: str, groups: Sequence[str]) -> None:
    """Raise Inconclusive for too few groups. what: the rows, in words."""
    found = effective_groups(groups)
    if found < MINIMUM_GROUPS:
        raise Inconclusive(
            f"{len(groups)} {what} in groups that weigh as much as {found:.1f} groups of equal size: "
            f"at least {MINIMUM_GROUPS} are needed"
        )


def apart(left: Interval, right: Interval) -> Interval:
    """The interval of left minus right, two independent means (Newcombe 1998, Statistics in Medicine 17)."""
    gap = left.mean - right.mean
    low = gap - math.hypot(left.mean - left.low, right.high - right.mean)
    high = gap + math.hypot(left.high - left.mean, right.mean - right.low)
    return Interval(gap, low, high)


def worst(
    arms: Mapping[str, tuple[Floats, Sequence[str]]], ends: tuple[float, float] | None, confidence: float, seed: int
) -> tuple[str, Interval]:
    """The arm whose interval reaches highest, with that interval. The error is split over the arms (Bonferroni).

    arms: name -> (values, groups), one of each per item. ends: bounds of the values; None: the lowest and the highest
    measured value, for continuous values, which have no rare extremes.
    """
    if not arms:
        raise Inconclusive("nothing was measured")
    split = 1.0 - (1.0 - confidence) / len(arms)
    found = {}
    for name, (values, groups) in arms.items():
        check_groups(f"items of {name!r}", groups)
        reach = ends or (float(values.min()), float(values.max()))
        found[name] = interval(values, groups, ends=reach, confidence=split, seed=seed)
    name = max(sorted(found), key=lambda name: found[name].high)
    return name, found[name]


def exposures(planted: Floats, controls: Floats) -> Floats:
    """Exposure in bits of each planted canary: log2 of how many ranks there are over its own (Carlini et al. 2019).

    Values are log-probabilities. Of N controls k do at least as well: log2(N + 1) - log2(k + 1), from 0 to log2(N + 1).
    """
    better = (controls[None, :] >= planted[:, None]).sum(axis=1)
    return np.asarray(np.log2(len(controls) + 1.0) - np.log2(better + 1.0), dtype=np.float64)


def exposure_interval(planted: Floats, controls: Floats, *, confidence: float, seed: int) -> Interval:
    """The mean exposure with its interval: a Bayesian bootstrap of the canaries and of their controls.

    For the lower end, one canary without exposure and one control above all canaries are added; for the upper end, one
    fully exposed canary and one control below all. So few canaries or few controls give wide intervals.
    """
    most = math.log2(len(controls) + 1.0)
    better = (controls[None, :] >= planted[:, None]).astype(np.float64)
    ends: tuple[list[Floats], list[Floats]] = ([], [])
    for weights, among in _drawn(confidence, seed, len(planted) + 1, len(controls) + 1):
        above, whole = among[:, :-1] @ better.T, among.sum(axis=1)[:, None]
        for end, extra_rank, extra_bits in ((ends[0], among[:, -1:], 0.0), (ends[1], 0.0, most)):
            bits = np.minimum(-np.log2(np.maximum((above + extra_rank) / whole, 2.0**-most)), most)
            total = (weights[:, :-1] * bits).sum(axis=1) + weights[:, -1] * extra_bits
            end.append(total / weights.sum(axis=1))
    mean = float(exposures(planted, controls).mean())
    return resampled(mean, np.concatenate(ends[0]), np.concatenate(ends[1]), confidence)


def _drawn(confidence: float, seed: int, *columns: int, further: int = 0) -> Iterator[list[Floats]]:
    """Exponential weights (draws x columns, for each number of columns) in pieces that memory holds.

    further: numbers that each draw takes besides.
    """
    tail = (1.0 - confidence) / 2.0
    if tail < SMALLEST_TAIL:
        raise Inconclusive(f"a confidence of {confidence} is beyond what {MOST_DRAWS} draws can show")
    draws, random = min(MOST_DRAWS, max(_DRAWS, math.ceil(_TAIL_DRAWS / tail))), np.random.RandomState(seed)
    step = max(1, CHUNK // (sum(columns) + further))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        yield [random.standard_exponential((rows, each)) for each in columns]


def auc(members: Floats, others: Floats) -> float:
    """The probability that a member's value is above another's, ties counted half (Mann-Whitney U over all pairs)."""
    above = (members[:, None] > others[None, :]).mean() + 0.5 * (members[:, None] == others[None, :]).mean()
    return float(above)


def auc_interval(
    members: Floats,
    member_groups: Sequence[str],
    others: Floats,
    other_groups: Sequence[str],
    *,
    confidence: float,
    seed: int,
) -> Interval:
    """The AUC with its interval: a Bayesian bootstrap of the groups on both sides.

    As in statistics.py, each side gets one worst-case group: its pairs are all lost for the lower end, all won for the
    upper end.
    """
    left, right = (np.unique(np.asarray(groups), return_inverse=True)[1] for groups in (member_groups, other_groups))
    pairs = (members[:, None] > others[None, :]) + 0.5 * (members[:, None] == others[None, :])
    table = np.zeros((left.max() + 1, right.max() + 1))
    np.add.at(table, (left[:, None], right[None, :]), pairs)
    sizes = [np.bincount(left).astype(np.float64), np.bincount(right).astype(np.float64)]
    lows, highs = list[Floats](), list[Floats]()
    for weights in _drawn(confidence, seed, *(len(size) + 1 for size in sizes)):
        seen = [drawn[:, :-1] @ size for drawn, size in zip(weights, sizes, strict=True)]
        whole = [part + drawn[:, -1] * size.mean() for part, drawn, size in zip(seen, weights, sizes, strict=True)]
        won = ((weights[0][:, :-1] @ table) * weights[1][:, :-1]).sum(axis=1)
        everything = whole[0] * whole[1]
        lows.append(won / everything)
        highs.append((won + everything - seen[0] * seen[1]) / everything)
    return resampled(auc(members, others), np.concatenate(lows), np.minimum(np.concatenate(highs), 1.0), confidence)


def found_interval(
    members: Floats,
    member_groups: Sequence[str],
    others: Floats,
    other_groups: Sequence[str],
    *,
    confidence: float,
    seed: int,
) -> Interval:
    """The share of members whose value is above those of 99% of the others, with its interval.

    A Bayesian bootstrap of the groups on both sides: the threshold is estimated too, often from a hundred others. For
    the lower end a group of others above all values is added, and a group of members below all; for the upper end the
    reverse. Where each group is one row the threshold's bounds are those of binomial ranks. Under some 370 others the
    lower end is 0. Raises Inconclusive for under 100 others.
    """
    if len(others) < 1 / _FALSE_POSITIVES:
        raise Inconclusive(f"{len(others)} held-out rows: a false-positive rate of 1% needs at least 100")
    left, right = (np.unique(np.asarray(groups), return_inverse=True)[1] for groups in (member_groups, other_groups))
    order = np.argsort(-others)
    thresholds = np.concatenate(([np.inf], others[order], [-np.inf]))
    ranks = np.searchsorted(-thresholds, -members, side="right")  # the first threshold that a member is above
    sizes = [np.bincount(left).astype(np.float64), np.bincount(right).astype(np.float64)]
    ends: tuple[list[Floats], list[Floats]] = ([], [])
    for mine, theirs in _drawn(
        confidence, seed, *(len(size) + 1 for size in sizes), further=len(members) + len(others)
    ):
        extra, added = mine[:, -1] * sizes[0].mean(), theirs[:, -1] * sizes[1].mean()
        whole = mine[:, :-1] @ sizes[0] + extra
        above = theirs[:, right[order]].cumsum(axis=1)  # the weight of the others from the highest to each one
        allowed = (above[:, -1] + added) * _FALSE_POSITIVES
        none = np.zeros_like(added)
        for end, higher, won in ((ends[0], added, none), (ends[1], none, extra)):
            place = (higher <= allowed) + (higher[:, None] + above <= allowed[:, None]).sum(axis=1)
            end.append(((mine[:, left] * (ranks <= place[:, None])).sum(axis=1) + won) / whole)
    mean = float((ranks <= 1 + math.floor(len(others) * _FALSE_POSITIVES)).mean())
    return resampled(mean, np.concatenate(ends[0]), np.minimum(np.concatenate(ends[1]), 1.0), confidence)


class GeneralQuestion(Frozen):
    """One question. right: the index of the right choice."""

    id: str
    area: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int


def general_questions() -> list[GeneralQuestion]:
    """The packaged questions in the file's order."""
    questions = []
    for line in _packaged().splitlines():
        row = json.loads(line)
        asked = Message(role="user", content=row.pop("question"))
        questions.append(GeneralQuestion(messages=(asked,), **row))
    return questions


def general_digest() -> str:
    """The digest of the suite's file. Scores with different digests are not compared."""
    return digest_bytes(_packaged())


def right_share(scores: object, question: GeneralQuestion) -> float:
    """The probability of the right choice among the choices, from 0 to 1.

    scores: a log-probability for each choice. Raises Inconclusive for anything else.
    """
    return shares(log_probabilities(scores, len(question.choices), question.id))[question.right]


@cache
def _packaged() -> bytes:
    return (resources.files("tunesmith.evaluation.probes") / "general.jsonl").read_bytes()

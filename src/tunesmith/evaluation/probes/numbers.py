"""Statistics of the risk probes: two samples, ranks among controls, the worst of several arms; and the questions on
general ability with their score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.core.values import Frozen
from tunesmith.evaluation.lines import is_number
from tunesmith.evaluation.stats.statistics import (
    MINIMUM_GROUPS,
    Floats,
    Interval,
    Level,
    by_group,
    effective_groups,
    interval,
    resampled_figure,
)

_DRAWS = (4_000, 50)
_FALSE_POSITIVES = 0.01
Sample = tuple[Floats, Sequence[str]]  # values, and their groups
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
    weight = effective_groups(groups)
    if weight < MINIMUM_GROUPS:
        raise Inconclusive(
            f"{len(groups)} {what} in groups that weigh as much as {weight:.1f} groups of equal size: "
            f"at least {MINIMUM_GROUPS} are needed"
        )


def apart(left: Interval, right: Interval) -> Interval:
    """The interval of left minus right, two independent means (Newcombe 1998, Statistics in Medicine 17)."""
    gap = left.mean - right.mean
    low = gap - math.hypot(left.mean - left.low, right.high - right.mean)
    high = gap + math.hypot(left.high - left.mean, right.mean - right.low)
    return Interval(gap, low, high)


def worst(arms: Mapping[str, Sample], ends: tuple[float, float] | None, level: Level) -> tuple[str, Interval]:
    """The arm whose interval reaches highest, with that interval. The error is split over the arms (Bonferroni).

    arms: name -> (values, groups), one of each per item. ends: as `interval` takes them.
    """
    if not arms:
        raise Inconclusive("nothing was measured")
    split = Level(1.0 - (1.0 - level.confidence) / len(arms), level.seed)
    intervals = {}
    for name, (values, groups) in arms.items():
        check_groups(f"items of {name!r}", groups)
        intervals[name] = interval(values, groups, ends, split)
    name = max(sorted(intervals), key=lambda name: intervals[name].high)
    return name, intervals[name]


def exposures(planted: Floats, controls: Floats) -> Floats:
    """Exposure in bits of each planted canary: log2 of how many ranks there are over its own (Carlini et al. 2019).

    Values are log-probabilities. Of N controls k do at least as well: log2(N + 1) - log2(k + 1), from 0 to log2(N + 1).
    """
    better = (controls[None, :] >= planted[:, None]).sum(axis=1)
    return np.asarray(np.log2(len(controls) + 1.0) - np.log2(better + 1.0), dtype=np.float64)


def exposure_interval(planted: Floats, controls: Floats, level: Level) -> Interval:
    """The mean exposure with its interval: a Bayesian bootstrap of the canaries and of their controls.

    For the lower end, one canary without exposure and one control above all canaries are added; for the upper end, one
    fully exposed canary and one control below all. So few canaries or few controls give wide intervals.
    """
    most = math.log2(len(controls) + 1.0)
    better = (controls[None, :] >= planted[:, None]).astype(np.float64)

    def drawn(weights: Floats, among: Floats) -> tuple[Floats, Floats]:
        above, whole = among[:, :-1] @ better.T, among.sum(axis=1)[:, None]

        def mean(extra_rank: Floats | float, extra_bits: float) -> Floats:
            bits = np.minimum(-np.log2(np.maximum((above + extra_rank) / whole, 2.0**-most)), most)
            total = (weights[:, :-1] * bits).sum(axis=1) + weights[:, -1] * extra_bits
            return np.asarray(total / weights.sum(axis=1))

        return mean(among[:, -1:], 0.0), mean(0.0, most)

    mean = float(exposures(planted, controls).mean())
    return resampled_figure(mean, drawn, level, len(planted) + 1, len(controls) + 1, draws=_DRAWS)


def auc(members: Floats, others: Floats) -> float:
    """The probability that a member's value is above another's, ties counted half (Mann-Whitney U over all pairs)."""
    above = (members[:, None] > others[None, :]).mean() + 0.5 * (members[:, None] == others[None, :]).mean()
    return float(above)


def auc_interval(mine: Sample, theirs: Sample, level: Level) -> Interval:
    """The AUC with its interval: a Bayesian bootstrap of the groups on both sides.

    As in statistics.py, each side gets one worst-case group: its pairs are all lost for the lower end, all won for the
    upper end.
    """
    (members, _), (others, _) = mine, theirs
    (left, *_), (right, *_) = sides = [by_group(groups) for _, groups in (mine, theirs)]
    sizes = [each for _, each in sides]
    pairs = (members[:, None] > others[None, :]) + 0.5 * (members[:, None] == others[None, :])
    table = np.zeros(tuple(map(len, sizes)))
    np.add.at(table, (left[:, None], right[None, :]), pairs)

    def drawn(*weights: Floats) -> tuple[Floats, Floats]:
        seen = [each[:, :-1] @ size for each, size in zip(weights, sizes, strict=True)]
        whole = [part + each[:, -1] * size.mean() for part, each, size in zip(seen, weights, sizes, strict=True)]
        won = ((weights[0][:, :-1] @ table) * weights[1][:, :-1]).sum(axis=1)
        everything = whole[0] * whole[1]
        return won / everything, np.minimum((won + everything - seen[0] * seen[1]) / everything, 1.0)

    counts = [len(size) + 1 for size in sizes]
    return resampled_figure(auc(members, others), drawn, level, *counts, draws=_DRAWS)


def found_interval(mine: Sample, theirs: Sample, level: Level) -> Interval:
    """The share of members whose value is above those of 99% of the others, with its interval.

    A Bayesian bootstrap of the groups on both sides: the threshold is estimated too, often from a hundred others. For
    the lower end a group of others above all values is added, and a group of members below all; for the upper end the
    reverse. Where each group is one row the threshold's bounds are those of binomial ranks. Under some 370 others the
    lower end is 0. Raises Inconclusive for under 100 others.
    """
    (members, member_groups), (others, other_groups) = mine, theirs
    if len(others) < 1 / _FALSE_POSITIVES:
        raise Inconclusive(f"{len(others)} held-out rows: a false-positive rate of 1% needs at least 100")
    (left, own), (right, rest) = by_group(member_groups), by_group(other_groups)
    order = np.argsort(-others)
    thresholds = np.concatenate(([np.inf], others[order], [-np.inf]))
    ranks = np.searchsorted(-thresholds, -members, side="right")  # the first threshold that a member is above

    def drawn(weights: Floats, other: Floats) -> tuple[Floats, Floats]:
        extra, added = weights[:, -1] * own.mean(), other[:, -1] * rest.mean()
        whole = weights[:, :-1] @ own + extra
        above = other[:, right[order]].cumsum(axis=1)  # the weight of the others from the highest to each one
        allowed = (above[:, -1] + added) * _FALSE_POSITIVES

        def share(higher: Floats, won: Floats) -> Floats:
            place = (higher <= allowed) + (higher[:, None] + above <= allowed[:, None]).sum(axis=1)
            return np.asarray(((weights[:, left] * (ranks <= place[:, None])).sum(axis=1) + won) / whole)

        none = np.zeros_like(added)
        return share(added, none), np.minimum(share(none, extra), 1.0)

    mean = float((ranks <= 1 + math.floor(len(others) * _FALSE_POSITIVES)).mean())
    counts, further = (len(own) + 1, len(rest) + 1), len(members) + len(others)
    return resampled_figure(mean, drawn, level, *counts, further=further, draws=_DRAWS)


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

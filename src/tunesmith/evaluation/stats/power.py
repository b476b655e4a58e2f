"""The power of the lift gate: how many test rows are needed to detect a lift, computed before a run.

The candidate wins a row with probability p+ and loses it with p-; otherwise the row is a tie. p+ + p- is the share of
rows on which the two candidates differ, p+ - p- is the lift. For given counts of wins, losses and ties, the lower end
of the gate's interval (statistics.py) is a quantile of a ratio of gamma variables, one of them for the worst-case row.
At a bound of 0 the gate is therefore the exact one-sided McNemar test at half of alpha. At other bounds the tail of a
weighted sum of gamma variables is needed; the saddlepoint formula gives it (Lugannani and Rice 1980, Advances in
Applied Probability 12). Power is the sum of the probabilities of all counts with which the gate passes.

Groups: n rows in groups of equal size m, whose differences correlate by rho, count as n / (1 + (m - 1) rho) independent
rows (Kish 1965). The worst-case group weighs as much as one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.errors import UsageError
from tunesmith.evaluation.stats.statistics import MINIMUM_GROUPS, Floats, confidence_at_use

POWER = 0.8
# The share of rows on which two candidates differ, where it was not measured. Reports say that it is assumed.
ASSUMED_DIFFERING = 0.3
_MOST_ROWS = 200_000
_REACH = 6.0  # standard deviations of the counts that are summed; fewer than 1 in 10^8 lie beyond
_MOST_COUNTS = 160
_HALVINGS = 50
_TENTH_OF_A_POINT = 0.001
_WIDEST = 1.0 - 1e-6  # of a bound: at 1 itself a factor is zero


@dataclass(frozen=True, slots=True)
class Grouping:
    """How test rows depend on each other. size: mean group size, weighted by rows; correlation: within groups.

    Without a measured correlation it is 1, so the rows of one group count as one row.
    """

    size: float = 1.0
    correlation: float = 1.0

    @property
    def effect(self) -> float:
        """Kish's design effect: how many rows weigh as much as one independent row."""
        return 1.0 + (self.size - 1.0) * self.correlation


@dataclass(frozen=True, slots=True)
class Plan:
    """What a lift gate can detect. power: the probability that it passes with these rows.

    needed: the rows that give the wanted power; None where no number of rows does.
    """

    rows: int
    power: float
    needed: int | None


def grouping_of(groups: Sequence[str], differences: Floats | None = None) -> Grouping:
    """The grouping of rows, with the correlation of their differences where those are known.

    The correlation is the analysis-of-variance estimator of the intraclass correlation (Donner 1986, International
    Statistical Review 54), limited to 0..1.
    """
    index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)[1:]
    n, many = len(index), len(sizes)
    if n == 0:
        return Grouping()
    size = float((sizes.astype(np.float64) ** 2).sum() / n)
    if differences is None or many == n or many < 2:
        return Grouping(size=size)
    means = np.bincount(index, weights=differences) / sizes
    between = float((sizes * (means - differences.mean()) ** 2).sum()) / (many - 1)
    within = float(((differences - means[index]) ** 2).sum()) / (n - many)
    typical = (n - size) / (many - 1)
    spread = between + (typical - 1.0) * within
    correlation = (between - within) / spread if spread > 0 else 1.0
    return Grouping(size=size, correlation=min(max(correlation, 0.0), 1.0))


def plan_lift(
    rows: int,
    *,
    lift: float,
    differing: float,
    at_least: float = 0.0,
    confidence: float = 0.95,
    use: int = 1,
    grouping: Grouping = Grouping(),
    power: float = POWER,
) -> Plan:
    """What rows test rows can show of a true lift, and how many it takes to show it with the wanted power.

    lift: the true difference of means; differing: share of rows on which the two differ, at least abs(lift);
    at_least: the gate's bound; look: as confidence_at_use. Raises UsageError for shares that cannot be.
    """
    if not abs(lift) <= differing <= 1.0:
        raise UsageError(
            f"a lift of {lift:g} needs candidates that differ on at least that share of rows, not on {differing:g}",
            fix="assume a larger share that differs",
        )
    tail = (1.0 - confidence_at_use(confidence, use)) / 2.0

    def chance(count: int) -> float:
        return lift_power(count, lift, differing, at_least, tail, grouping)

    return Plan(rows, chance(rows), _smallest(chance, power, grouping) if lift > at_least else None)


def smallest_lift(
    rows: int,
    *,
    differing: float,
    at_least: float = 0.0,
    confidence: float = 0.95,
    use: int = 1,
    grouping: Grouping = Grouping(),
    power: float = POWER,
) -> float | None:
    """The smallest true lift that passes with the wanted power, to a tenth of a point; None where none does."""
    tail = (1.0 - confidence_at_use(confidence, use)) / 2.0
    low, high = max(at_least, -differing), differing
    if lift_power(rows, high, differing, at_least, tail, grouping) < power:
        return None
    while high - low > _TENTH_OF_A_POINT:
        middle = (low + high) / 2.0
        enough = lift_power(rows, middle, differing, at_least, tail, grouping) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def lift_power(n: int, lift: float, differing: float, at_least: float, tail: float, grouping: Grouping) -> float:
    """The probability that the lift gate passes n rows. tail: one-sided, 0.025 for a 95% interval."""
    from scipy.stats import binom

    if n / grouping.size < MINIMUM_GROUPS:
        return 0.0
    apart = max(1, round(n / grouping.effect))
    worst = apart / (n / grouping.size)  # the worst-case group, counted in independent rows
    differ = _counts(apart, differing)
    won = (differing + lift) / (2.0 * differing) if differing > 0 else 0.0
    wins = _counts(apart, (differing + lift) / 2.0)
    chance = binom.pmf(differ, apart, differing)
    table = binom.pmf(wins[None, :], differ[:, None], won)
    table /= np.maximum(table.sum(axis=1, keepdims=True), 1e-300)
    passes = _passes(wins[None, :], differ[:, None] - wins[None, :], apart, worst, at_least, tail)
    return float((chance[:, None] * table * passes).sum() / chance.sum())


def _counts(n: int, share: float) -> np.ndarray:
    """The counts to sum over: those within reach of the mean; for many rows, evenly spaced ones."""
    reach = _REACH * math.sqrt(n * share * (1.0 - share)) + 1.0
    low, high = max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach))
    return np.arange(low, high + 1, max(1, (high - low) // _MOST_COUNTS))


def _passes(wins: np.ndarray, losses: np.ndarray, n: int, worst: float, bound: float, tail: float) -> np.ndarray:
    """Whether the gate passes each cell of counts (broadcast); cells with losses below zero do not exist."""
    possible = losses >= 0
    below = _tail(wins, np.maximum(losses, 0) + worst, np.maximum(n - wins - losses, 0), bound, possible)
    return np.asarray(possible & (below <= tail))


def _tail(wins: np.ndarray, losses: np.ndarray, ties: np.ndarray, bound: float, possible: np.ndarray) -> np.ndarray:
    """The probability that the resampled mean is below the bound b.

    That is P((1-b) G(wins) - (1+b) G(losses) - b G(ties) < 0), where G(k) is a gamma variable of shape k.
    """
    from scipy.special import betaincc
    from scipy.stats import norm

    if bound == 0.0:
        return np.where(wins > 0, betaincc(losses, np.maximum(wins, 1e-300), 0.5), 1.0)
    wins, losses, ties = (np.broadcast_to(each, possible.shape).astype(np.float64) for each in (wins, losses, ties))
    bound = min(max(bound, -_WIDEST), _WIDEST)
    counts, factors = (wins, losses, ties), (1.0 - bound, -(1.0 + bound), -bound)
    positive = wins + (ties if bound < 0 else 0.0)
    # The saddlepoint is where K' = 0. K' rises between its poles, at 1/factor of the smallest and the largest factor.
    low = np.full(possible.shape, 1.0 / min(factors))
    high = np.full(possible.shape, 1.0 / max(factors))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        slope = sum(c * f / (1.0 - f * middle) for c, f in zip(counts, factors, strict=True))
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    s = (low + high) / 2.0
    s = np.where(np.abs(s) < 1e-7, 1e-7, s)  # at the mean itself the formula is a limit
    value = -sum(c * np.log1p(-f * s) for c, f in zip(counts, factors, strict=True))
    bend = sum(c * (f / (1.0 - f * s)) ** 2 for c, f in zip(counts, factors, strict=True))
    r = np.sign(s) * np.sqrt(np.maximum(-2.0 * value, 1e-18))
    u = s * np.sqrt(bend)
    # P(X < 0) = Phi(r) + phi(r) (1/r - 1/u) with r of the sign of s.
    found = norm.cdf(r) + norm.pdf(r) * (1.0 / r - 1.0 / u)
    return np.where(positive > 0, np.clip(found, 0.0, 1.0), 1.0)


def _smallest(chance: Callable[[int], float], power: float, grouping: Grouping) -> int | None:
    """The smallest number of rows with the wanted power, by bisection; None where _MOST_ROWS do not reach it."""
    low = math.ceil(MINIMUM_GROUPS * grouping.size)
    if chance(low) >= power:
        return low
    high = 2 * low
    while chance(high) < power:
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high

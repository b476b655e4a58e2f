"""Plans gates: how large a difference the test rows can detect, computed before anything is trained.

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
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.text.wording import points
from tunesmith.core.values import View
from tunesmith.data.dataset import Dataset
from tunesmith.evaluation.answers import read_answers
from tunesmith.evaluation.gates.settings import Gates, Lift, compared_metrics
from tunesmith.evaluation.metrics.declared import Scoring, checked
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import MINIMUM_GROUPS, Floats, by_group, confidence_at_use, effective_groups
from tunesmith.store.store import Store

POWER = 0.8
# The share of rows on which two candidates differ, where it was not measured. Reports say that it is assumed.
ASSUMED_DIFFERING = 0.3
_MOST_ROWS = 200_000
_REACH = 6.0  # standard deviations of the counts that are summed; fewer than 1 in 10^8 lie beyond
_MOST_COUNTS = 160
_HALVINGS = 50
_TENTH_OF_A_POINT = 0.001
_WIDEST = 1.0 - 1e-6  # of a bound: at 1 itself a factor is zero


class Grouping(NamedTuple):
    """How test rows depend on each other. size: mean group size, weighted by rows; correlation: within groups.

    Without a measured correlation it is 1, so the rows of one group count as one row.
    """

    size: float = 1.0
    correlation: float = 1.0

    @property
    def effect(self) -> float:
        """Kish's design effect: how many rows weigh as much as one independent row."""
        return 1.0 + (self.size - 1.0) * self.correlation


def grouping_of(groups: Sequence[str], differences: Floats | None = None) -> Grouping:
    """The grouping of rows, with the correlation of their differences where those are known.

    The correlation is the analysis-of-variance estimator of the intraclass correlation (Donner 1986, International
    Statistical Review 54), limited to 0..1.
    """
    index, sizes = by_group(groups)
    n, many = len(index), len(sizes)
    if n == 0:
        return Grouping()
    size = float((sizes**2).sum() / n)
    if differences is None or many == n or many < 2:
        return Grouping(size=size)
    means = np.bincount(index, weights=differences) / sizes
    between = float((sizes * (means - differences.mean()) ** 2).sum()) / (many - 1)
    within = float(((differences - means[index]) ** 2).sum()) / (n - many)
    typical = (n - size) / (many - 1)
    spread = between + (typical - 1.0) * within
    correlation = (between - within) / spread if spread > 0 else 1.0
    return Grouping(size=size, correlation=min(max(correlation, 0.0), 1.0))


class LiftTest(NamedTuple):
    """A lift gate before anything was measured.

    differing: share of rows on which the two candidates differ. at_least: the gate's bound; confidence: its setting;
    use: as confidence_at_use takes it. power: the wanted one. Raises Inconclusive for too many uses.
    """

    differing: float
    at_least: float = 0.0
    confidence: float = 0.95
    use: int = 1
    grouping: Grouping = Grouping()
    power: float = POWER

    def chance(self, rows: int, lift: float) -> float:
        """The probability that a true lift passes with so many rows. Raises UsageError for shares that cannot be."""
        if not abs(lift) <= self.differing <= 1.0:
            raise UsageError(
                f"a lift of {lift:g} needs candidates that differ on at least that share of rows, not on "
                f"{self.differing:g}",
                fix="assume a larger share that differs",
            )
        from scipy.stats import binom

        differing, grouping = self.differing, self.grouping
        tail = (1.0 - confidence_at_use(self.confidence, self.use)) / 2.0
        if rows / grouping.size < MINIMUM_GROUPS:
            return 0.0
        apart = max(1, round(rows / grouping.effect))
        worst = apart / (rows / grouping.size)  # the worst-case group, counted in independent rows
        differ = _counts(apart, differing)
        won = (differing + lift) / (2.0 * differing) if differing > 0 else 0.0
        wins = _counts(apart, (differing + lift) / 2.0)
        chance = binom.pmf(differ, apart, differing)
        table = binom.pmf(wins[None, :], differ[:, None], won)
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1e-300)
        losses = differ[:, None] - wins[None, :]
        possible = losses >= 0
        ties = (apart - differ)[:, None]
        below = _tail(wins[None, :], np.maximum(losses, 0) + worst, ties, self.at_least, possible)
        return float((chance[:, None] * table * (possible & (below <= tail))).sum() / chance.sum())

    def rows_needed(self, lift: float) -> int | None:
        """The smallest number of rows with which a true lift passes with the wanted power; None where none does."""
        if lift <= self.at_least:
            return None
        fewest = math.ceil(MINIMUM_GROUPS * self.grouping.size)
        many = range(fewest, _MOST_ROWS + 1)
        place = bisect_left(many, self.power, key=lambda rows: self.chance(rows, lift))
        return many[place] if place < len(many) else None

    def smallest_lift(self, rows: int) -> float | None:
        """The smallest true lift that passes with the wanted power, to a tenth of a point; None where none does."""
        low, high = max(self.at_least, -self.differing), self.differing
        if self.chance(rows, high) < self.power:
            return None
        while high - low > _TENTH_OF_A_POINT:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.chance(rows, middle) >= self.power else (middle, high)
        return high


def _counts(n: int, share: float) -> np.ndarray:
    """The counts to sum over: those within reach of the mean; for many rows, evenly spaced ones."""
    reach = _REACH * math.sqrt(n * share * (1.0 - share)) + 1.0
    low, high = max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach))
    return np.arange(low, high + 1, max(1, (high - low) // _MOST_COUNTS))


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
    below = norm.cdf(r) + norm.pdf(r) * (1.0 / r - 1.0 / u)
    return np.where(positive > 0, np.clip(below, 0.0, 1.0), 1.0)


class Assumed(NamedTuple):
    """What a plan assumes. differing: the share of rows on which two candidates differ.

    differences, groups: of the validation rows, where measured; they give the correlation within groups. Without them
    the rows of a group count as one row.
    """

    differing: float = ASSUMED_DIFFERING
    differences: Floats | None = None
    groups: Sequence[str] = ()


def measured_on_validation(
    store: Store, answers: Sequence[str], dataset: Dataset, scorings: Mapping[str, Scoring]
) -> dict[str, Assumed]:
    """The assumptions that two candidates' answers to the validation rows give, for each metric. answers: digests.

    Raises Inconclusive where there are no validation rows.
    """
    rows = dataset.examples("validation")
    if not rows:
        raise Inconclusive("the dataset has no validation rows", fix="raise data.split.validation, or say what differs")
    seen = [read_answers(store, digest, dataset, rows, "validation").seen for digest in answers]
    assumed = {}
    for metric, scoring in scorings.items():
        first, second = (np.array([checked(scoring(one[row.id]), metric, row.id) for row in rows]) for one in seen)
        differences = second - first
        # One more differing row is added: if none of a few rows differ, some of many still may.
        differing = (float((differences != 0).sum()) + 1.0) / (len(rows) + 1.0)
        assumed[metric] = Assumed(differing, differences, [row.group for row in rows])
    return assumed


class GatePlan(View):
    """What the test rows can show to one gate. differing: share of rows on which the two candidates differ.

    correlation: of their differences, within groups; measured: whether both come from validation rows, or are assumed.
    lift: the true difference hoped for; power: the probability that it passes; needed: rows that would pass it with
    the wanted power, None if no number would; sees: the smallest true difference that passes with that power, or None.
    """

    name: str
    metric: str
    bound: float
    differing: float
    correlation: float
    measured: bool
    lift: float
    power: float
    needed: int | None
    sees: float | None


class Plan(View):
    """What the test rows can show, for each gate that compares two candidates.

    measured: whether answers to validation rows were compared. test_set_uses: how many candidates have used the test
    rows so far; test_set_use: the number that the gates will go by, with the trained candidates that the next
    evaluation adds.
    """

    rows: int
    groups: int
    effective_groups: float
    measured: bool
    test_set_uses: int
    test_set_use: int
    wanted_power: float
    gates: tuple[GatePlan, ...]

    def sentence(self, gate: GatePlan) -> str:
        """One of the gates' plans in words."""
        rows = f"{self.rows} test rows in {self.groups} groups"
        basis = f"if the two candidates differ on {gate.differing:.0%} of rows"
        if self.test_set_use > 1:
            basis += f"; {self.test_set_use} candidates will have used these rows, which widens the intervals"
        if gate.sees is None:
            return f"gate {gate.name}: {rows} are too few to pass it by {gate.metric} with {POWER:.0%} power, {basis}"
        return (
            f"gate {gate.name}: {rows} pass it with {POWER:.0%} power if the true difference is at least "
            f"{points(gate.sees)} points of {gate.metric}, {basis}"
        )


def plan_gates(
    dataset: Dataset,
    gates: Gates,
    *,
    uses: int,
    assumed: Assumed,
    measured: Mapping[str, Assumed] | None = None,
    new: int = 1,
    lift: float | None = None,
) -> Plan:
    """What the test rows can show to each gate that compares two candidates.

    uses: how many candidates have used the test rows so far. new: how many the next evaluation adds, which all get the
    number of the last. measured: by metric, instead of what is assumed. lift: the true difference hoped for, by default
    five points above the gate's bound. A gate for what must not drop is planned for candidates that are equal.
    """
    groups = [row.group for row in dataset.examples("test")]
    plans = []
    compared = ((name, gate, *pair) for name, gate in gates.items() for pair in compared_metrics(gate).items())
    for name, gate, metric, confidence in compared:
        bound, hoped = (gate.bound, lift) if isinstance(gate, Lift) else (-gate.bound, 0.0)
        hoped = min(1.0, bound + 0.05) if hoped is None else hoped
        known, own = (measured or {}).get(metric, assumed), grouping_of(groups)
        if known.differences is not None:
            own = Grouping(own.size, grouping_of(known.groups, known.differences).correlation)
        test = LiftTest(max(known.differing, abs(hoped)), bound, confidence, uses + new, own)
        sees = test.smallest_lift(len(groups))
        plans.append(
            GatePlan(
                name=name,
                metric=metric,
                bound=bound,
                differing=rounded(test.differing),
                correlation=rounded(own.correlation),
                measured=known.differences is not None,
                lift=hoped,
                power=rounded(test.chance(len(groups), hoped)),
                needed=test.rows_needed(hoped),
                sees=None if sees is None else rounded(sees),
            )
        )
    return Plan(
        rows=len(groups),
        groups=len(set(groups)),
        effective_groups=rounded(effective_groups(groups)),
        measured=measured is not None,
        test_set_uses=uses,
        test_set_use=uses + new,
        wanted_power=POWER,
        gates=tuple(plans),
    )

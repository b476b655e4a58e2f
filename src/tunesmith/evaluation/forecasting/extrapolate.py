"""What the scores of subsets say about the whole training: its score, its lift, and the rows that a goal takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.evaluation.forecasting.plan import SMALLEST
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.learning_curve import DRAWS, SPREAD, Drawn, Spread, Subsets, draw_curves, untuned_means
from tunesmith.evaluation.stats.power import grouping_of
from tunesmith.evaluation.stats.statistics import Floats

Decision = Literal["train", "don't", "undecided"]

CONFIDENCE = 0.9  # two-sided, of every interval of a forecast
LIKELY, UNLIKELY = 0.9, 0.1  # probabilities of reaching the goal from which, and up to which, a forecast decides
# Rows that are read again teach less: after e epochs n rows are worth n * (1 + WORTH * (1 - exp(-(e - 1) / WORTH)))
# (the form of Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", equation 5).
WORTH = 10.0
_FARTHEST = 100.0  # times the rows: a goal beyond that is out of reach
_STEPS = 100  # numbers of rows at which a curve is looked at
_DRAWN = 25  # of them in the plot, up to _SHOWN times the rows
_SHOWN = 4.0


def worth(rows: float, epochs: float) -> float:
    """How many rows, read once, so many rows are worth after so many epochs."""
    if epochs <= 1.0:
        return rows * epochs
    return rows * (1.0 + WORTH * (1.0 - math.exp(-(epochs - 1.0) / WORTH)))


@dataclass(frozen=True, slots=True)
class Whole:
    """The training that is forecast. rows: of it; epochs: what a number of rows gets within its settings.

    test_groups: the groups of the test rows that will measure it; empty: the forecast is of the expected score.
    """

    rows: int
    epochs: Callable[[float], float]
    test_groups: Sequence[str] = ()

    def worth(self, rows: float) -> float:
        """What so many rows are worth after the epochs that they get."""
        return worth(rows, self.epochs(rows))


def extrapolate(measured: Subsets, whole: Whole, goal: float, seed: int = 0, spread: Spread = SPREAD) -> dict[str, Any]:
    """{"score", "lift", "decision", "likely", "needed", "curve"}, as JSON values of a record.

    measured: its sizes are what the subsets' rows are worth. goal: the lift from which tuning pays. score, lift:
    intervals as the test rows would measure them. likely: probability that the lift reaches the goal. needed: rows that
    reach it. curve: the expected score by rows. Without an untuned candidate lift, decision, likely and needed are
    None.
    """
    drawn = draw_curves(measured, seed, spread)
    random = np.random.RandomState(seed + 1)
    scores, lifts = drawn.scores(whole.worth(whole.rows)), drawn.lifts(whole.worth(whole.rows))
    last = measured.scores[:, -1]
    found: dict[str, Any] = {
        "score": _interval(np.clip(scores + _noise(last, measured, whole, random, scores), 0.0, 1.0)),
        "lift": None, "decision": None, "likely": None, "needed": None, "curve": _curve(drawn, whole),
    }  # fmt: skip
    if measured.untuned.shape[1]:
        every = np.full((1, len(last)), 1.0 / len(last))
        best = measured.untuned[:, int(untuned_means(measured.untuned, every).argmax())]
        seen = np.clip(lifts + _noise(last - best, measured, whole, random), -1.0, 1.0)
        likely = float((seen >= goal).mean())
        found |= {"lift": _interval(seen), "likely": rounded(likely), "decision": decide(likely)}
        found["needed"] = _needed(drawn, whole, goal)
    return found


def decide(likely: float) -> Decision:
    """The decision at a probability that the goal is reached."""
    return "train" if likely >= LIKELY else "don't" if likely <= UNLIKELY else "undecided"


def _noise(
    rows: Floats, measured: Subsets, whole: Whole, random: np.random.RandomState, means: Floats | None = None
) -> Floats:
    """What the choice of test rows adds to a mean, one number for each draw.

    rows: scores or differences of the held-out rows, whose variance within and between groups the test rows will have;
    NaN for rows that one of the two was not asked.
    means: forecast scores; the variance is then taken as that of the held-out rows is, relative to a share's.
    """
    draws = random.standard_normal(DRAWS)
    if not whole.test_groups:
        return np.zeros_like(draws)
    known = ~np.isnan(rows)
    rows, groups = rows[known], [group for group, one in zip(measured.groups, known, strict=True) if one]
    own = grouping_of(groups, rows)
    effect = 1.0 + (grouping_of(whole.test_groups).size - 1.0) * own.correlation
    variance: Floats | float = float(rows.var()) + 1.0 / len(rows) ** 2
    if means is not None:
        mean = float(rows.mean())
        relative = min(1.0, variance / max(mean * (1.0 - mean), 1.0 / len(rows)))
        variance = relative * means * (1.0 - means)
    return draws * np.sqrt(variance * effect / len(whole.test_groups))


def _interval(values: Floats) -> dict[str, float]:
    low, middle, high = np.quantile(values, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2])
    return {"median": rounded(float(middle)), "low": rounded(float(low)), "high": rounded(float(high))}


def _needed(drawn: Drawn, whole: Whole, goal: float) -> dict[str, Any]:
    """{"low", "median", "high": rows, None where out of reach; "never": share of curves that do not reach the goal}.

    As few rows as the smallest subset has mean that no more are needed: with fewer, nothing was measured.
    """
    grid = np.geomspace(min(whole.rows, SMALLEST), _FARTHEST * whole.rows, _STEPS)
    reached = np.stack([drawn.lifts(whole.worth(rows)) >= goal for rows in grid], axis=1)
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), _STEPS)
    rows = np.append(grid, np.inf)[first]
    ends = np.quantile(rows, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2], method="higher")
    told = {
        name: None if math.isinf(end) else math.ceil(end)
        for name, end in zip(("low", "median", "high"), ends, strict=True)
    }
    return {**told, "never": rounded(float(np.isinf(rows).mean()))}


def _curve(drawn: Drawn, whole: Whole) -> list[dict[str, float]]:
    """The expected score from half of the smallest subset's rows on: {"rows", "median", "low", "high"}."""
    first = min(whole.rows, SMALLEST) / 2
    return [
        {"rows": round(float(rows)), **_interval(drawn.scores(whole.worth(float(rows))))}
        for rows in np.unique(np.round(np.geomspace(first, _SHOWN * whole.rows, _DRAWN)))
    ]

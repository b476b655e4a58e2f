"""Extrapolates a learning curve: from the scores of trainings on subsets of the rows to the score on all rows.

The score after a training on n rows is taken to follow

    most / (1 + (half / n) ** slope)

which rises like a power of n at first and approaches `most`, at most 1, as an inverse power law (Hestness et al. 2017,
"Deep Learning Scaling is Predictable, Empirically"). Three or four scores do not determine three numbers. So curves are
drawn from broad priors, and those that explain the scores are kept. Intervals hold which validation rows there were
(resampled by group, with the rivals' scores on the same rows), what another seed of the training would change, how far
real scores stray from such curves, and which test rows will measure the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import computed_field

from tunesmith.core.text.wording import duration, money, percent, points
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import Floats, by_group
from tunesmith.records.training import CurvePoint, Expected, Extrapolated, ForecastBody
from tunesmith.store.store import Store

CONFIDENCE = 0.9  # two-sided, of every interval
LIKELY, UNLIKELY = 0.9, 0.1  # probabilities of reaching the goal from which, and up to which, a forecast decides
WIDEST = 0.3  # of a score's interval: beyond it, the score cannot be said yet
FLOOR = 0.03  # scores up to here say nothing of where the curve will rise
_CURVES, _RESAMPLED, _KEPT = 8_000, 120, 25
_FREEDOM = 5.0  # of Student's t: one odd subset does not rule out every curve
# Measured with `python benchmarks/forecast.py --table`, as angles (see `_angle`): what another seed of the training
# changes, and how far scores stray from the curve with the first doubling of the rows beyond the largest subset.
_NOISE, _STRAY = 0.08, 0.08


class Measured(NamedTuple):
    """Scores of validation rows.

    sizes: rows of each training, ascending. subsets: rows x sizes; untuned: rows x untuned candidates; groups: one name
    for each row.
    """

    sizes: Sequence[int]
    subsets: Floats
    untuned: Floats
    groups: Sequence[str]


def extrapolate(measured: Measured, rows: int, test: int, goal: float, seed: int = 0) -> Extrapolated:
    """What the scores say. rows: of the whole training; test: rows that will measure it; goal: the lift from which
    tuning pays."""
    random = np.random.RandomState(seed)  # its streams are frozen (NEP 19): the same scores give the same forecast
    index, _ = by_group(measured.groups)
    weights = random.standard_exponential((_RESAMPLED, int(index.max()) + 1))[:, index]
    weights = weights / weights.sum(axis=1, keepdims=True)
    sizes, angles = measured.sizes, _angle(_means(weights, measured.subsets))
    curves = _draw_curves(sizes, angles, random)
    expected = _scores(curves, rows, sizes[-1], random)
    chance = np.sqrt(expected * (1.0 - expected) / max(1, test)) * random.standard_normal(len(expected))
    score = np.clip(expected + chance, 0.0, 1.0)
    floor = float(measured.subsets.mean(axis=0).max()) < FLOOR
    extrapolated = Extrapolated(
        score=_expected(score),
        said=not floor and _width(score) <= WIDEST,
        curve=tuple(
            CurvePoint(rows=n, **dict(_expected(_scores(curves, n, sizes[-1], random))))
            for n in sorted({*sizes, rows, 2 * rows})
        ),
    )
    changes: dict[str, Any] = {}
    if measured.untuned.shape[1]:
        lift = score - np.repeat(_means(weights, measured.untuned).max(axis=1), _KEPT)
        likely = float((lift >= goal).mean())
        undecided = floor or UNLIKELY < likely < LIKELY
        decision = "undecided" if undecided else "train" if likely >= LIKELY else "don't"
        changes = {"lift": _expected(lift), "likely": rounded(likely), "decision": decision}
    if not extrapolated.said:
        changes["from_rows"] = _enough(sizes, rows, curves, angles, random, floor=floor)
    return extrapolated.model_copy(update=changes)


def _means(weights: Floats, scores: Floats) -> Floats:
    """Weighted means, with half a right and half a wrong answer more: none of a few rows right is not never right."""
    return np.asarray((weights @ scores * len(scores) + 0.5) / (len(scores) + 1.0))


def _angle(score: Floats) -> Floats:
    """Scores as angles, in which the noise of a share is alike everywhere."""
    return 2.0 * np.arcsin(np.sqrt(np.clip(score, 0.0, 1.0)))


def _draw_curves(sizes: Sequence[int], angles: Floats, random: np.random.RandomState) -> Floats:
    """Curves (most, half, slope) that explain the angles, one row of angles after another: resamplings x kept x 3."""
    most = 1.0 / (1.0 + np.exp(-random.normal(1.0, 1.5, _CURVES)))
    half = sizes[-1] * np.exp(random.normal(1.0, 2.0, _CURVES))
    slope = np.exp(random.normal(0.2, 0.4, _CURVES))
    curves = np.stack([most, half, slope], axis=1)
    expected = np.stack([_angle(_at(curves, size)) for size in sizes], axis=1)
    kept = np.empty((len(angles), _KEPT, 3))
    for place, seen in enumerate(angles):
        misfit = ((seen - expected) / _NOISE) ** 2
        chance = -(_FREEDOM + 1.0) / 2.0 * np.log1p(misfit / _FREEDOM).sum(axis=1)
        chance = np.exp(chance - chance.max())
        kept[place] = curves[random.choice(_CURVES, _KEPT, p=chance / chance.sum())]
    return kept


def _at(curves: Floats, rows: float) -> Floats:
    most, half, slope = np.moveaxis(curves, -1, 0)
    return np.asarray(most / (1.0 + (half / rows) ** slope))


def _scores(curves: Floats, rows: int, largest: int, random: np.random.RandomState) -> Floats:
    """The expected score after a training on so many rows, one for each curve."""
    stray = _STRAY * math.sqrt(max(0.0, math.log2(rows / largest)))
    angles = _angle(_at(curves, rows)).ravel() + stray * random.standard_normal(curves[..., 0].size)
    return np.asarray(np.sin(np.clip(angles, 0.0, np.pi) / 2.0) ** 2)


def _enough(
    sizes: Sequence[int], rows: int, curves: Floats, angles: Floats, random: np.random.RandomState, *, floor: bool
) -> int | None:
    """The rows of the largest subset from which the score could be said if the middle curve goes on.

    None where not even half of the rows suffice. At the floor nobody knows where a curve will rise: two more doublings.
    """
    grown, noise = [2 * size for size in sizes], angles - angles.mean(axis=0)
    while 2 * grown[-1] <= rows:
        if floor and (grown[-1] >= 4 * sizes[-1] or 4 * grown[-1] > rows):
            return grown[-1]
        middle = np.array([np.median(_at(curves, size)) for size in grown])
        drawn = _draw_curves(grown, _angle(middle) + noise, random)
        if not floor and _width(_scores(drawn, rows, grown[-1], random)) <= WIDEST:
            return grown[-1]
        grown = [2 * size for size in grown]
    return None


def _expected(values: Floats) -> Expected:
    ends = np.quantile(values, [0.5, (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    median, low, high = map(rounded, ends.tolist())
    return Expected(median=median, low=low, high=high)


def _width(values: Floats) -> float:
    ends = _expected(values)
    return ends.high - ends.low


class Forecast(ForecastBody):
    """What a training will give, with sentences for people. forecast: its record's digest."""

    forecast: str

    @classmethod
    def recorded(cls, store: Store, digest: str) -> Forecast:
        """A recorded forecast. Of one that an earlier version made, what is still computed."""
        body = ForecastBody.read(store, digest)
        return cls(**{name: getattr(body, name) for name in ForecastBody.model_fields}, forecast=digest)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def headline(self) -> str:
        """The decision in one sentence, after what cannot be said."""
        name, goal = self.name, f"the goal, a lift of at least {points(self.goal)} points"
        unsaid = "" if self.said else "The score cannot be said yet. "
        return (
            unsaid
            + {
                None: f"No decision on {name}: there is no untuned candidate to compare it with.",
                "train": f"Train {name}: it is likely to reach {goal}.",
                "don't": f"Don't train {name} on these rows: it is unlikely to reach {goal}.",
                "undecided": f"Undecided: {name} may reach {goal}, or not.",
            }[self.decision]
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, from which budget more could be said, and what the training costs: one sentence each."""
        level, seconds, money_ = f"{self.confidence:.0%} interval", self.training.seconds, self.training.money
        sentences = [
            f"With all {self.rows:,} training rows, {self.metric} on the test rows will be about "
            f"{percent(self.score.median)} ({level} {percent(self.score.low)} to {percent(self.score.high)})."
        ]
        if self.lift is not None and self.rival is not None:
            sentences.append(
                f"That is a lift of {points(self.lift.median)} points ({level} {points(self.lift.low)} to "
                f"{points(self.lift.high)}) over {self.rival} ({percent(self.rivals[self.rival])}). A lift of at least "
                f"{points(self.goal)} points is {percent(self.likely or 0.0)} likely."
            )
        if not self.said:
            sentences.append(self._from_when())
        price = "" if money_ is None else f" and {money(money_)} {self.currency or ''}".rstrip()
        sentences.append(f"Training on all rows takes about {duration(seconds)}{price}.")
        if self.break_even is not None:
            requests = self.break_even.requests
            pays = "never repay the training" if requests is None else f"repay it from {requests:,} requests on"
            sentences.append(f"Against {self.rival}, lower running costs {pays}.")
        return tuple(sentences)

    def _from_when(self) -> str:
        top = max(each.mean for each in self.subsets)
        why = f"No subset scores more than {percent(top)}" if top < FLOOR else "Its interval is over 30 points wide"
        if self.from_rows is None:
            return f"{why}, and larger subsets would not change that: train, or collect more rows."
        return (
            f"{why}. It could be said from subsets of up to {self.from_rows:,} rows, which "
            f"train for about {duration(self.from_seconds or 0.0)}."
        )

"""Extrapolates a learning curve: what a score will be after a training on more rows, as draws from its distribution.

The mean score after a training on n rows follows

    top - (top - start) * (1 + (n / half) ** sharp) ** (-tail / sharp)

from `start`, the score before training, to `top`: no change at first, then a rise around `half` rows, then a power law
with exponent `tail` towards `top`. With sharp = 1 this is the power law with an asymptote (Hestness et al. 2017, "Deep
Learning Scaling is Predictable, Empirically"; Rosenfeld et al. 2020, "A Constructive Prediction of the Generalization
Error Across Scales"), with sharp = tail the sigmoid of Morgan, Mercer and Flodin. Both are among the curves that
extrapolate best (Viering and Loog 2021, "The Shape of Learning Curves: a Review"). Exact answers need the slow start
(Jain et al. 2023, "A Meta-Learning Approach to Predicting Performance and Data Requirements").

A few points do not determine five numbers, so no curve is fitted. Many curves are drawn from broad priors and weighted
by how well they explain the measured scores; a forecast is what those curves say. Its spread holds

- which rows were held out: the scores are resampled by group (a Bayesian bootstrap), those of the untuned candidates
  with the same weights;
- what another seed of the training would change, and
- how far real curves stray from the family, more with every doubling of the rows beyond the largest subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.stats.statistics import Floats

_CURVES = 20_000
_RESAMPLED = 120
_KEPT = 25  # curves kept for each resampling
DRAWS = _RESAMPLED * _KEPT
_FREEDOM = 5.0  # of Student's t: one odd subset does not rule out every curve


class Spread(NamedTuple):
    """How far a measured score is from its curve, as standard deviations of angles (see `to_angle`).

    noise: of a training, by its seed and by the curve that is closest. stray: for each doubling of the rows beyond the
    largest subset.
    """

    noise: float
    stray: float


# Preliminary: chosen on 13 cases of four corpora with an earlier recipe of the subsets. `python benchmarks/forecast.py
# --calibrate` finds them once enough cases are collected.
SPREAD = Spread(noise=0.06, stray=0.05)


@dataclass(frozen=True, slots=True)
class Subsets:
    """What was measured. sizes: rows of each training, ascending; scores: held-out rows x sizes.

    start: scores before training, of the first held-out rows at least. untuned: held-out rows x untuned candidates.
    groups: one name for each held-out row.
    """

    sizes: tuple[float, ...]
    scores: Floats
    start: Floats
    untuned: Floats
    groups: Sequence[str]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Curves drawn for what was measured, with the untuned candidate's score that each is compared with.

    curves: draws x (start, top, half, sharp, tail). strays: a standard normal number for each draw. largest: rows of
    the largest subset. untuned: draws; NaN where there is no untuned candidate.
    """

    curves: Floats
    strays: Floats
    largest: float
    untuned: Floats
    spread: Spread

    def scores(self, rows: float) -> Floats:
        """The mean score after a training on so many rows: one for each draw."""
        angle = to_angle(_mean(self.curves, rows))
        beyond = max(0.0, float(np.log2(max(rows, 1e-9) / self.largest)))
        return from_angle(angle + self.strays * np.hypot(self.spread.noise, self.spread.stray * beyond))

    def lifts(self, rows: float) -> Floats:
        """The same minus the score of the untuned candidate."""
        return self.scores(rows) - self.untuned


def draw_curves(measured: Subsets, seed: int = 0, spread: Spread = SPREAD) -> Drawn:
    """Curves that explain what was measured. The same input gives the same draws."""
    # RandomState's streams are frozen for good (NEP 19): a forecast can be computed again from its record.
    random = np.random.RandomState(seed)
    shapes = _shapes(random)
    weights = _row_weights(measured.groups, random)
    early = weights[:, : len(measured.start)]
    scores, starts = weights @ measured.scores, early @ measured.start / early.sum(axis=1)
    untuned = (weights @ measured.untuned).max(axis=1) if measured.untuned.shape[1] else np.full(len(weights), np.nan)
    left = np.stack([_left(shapes, size) for size in measured.sizes], axis=1)
    top, found, rivals = shapes[:, :1], [], []
    for seen, start, rival in zip(scores, starts, untuned, strict=True):
        misfit = ((to_angle(top - (top - start) * left) - to_angle(seen)) / spread.noise) ** 2
        log_chance = (-(_FREEDOM + 1) / 2 * np.log1p(misfit / _FREEDOM)).sum(axis=1)
        chance = np.exp(log_chance - log_chance.max())
        chosen = shapes[random.choice(len(shapes), _KEPT, p=chance / chance.sum())]
        found.append(np.concatenate([np.full((_KEPT, 1), start), chosen], axis=1))
        rivals.append(np.full(_KEPT, rival))
    curves = np.concatenate(found)
    return Drawn(curves, random.standard_normal(len(curves)), max(measured.sizes), np.concatenate(rivals), spread)


def to_angle(score: Floats) -> Floats:
    """Scores from 0 to 1 as angles, 2 * arcsin(sqrt(score)), in which the noise of a share is alike everywhere."""
    return 2.0 * np.arcsin(np.sqrt(np.clip(score, 0.0, 1.0)))


def from_angle(angle: Floats) -> Floats:
    """The scores of angles; angles beyond an end are at that end."""
    return np.sin(np.clip(angle, 0.0, np.pi) / 2.0) ** 2


def _mean(curves: Floats, rows: float) -> Floats:
    start, top = curves[:, 0], curves[:, 1]
    return top - (top - start) * _left(curves[:, 1:], rows)


def _left(shapes: Floats, rows: float) -> Floats:
    """The share of the way from start to top that is still left after so many rows."""
    _, half, sharp, tail = shapes.T
    left: Floats = (1.0 + (rows / half) ** sharp) ** (-tail / sharp)
    return left


def _shapes(random: np.random.RandomState) -> Floats:
    """Draws of (top, half, sharp, tail) from the priors."""
    many = _CURVES
    top = np.where(random.random_sample(many) < 0.5, random.beta(6.0, 1.2, many), random.random_sample(many))
    half = np.exp(random.normal(np.log(60.0), 1.3, many))
    sharp = np.exp(random.uniform(np.log(0.7), np.log(2.0), many))
    tail = np.exp(random.normal(np.log(0.9), 0.6, many))
    return np.stack([top, half, sharp, tail], axis=1)


def _row_weights(groups: Sequence[str], random: np.random.RandomState) -> NDArray[np.float64]:
    """Weights of the held-out rows, resamplings x rows, each row of one group with the same weight (sum 1)."""
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    drawn = random.standard_exponential((_RESAMPLED, int(index.max()) + 1))[:, index]
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))

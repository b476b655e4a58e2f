"""Extrapolates a learning curve: what a score will be after a training on more rows, as draws from its distribution.

What is extrapolated is the loss of the expected answers, since it falls evenly with the rows long before any answer is
wholly right: scores such as exact matches stay at zero for a while and then rise steeply (Schaeffer et al. 2023, "Are
Emergent Abilities of Large Language Models a Mirage?"). The mean over rows of the logarithm of an answer's loss follows

    log(most * (floor + (1 - floor) * (1 + (n / half) ** sharp) ** (-tail / sharp)))

after a training on n rows: little change from `most` at first, once the form of the answers is learned, then a power
law with exponent `tail` towards a floor, which is a share of `most` (Hestness et al. 2017, "Deep Learning Scaling is
Predictable, Empirically"; Rosenfeld et al. 2020, "A Constructive Prediction of the Generalization Error Across
Scales"). A logistic curve says how the score of an answer depends on its loss; it is fitted to the answers of all
subsets (two steps as in Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2.1).

A few points do not determine four numbers, so no curve is fitted to the losses. Many curves are drawn from broad priors
and weighted by how well they explain what was measured; a forecast is what those curves say. Its spread holds

- which rows were held out: they are resampled by group (a Bayesian bootstrap), those of the untuned candidates with
  the same weights;
- what another seed of the training would change;
- how far real curves stray from the family and from the logistic curve, more with every doubling of the rows beyond
  the largest subset.
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
_LEAST_LOSS = 0.02  # nats: below it a greedy answer is right
_ANSWERS = 2.0  # to one row: see _links
_CHANGES = np.linspace(-9.0, 3.0, 121)  # of the logarithm of a loss, at which mean scores are computed
# The logistic curve before any answer was seen: its middle (a logarithm of a loss) and its slope, as means and standard
# deviations. An answer is as often right as wrong at a loss of one or two nats.
_MIDDLE, _SLOPE = (0.5, 0.7), (2.5, 1.0)


class Spread(NamedTuple):
    """How far what is measured is from its curve, as standard deviations.

    noise: of a mean logarithm of losses, by the seed of the training and by the curve that is closest. stray: of a
    score, as an angle (see `to_angle`), for the first doubling of the rows beyond the largest subset; it grows with the
    square root of the doublings.
    """

    noise: float
    stray: float


# Chosen with what 56 of the cases of `python benchmarks/forecast.py` gave; docs/explanation/forecasts.md has all cases.
SPREAD = Spread(noise=0.06, stray=0.08)


@dataclass(frozen=True, slots=True)
class Subsets:
    """What was measured. sizes: what the rows of each training are worth, ascending.

    losses, scores: of the expected and the given answers, held-out rows x sizes. untuned: scores, held-out rows x
    untuned candidates, NaN for rows that a candidate was not asked. groups: one name for each held-out row.
    """

    sizes: tuple[float, ...]
    losses: Floats
    scores: Floats
    untuned: Floats
    groups: Sequence[str]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Curves drawn for what was measured, with the untuned candidate's score that each is compared with.

    largest: rows of the largest subset. curves: resamplings x curves x (floor, half, sharp, tail). means: resamplings x
    _CHANGES, the mean score where every logarithm of a loss after the largest subset changes by so much. strays:
    resamplings x curves, standard normal. untuned: resamplings; NaN where there is no untuned candidate.
    """

    largest: float
    curves: Floats
    means: Floats
    strays: Floats
    untuned: Floats
    spread: Spread

    def scores(self, rows: float) -> Floats:
        """The mean score after a training on so many rows: one for each draw."""
        change = _log_share(self.curves, rows) - _log_share(self.curves, self.largest)
        found = np.stack([np.interp(moved, _CHANGES, mean) for moved, mean in zip(change, self.means, strict=True)])
        doublings = max(0.0, float(np.log2(max(rows, 1e-9) / self.largest)))
        angles = to_angle(found) + self.strays * self.spread.stray * np.sqrt(doublings)
        return np.asarray(from_angle(angles).ravel())

    def lifts(self, rows: float) -> Floats:
        """The same minus the score of the untuned candidate."""
        return self.scores(rows) - np.repeat(self.untuned, self.curves.shape[1])


def draw_curves(measured: Subsets, seed: int = 0, spread: Spread = SPREAD) -> Drawn:
    """Curves that explain what was measured. The same input gives the same draws."""
    # RandomState's streams are frozen for good (NEP 19): a forecast can be computed again from its record.
    random = np.random.RandomState(seed)
    weights = _row_weights(measured.groups, random)
    logs = np.log(np.maximum(measured.losses, _LEAST_LOSS))
    means, shapes = weights @ logs, _shapes(random)
    shares = np.stack([_log_share(shapes, size) for size in measured.sizes], axis=1)
    curves = np.empty((_RESAMPLED, _KEPT, shapes.shape[1]))
    for place, seen in enumerate(means):
        misfit = seen - shares
        misfit = ((misfit - misfit.mean(axis=1, keepdims=True)) / spread.noise) ** 2
        log_chance = (-(_FREEDOM + 1) / 2 * np.log1p(misfit / _FREEDOM)).sum(axis=1)
        chance = np.exp(log_chance - log_chance.max())
        curves[place] = shapes[random.choice(len(shapes), _KEPT, p=chance / chance.sum())]
    untuned = np.full(len(weights), np.nan)
    if measured.untuned.shape[1]:
        untuned = untuned_means(measured.untuned, weights).max(axis=1)
    links = _links(logs, measured.scores, random)
    moved = logs[:, -1:] + _CHANGES  # held-out rows x changes
    expected = np.stack([weight @ _score(moved, link) for weight, link in zip(weights, links, strict=True)])
    strays = random.standard_normal(curves.shape[:2])
    return Drawn(max(measured.sizes), curves, expected, strays, untuned, spread)


def untuned_means(untuned: Floats, weights: Floats) -> Floats:
    """Mean scores of untuned candidates, resamplings x candidates. weights: of the rows, resamplings x rows, sum 1.

    Each counts half a right and half a wrong answer more than it gave (Jeffreys' prior of a share): a candidate that
    was wrong on its few rows is not known to be wrong always.
    """
    asked = ~np.isnan(untuned)
    many = asked.sum(axis=0)
    share = weights @ asked
    means = (weights @ np.where(asked, untuned, 0.0)) / share
    return np.asarray((means * many + 0.5) / (many + 1.0))


def to_angle(score: Floats) -> Floats:
    """Scores from 0 to 1 as angles, 2 * arcsin(sqrt(score)), in which the noise of a share is alike everywhere."""
    return 2.0 * np.arcsin(np.sqrt(np.clip(score, 0.0, 1.0)))


def from_angle(angle: Floats) -> Floats:
    """The scores of angles; angles beyond an end are at that end."""
    return np.sin(np.clip(angle, 0.0, np.pi) / 2.0) ** 2


def _log_share(curves: Floats, rows: float) -> Floats:
    """The logarithm of the loss after so many rows, as a share of `most`. curves: ... x (floor, half, sharp, tail)."""
    floor, half, sharp, tail = np.moveaxis(curves, -1, 0)
    left = (1.0 + (rows / half) ** sharp) ** (-tail / sharp)
    found: Floats = np.log(floor + (1.0 - floor) * left)
    return found


def _shapes(random: np.random.RandomState) -> Floats:
    """Draws of (floor, half, sharp, tail) from the priors; floor as a share of `most`."""
    many = _CURVES
    floor = 10.0 ** -random.uniform(0.05, 4.0, many)
    half = np.exp(random.normal(np.log(100.0), 1.3, many))
    sharp = np.exp(random.uniform(np.log(0.7), np.log(2.0), many))
    tail = np.exp(random.normal(np.log(0.9), 0.5, many))
    return np.stack([floor, half, sharp, tail], axis=1)


def _row_weights(groups: Sequence[str], random: np.random.RandomState) -> NDArray[np.float64]:
    """Weights of the held-out rows, resamplings x rows, each row of one group with the same weight (sum 1)."""
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    drawn = random.standard_exponential((_RESAMPLED, int(index.max()) + 1))[:, index]
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True))


def _score(logs: Floats, link: Floats) -> Floats:
    """The expected scores of answers whose losses have these logarithms. link: (intercept, slope) of the logit."""
    found: Floats = 1.0 / (1.0 + np.exp(np.clip(link[1] * logs - link[0], -40.0, 40.0)))
    return found


def _links(logs: Floats, scores: Floats, random: np.random.RandomState) -> Floats:
    """Logistic curves (intercept, slope), one for each resampling, drawn around the fit to all answers.

    Answers to one row after several trainings are alike: together they count as _ANSWERS answers at most.
    """
    weight = min(1.0, _ANSWERS / logs.shape[1])
    link, covariance = _fit_link(logs.ravel(), scores.ravel(), np.full(logs.size, weight))
    found = link + random.standard_normal((_RESAMPLED, 2)) @ np.linalg.cholesky(covariance).T
    # A score does not fall where the loss does: with a slope of 0, the intercept is what it then would be.
    below = np.minimum(found[:, 1], 0.0)
    found[:, 0] -= below * covariance[0, 1] / covariance[1, 1]
    found[:, 1] -= below
    return np.asarray(found)


def _fit_link(logs: Floats, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The likeliest (intercept, slope) by Newton's method, and their covariance (Laplace's approximation)."""
    (middle, middle_deviation), (slope, slope_deviation) = _MIDDLE, _SLOPE
    prior = np.array([slope * middle, slope])  # the intercept is the product of slope and middle
    shared = middle * slope_deviation**2
    spread = [[(slope * middle_deviation) ** 2 + middle * shared, shared], [shared, slope_deviation**2]]
    precision = np.linalg.inv(np.array(spread))
    inputs = np.stack([np.ones_like(logs), -logs], axis=1)
    link: Floats = prior
    for _ in range(50):
        expected = _score(logs, link)
        gradient = inputs.T @ (weights * (scores - expected)) - precision @ (link - prior)
        curvature = (inputs * (weights * expected * (1.0 - expected))[:, None]).T @ inputs + precision
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 1.0 / max(float(np.abs(step).max()), 1e-12))
        link = link + step
        if float(np.abs(step).max()) < 1e-6:
            break
    covariance: Floats = np.asarray(np.linalg.inv(curvature), dtype=np.float64)
    return link, covariance

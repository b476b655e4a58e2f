"""A logistic regression that tells two kinds of answers apart, each judged by a model that never saw its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tunesmith.core.digests import digest_of
from tunesmith.evaluation.stats.statistics import Floats
from tunesmith.evaluation.style.features import FORM, Answer, Vocabulary, features, find_vocabulary

_FOLDS: Final = 5
_PENALTY: Final = 1.0  # of the squared weights, as scikit-learn's C = 1
_STEPS: Final = 200
TOP: Final = 8  # features that are named for each side


@dataclass(frozen=True, slots=True)
class Told:
    """For each set of answers, the probability that each is the house's; and the features that decided most.

    by_form: the same for references and base answers, from the form alone. house, base: features of either side.
    """

    probabilities: Mapping[str, Floats]
    by_form: Mapping[str, Floats]
    house: tuple[str, ...]
    base: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    vocabulary: Vocabulary
    mean: Floats
    scale: Floats
    weights: Floats
    intercept: float
    columns: slice

    def probability(self, answers: Sequence[Answer]) -> Floats:
        from scipy.special import expit

        found = (features(answers, self.vocabulary) - self.mean) / self.scale
        return np.asarray(expit(found[:, self.columns] @ self.weights + self.intercept), dtype=np.float64)


def cross_fitted(sets: Mapping[str, Sequence[Answer]], house: str, base: str, groups: Sequence[str]) -> Told:
    """Judge every answer by a model that was fitted to the house's and the base's answers of other groups.

    sets: name -> answers, one for each row. house, base: the sets that are told apart. groups: one for each row.
    """
    fold = _folds(groups)
    probabilities = {name: np.zeros(len(groups)) for name in sets}
    by_form = {name: np.zeros(len(groups)) for name in (house, base)}
    weights: dict[str, float] = {}
    for number in range(_FOLDS):
        inside, outside = (np.flatnonzero(each).tolist() for each in (fold == number, fold != number))
        if not inside:
            continue
        answers = [sets[name][row] for name in (house, base) for row in outside]
        labels = np.repeat([1.0, 0.0], len(outside))
        vocabulary = find_vocabulary(answers, [groups[row] for row in outside] * 2)
        seen = features(answers, vocabulary)
        model = _fitted(seen, labels, vocabulary, slice(None))
        plain = _fitted(seen, labels, vocabulary, slice(len(FORM)))
        for name, own in sets.items():
            probabilities[name][inside] = model.probability([own[row] for row in inside])
        for name, told in by_form.items():
            told[inside] = plain.probability([sets[name][row] for row in inside])
        for feature, weight in zip(vocabulary.names, model.weights, strict=True):
            weights[feature] = weights.get(feature, 0.0) + float(weight)
    ranked = sorted(weights, key=lambda name: (-round(weights[name], 6), name))
    return Told(
        probabilities,
        by_form,
        tuple(name for name in ranked[:TOP] if weights[name] > 0),
        tuple(name for name in ranked[::-1][:TOP] if weights[name] < 0),
    )


def _folds(groups: Sequence[str]) -> np.ndarray:
    """The fold of each row: whole groups, in an order that only their names decide, dealt one after another."""
    ordered = sorted(set(groups), key=lambda group: digest_of(["style", group]))
    place = {group: number % _FOLDS for number, group in enumerate(ordered)}
    return np.array([place[group] for group in groups])


def _fitted(seen: Floats, labels: Floats, vocabulary: Vocabulary, columns: slice) -> _Model:
    """The model of least penalised loss. Columns have unit variance, so that the penalty treats them alike."""
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, scale = seen.mean(axis=0), seen.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    rows = ((seen - mean) / scale)[:, columns]
    sign = 2.0 * labels - 1.0

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = sign * (rows @ point[:-1] + point[-1])
        slope = -sign * expit(-margin)
        value = float(np.logaddexp(0.0, -margin).sum() + 0.5 * _PENALTY * point[:-1] @ point[:-1])
        return value, np.append(rows.T @ slope + _PENALTY * point[:-1], slope.sum())

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    return _Model(vocabulary, mean, scale, found.x[:-1], float(found.x[-1]), columns)

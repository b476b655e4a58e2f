"""Metrics of classification tasks: macro-F1, results by label, calibration error and Brier score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.metrics.labels import Labelled
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import Floats, Interval, group_weights, interval, resampled
from tunesmith.records.evaluation import (
    Calibration,
    CalibrationBin,
    ClassResults,
    Confusion,
    LabelResult,
    MetricInterval,
)

_DRAWS = 2_000
_BINS = 10
_SHOWN = 40


def classes(
    given: Sequence[str], wanted: Sequence[str], groups: Sequence[str], confidence: float, seed: int
) -> ClassResults:
    """Macro-F1 with an interval, and the results by label.

    given, wanted, groups: one entry per row. Macro-F1 is the mean F1 of the labels that occur in wanted, as in
    scikit-learn's f1_score with those labels. The interval is a Bayesian bootstrap over groups (Rubin 1981).
    """
    labels = sorted(set(wanted))
    right, said, held = _counts(given, wanted, groups)
    each = _f1(right.sum(0), said.sum(0), held.sum(0))
    # RandomState's streams never change (NEP 19), so the record can be computed again years later.
    weights = np.random.RandomState(seed).standard_exponential((_DRAWS, len(held)))
    drawn = _f1(weights @ right, weights @ said, weights @ held).mean(axis=-1)
    tail = (1.0 - confidence) / 2.0
    mean = float(each.mean())
    low, high = (float(np.quantile(drawn, q)) for q in (tail, 1.0 - tail))
    order = sorted(range(len(labels)), key=lambda n: (-held.sum(0)[n], labels[n]))[:_SHOWN]
    wrong = Counter((truth, answer) for truth, answer in zip(wanted, given, strict=True) if truth != answer)
    most = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:10]
    return ClassResults(
        macro_f1=MetricInterval(mean=rounded(mean), low=rounded(min(low, mean)), high=rounded(max(high, mean))),
        labels=len(labels),
        by_label=tuple(
            LabelResult(label=labels[n], n=int(held.sum(0)[n]), said=int(said.sum(0)[n]), f1=rounded(each[n]))
            for n in order
        ),
        confused=tuple(Confusion(wanted=truth, given=answer, n=count) for (truth, answer), count in most),
    )


def calibration(confidences: Sequence[float], right: Sequence[float]) -> Calibration:
    """The difference between stated confidences and accuracy.

    confidences: 0 to 1, one per row; right: 0 or 1. ece: expected calibration error over ten bins of equal width (Guo
    et al. 2017). brier: mean squared error of the confidences (Brier 1950). bins: the bins that have rows.
    """
    stated, truth = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    which = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        inside = which == number
        if not inside.any():
            continue
        confidence, accuracy = float(stated[inside].mean()), float(truth[inside].mean())
        error += inside.mean() * abs(confidence - accuracy)
        figures = {"confidence": rounded(confidence), "right": rounded(accuracy)}
        bins.append(CalibrationBin(low=number / _BINS, n=int(inside.sum()), **figures))
    return Calibration(
        n=len(stated),
        ece=rounded(float(error)),
        brier=rounded(float(np.mean((stated - truth) ** 2))),
        bins=tuple(bins),
    )


def macro_f1_interval(rows: Labelled, confidence: float, seed: int) -> Interval:
    """Macro-F1 with the interval that gates use: a Bayesian bootstrap over groups (Rubin 1981).

    As in statistics.py, a worst-case group is added. It has the mean size and the label frequencies of all rows. None
    of its answers are right for the lower end, all of them for the upper end.
    """
    right, said, held = _counts(rows.given, rows.wanted, rows.groups)
    mean = float(_f1(right.sum(0), said.sum(0), held.sum(0)).mean())
    more = held.sum(0) / len(held)  # the labels of a mean group

    def of(weights: Floats, extra: Floats) -> tuple[Floats, Floats]:
        added = extra * more
        sums = weights @ right, weights @ said + added, weights @ held + added
        return _f1(*sums).mean(axis=-1), _f1(sums[0] + added, *sums[1:]).mean(axis=-1)

    return _ends(mean, of, len(held), confidence, seed)


def calibration_error_interval(rows: Labelled, confidence: float, seed: int) -> Interval:
    """Expected calibration error as in `calibration`, with an interval as in `macro_f1_interval`.

    The added group has an error of 1 on every row for the upper end, and of 0 for the lower end. A bin with few rows
    has an error above 0 even where the confidences are right, so the estimate is too high rather than too low. The
    lower end takes that noise off: where a bin's error changes its sign in a draw, three times its size is subtracted
    from the others. Raises Inconclusive where confidences are not stated.
    """
    stated, truth = np.array(_confidences(rows)), rows.right
    index, sizes = _by_group(rows.groups)
    bins = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    gaps = np.zeros((len(sizes), _BINS))
    np.add.at(gaps, (index, bins), stated - truth)
    mean = float(np.abs(gaps.sum(0)).sum() / sizes.sum())
    signs = np.sign(gaps.sum(0))

    def of(weights: Floats, extra: Floats) -> tuple[Floats, Floats]:
        added = extra[:, 0] * sizes.mean()
        drawn, total = weights @ gaps, weights @ sizes + added
        off = np.abs(drawn).sum(axis=-1)
        # The sum of absolute errors holds the noise of the rows and that of the draw; 2 * signed - off holds neither.
        return np.maximum(0.0, 2.0 * (drawn @ signs) - off) / total, (off + added) / total

    return _ends(mean, of, len(sizes), confidence, seed)


def brier_interval(rows: Labelled, confidence: float, seed: int) -> Interval:
    """Mean squared error of the stated confidences, with its interval.

    Raises Inconclusive where confidences are not stated.
    """
    off = (np.array(_confidences(rows)) - rows.right) ** 2
    return interval(off, rows.groups, ends=(0.0, 1.0), confidence=confidence, seed=seed)


def _confidences(rows: Labelled) -> tuple[float, ...]:
    if rows.confidences is None:
        raise Inconclusive("some answers state no confidence: set the scorer's calibrate, or the endpoint's logprobs")
    return rows.confidences


def _counts(given: Sequence[str], wanted: Sequence[str], groups: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """Three arrays of groups x labels (sorted): how often a label was given rightly, was given, and was wanted."""
    labels = sorted(set(wanted))
    place = {label: number for number, label in enumerate(labels)}
    index, sizes = _by_group(groups)
    right, said, held = (np.zeros((len(sizes), len(labels))) for _ in range(3))
    for group, answer, truth in zip(index, given, wanted, strict=True):
        held[group, place[truth]] += 1
        if answer in place:
            said[group, place[answer]] += 1
        right[group, place[truth]] += answer == truth
    return right, said, held


def _by_group(groups: Sequence[str]) -> tuple[Any, Floats]:
    """Each row's group as an index, and the size of each group."""
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    return index, np.bincount(index).astype(np.float64)


def _ends(
    mean: float,
    of: Callable[[Floats, Floats], tuple[Floats, Floats]],
    groups: int,
    confidence: float,
    seed: int,
) -> Interval:
    """The interval of a figure from resampled groups.

    of: (weights of the groups, draws x groups; weights of the added group, draws x 1) -> the figure in each draw with
    the added group at its worst, and at its best.
    """
    drawn = [of(weights[:, :groups], weights[:, groups:]) for weights in group_weights(groups + 1, confidence, seed)]
    below, above = (np.concatenate([pair[side] for pair in drawn]) for side in (0, 1))
    return resampled(mean, below, above, confidence)


def _f1(right: Any, said: Any, held: Any) -> Any:
    whole = said + held
    return np.divide(2.0 * right, whole, out=np.zeros_like(whole), where=whole > 0)

"""Classification beyond accuracy: macro-F1, labels one by one, and whether a stated confidence can be believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.evaluation.scores import rounded

_DRAWS = 2_000
_BINS = 10
_SHOWN = 40


def classes(given: Sequence[str], wanted: Sequence[str], groups: Sequence[str], confidence: float, seed: int) -> Any:
    """Macro-F1 with an interval, and the labels one by one: {"macro_f1", "labels", "by_label", "confused"}.

    given, wanted, groups: one a row. Macro-F1 is the mean of F1 over the labels that occur in wanted, as scikit-learn's
    f1_score with those labels gives it. Its interval is a Bayesian bootstrap over groups (Rubin 1981).
    """
    labels = sorted(set(wanted))
    place = {label: number for number, label in enumerate(labels)}
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    shape = (int(index.max()) + 1, len(labels))
    right, said, held = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for group, answer, truth in zip(index, given, wanted, strict=True):
        held[group, place[truth]] += 1
        if answer in place:
            said[group, place[answer]] += 1
        right[group, place[truth]] += answer == truth
    each = _f1(right.sum(0), said.sum(0), held.sum(0))
    # RandomState's streams are frozen (NEP 19): the record must come out the same years later.
    weights = np.random.RandomState(seed).standard_exponential((_DRAWS, shape[0]))
    drawn = _f1(weights @ right, weights @ said, weights @ held).mean(axis=-1)
    tail = (1.0 - confidence) / 2.0
    mean = float(each.mean())
    low, high = (float(np.quantile(drawn, q)) for q in (tail, 1.0 - tail))
    order = sorted(range(len(labels)), key=lambda n: (-held.sum(0)[n], labels[n]))[:_SHOWN]
    wrong = Counter((truth, answer) for truth, answer in zip(wanted, given, strict=True) if truth != answer)
    return {
        "macro_f1": {"mean": rounded(mean), "low": rounded(min(low, mean)), "high": rounded(max(high, mean))},
        "labels": len(labels),
        "by_label": [
            {"label": labels[n], "n": int(held.sum(0)[n]), "said": int(said.sum(0)[n]), "f1": rounded(float(each[n]))}
            for n in order
        ],
        "confused": [
            {"wanted": truth, "given": answer, "n": count}
            for (truth, answer), count in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:10]
        ],
    }


def calibration(confidences: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """How far stated confidences are from how often they were right: {"n", "ece", "brier", "bins"}.

    confidences: 0 to 1, one a row; right: 0 or 1. ece: expected calibration error over ten bins of equal width (Guo et
    al. 2017). brier: mean squared error of the confidence (Brier 1950). bins: those with rows.
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
        bins.append(
            {
                "low": number / _BINS,
                "n": int(inside.sum()),
                "confidence": rounded(confidence),
                "right": rounded(accuracy),
            }
        )
    return {
        "n": len(stated),
        "ece": rounded(float(error)),
        "brier": rounded(float(np.mean((stated - truth) ** 2))),
        "bins": bins,
    }


def _f1(right: Any, said: Any, held: Any) -> Any:
    whole = said + held
    return np.divide(2.0 * right, whole, out=np.zeros_like(whole), where=whole > 0)

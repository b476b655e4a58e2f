"""Scores as the table shows them, with what the test requests alone leave open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.evaluation.stats.statistics import Level, interval

NOT_YET = "see below"


def mean_of(scores: Sequence[float]) -> str:
    """A mean with its 95% interval."""
    rows = [str(place) for place in range(len(scores))]
    found = interval(np.array(scores), rows, (0.0, 1.0), Level(0.95, 0))
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


Pairs = Sequence[tuple[Sequence[float], Sequence[float]]]  # of each task, both models' scores on the same requests


def gap(pairs: Pairs) -> tuple[float, float]:
    """The mean over tasks of two models' mean difference in score, in points, and half of its 95% interval."""
    each = [np.subtract(one, other) for one, other in pairs]
    variance = sum(float(np.var(one)) / len(one) for one in each)
    mean = float(np.mean([np.mean(one) for one in each]))
    return 100 * mean, 100 * 1.96 * variance**0.5 / len(each)


def difference(pairs: Pairs) -> str:
    """`gap` as text."""
    mean, half = gap(pairs)
    return f"{mean:+.1f} ± {half:.1f}"

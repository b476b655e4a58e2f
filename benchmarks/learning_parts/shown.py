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


def difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    """The mean over tasks of the mean difference between two models' scores, in points, with half of its 95% interval.

    pairs: of each task, the scores of both models' answers to the same requests.
    """
    each = [np.subtract(one, other) for one, other in pairs]
    variance = sum(float(np.var(one)) / len(one) for one in each)
    mean = float(np.mean([np.mean(one) for one in each]))
    return f"{100 * mean:+.1f} ± {100 * 1.96 * variance**0.5 / len(each):.1f}"

"""Made-up scores and losses of trainings on subsets, for tests of forecasts."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from tunesmith.evaluation.stats.learning_curve import Floats, Subsets

_SPREAD = 0.8  # of the logarithms of a training's losses
_MIDDLE = 0.5  # an answer with this logarithm of its loss is as often right as wrong


def made_up(
    sizes: tuple[float, ...],
    means: list[float],
    *,
    untuned: float | None = 0.4,
    rows: int = 240,
    each: int = 1,
    seed: int = 0,
) -> Subsets:
    """Answers of which these shares are right, with losses that fit them; the rows of a group are all as hard.

    untuned: the share of an untuned candidate, None for none. each: rows of a group.
    """
    draw = np.random.RandomState(seed)
    hard = np.repeat(draw.permutation((np.arange(-(-rows // each)) + 0.5) / -(-rows // each)), each)[:rows]
    normal = NormalDist()
    deviations = np.array([normal.inv_cdf(float(one)) for one in hard])
    shifts = np.array([normal.inv_cdf(min(0.998, max(0.002, mean))) for mean in means])
    logs = _MIDDLE + _SPREAD * (deviations[:, None] - shifts) + 0.2 * draw.standard_normal((rows, len(shifts)))
    scores = (hard[:, None] < np.array(means)).astype(float)
    others: Floats = np.empty((rows, 0))
    if untuned is not None:
        others = (draw.random_sample(rows) < untuned).astype(float)[:, None]
    return Subsets(sizes, np.exp(logs), scores, others, [str(place // each) for place in range(rows)])

"""What more time would bring a training whose budget or epochs ended before validation stopped improving."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.core.values import View
from tunesmith.records.training import TrainingBody, ValidationPoint
from tunesmith.training.schedule import ALL_EPOCHS

_FEWEST = 5  # validations that a slope is read from: with fewer, its interval says nothing
_LATER = 2 / 3  # share of the training that the slope is read from: early gains say little about later ones
_LEVEL = 0.9


class Gain(View):
    """A gain in the score's unit with a 90% interval."""

    mean: float
    low: float
    high: float


class MoreTime(View):
    """What more time would bring, in words. gain: of twice the time, None where it cannot be said; validations: number
    it was read from."""

    text: str
    gain: Gain | None = None
    validations: int = 0


def more_time(training: TrainingBody) -> MoreTime | None:
    """What twice the time would bring to a training; None where nothing was validated.

    Scores rise about in proportion to the logarithm of time, so the gain of doubling it is read from the slope of the
    later validations before the learning rate fell; where it falls all the time, no gain can be read.
    """
    if not training.validation:
        return None
    if (unsaid := _without_gain(training)) is not None:
        return MoreTime(text=unsaid)
    points, best = _later(training), max(each.score or 0.0 for each in training.validation)
    if len(points) < _FEWEST:
        few = f"{len(points)} of the validations at a constant learning rate count"
        return MoreTime(text=f"{few}, too few to say what more time would bring.")
    if best == 1.0:
        return MoreTime(text="Every validation row was right, so more time is not expected to bring more.")
    gain = _gain(points, training.score.rows if training.score else 1, best)
    low, mean, high = (round(100 * each, 1) + 0.0 for each in (gain.low, gain.mean, gain.high))  # + 0.0: never -0.0
    read = f"read from {len(points)} validations, 90% interval {low:+.1f} to {high:+.1f}"
    if gain.low > 0:
        text = f"Validation was still improving: twice the time would bring about {mean:+.1f} points ({read})."
    else:
        text = f"Whether more time would help is not clear: twice the time would bring {mean:+.1f} points ({read})."
    return MoreTime(text=text, gain=gain, validations=len(points))


def _without_gain(training: TrainingBody) -> str | None:
    """What can be said where scores say nothing of a gain; None where they may."""
    decays = training.decisions.decays if training.decisions else ()
    # Why the learning rate fell, or why the training ended; empty where its plan was done.
    reason, settings = (decays[0].reason if decays else training.ended) or "", training.settings
    if reason.startswith("no "):
        return f"Validation stopped the training ({reason}), so more time is not expected to bring more."
    if reason == ALL_EPOCHS and settings.budget is not None:
        return (
            f"The training ended after {settings.epochs} epochs, the most that a budget reads, so a longer budget "
            f"changes nothing; `epochs: {2 * settings.epochs}` with `schedule: wsd` would go on."
        )
    if settings.schedule in ("cosine", "linear"):
        return "The learning rate fell during the whole training, so its scores do not say what more time would bring."
    return _by_probability(training.validation) if training.validation[-1].score is None else None


def _by_probability(validation: Sequence[ValidationPoint]) -> str:
    values = [each.probability for each in validation if each.probability is not None]  # earlier records have none
    if len(values) < 2:
        return "These validations are too few to say what more time would bring."
    if max(values[:-1]) >= values[-1]:
        return (
            "The probability of the expected answers no longer rose at the end, so more time is not expected to bring "
            "more."
        )
    return (
        f"The probability of the expected answers' tokens still rose at the end, from {values[-2]:.1%} to "
        f"{values[-1]:.1%}; how many points of the metric more time would bring, it does not say."
    )


def _later(training: TrainingBody) -> list[tuple[float, float]]:
    """Logarithm of the seconds, and score, of the later validations before the learning rate fell."""
    decays = training.decisions.decays if training.decisions else ()
    last = decays[0].start if decays else training.validation[-1].step
    seconds = np.cumsum([step.seconds for step in training.curve])
    first = (1 - _LATER) * last
    return [
        (math.log(seconds[each.step - 1]), each.score)
        for each in training.validation
        if each.score is not None and first <= each.step <= last
    ]


def _gain(points: Sequence[tuple[float, float]], rows: int, best: float) -> Gain:
    """The gain of doubling the time by the least-squares line through (log seconds, score).

    rows: that each score is the mean of. A score is not known better than to one of them. best: the best score, to
    which no gain adds up to less than 0 or more than 1.
    """
    from scipy.stats import t

    x, y = np.array(points).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residuals = y - y.mean() - slope * x
    noise = max(float(residuals @ residuals) / (len(points) - 2), rows**-2)
    error = math.sqrt(noise / float(x @ x))
    reach = float(t.ppf(0.5 + _LEVEL / 2, len(points) - 2)) * error
    mean, low, high = (
        min(1.0 - best, max(-best, math.log(2) * value)) for value in (slope, slope - reach, slope + reach)
    )
    return Gain(mean=mean, low=low, high=high)

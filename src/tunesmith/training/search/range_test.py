"""Suggests a learning rate by a range test: a short training whose learning rate rises exponentially.

Method: Smith 2015, "Cyclical Learning Rates for Training Neural Networks". The loss stays where it is at too low a
rate, falls at a good one and rises at too high a one; 40 steps on the training's own batches pass through all three.
The suggestion is a tenth of the rate at the lowest smoothed loss (Howard and Gugger 2020, "fastai: A Layered API for
Deep Learning"): there the loss still falls, a decade before it begins to rise. The other common rule, the rate where
the loss falls most steeply, uses differences of neighbouring losses; between single batches these vary more than a step
at a low rate changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.core.view import View
from tunesmith.engines.training_protocol import Objective, TrainableModel
from tunesmith.training.batches.batch_plan import Step
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, update

RULE = "a tenth of the rate at the lowest smoothed loss"
STEPS = 40
_LOWEST, _HIGHEST = 1e-6, 1.0  # the highest is not reached: a training's rate must be below it
_SMOOTHING = 0.8  # fastai's 0.98 would lag half of 40 steps behind
_DIVERGED = 4.0  # times the lowest smoothed loss


class RateSearch(View):
    """Result of a range test: the rate, the loss and the smoothed loss of each step, up to where the loss diverged.

    suggestion: by the rule; None where the loss was lowest within the first decade of rates, so that no rate lowered
    it. b_rate: what B's rate was as a multiple, which belongs to the suggestion.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    b_rate: float
    rule: str = RULE


def rates() -> list[float]:
    """The rate of each step, a fixed multiple of the one before it."""
    return [_LOWEST * (_HIGHEST / _LOWEST) ** (step / STEPS) for step in range(STEPS)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average after each loss, with the bias correction of Adam's moments."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        found.append(mean / (1 - _SMOOTHING**count))
    return found


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate that RULE suggests; None where it is lower than all rates tried."""
    lowest = min(range(len(smoothed)), key=lambda step: smoothed[step])
    suggestion = rates[lowest] / 10
    return suggestion if suggestion >= rates[0] else None


def range_test(
    model: TrainableModel, objective: Objective, steps: Iterable[Step], settings: TrainSettings, progress: Progress
) -> RateSearch:
    """Train a model on up to STEPS of steps at rising rates. Its weights are useless afterwards.

    Ends where the smoothed loss is four times the lowest, or where a loss (which is not returned) or a gradient is not
    finite. Raises TunesmithError where the first loss is not.
    """
    optimizer = make_optimizer(model, settings)
    losses: list[float] = []
    with progress.task("trying learning rates", STEPS) as task:
        for rate, step in zip(rates(), steps, strict=False):
            loss = gradients(model, objective, step)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed = smooth(losses)
            task.note(f"rate {rate:.1e}, loss {loss:.3f}")
            task.advance()
            if smoothed[-1] > _DIVERGED * min(smoothed):
                break
            if not math.isfinite(update(model, optimizer, rate, settings.clip)):
                break
    if not losses:
        raise TunesmithError("the loss is not finite before the first update", where="base", fix="check its weights")
    tried, smoothed = rates()[: len(losses)], smooth(losses)
    suggestion = suggest(tried, smoothed)
    return RateSearch(rates=tried, losses=losses, smoothed=smoothed, suggestion=suggestion, b_rate=settings.b_rate)

"""Which learning rate to train at, from a range test: one short run whose rate rises exponentially.

Method: Smith 2015, "Cyclical Learning Rates for Training Neural Networks". Too low a rate leaves the loss where it is,
a good one lets it fall, too high a one drives it up; 40 steps on the training's own batches pass through all three.
The rate that is suggested is a tenth of the one at the lowest smoothed loss, the rule of Howard and Gugger 2020
("fastai: A Layered API for Deep Learning"): there the loss still falls, a decade before it would begin to rise. The
other rule in use, the rate of the steepest fall, is a difference of neighbouring losses, and those of single batches
differ by more than a step at a low rate changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native.network.network import Network
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainable import Trained
from tunesmith.training.trainer import Step, gradients, make_optimizer, update

RULE = "a tenth of the rate at the lowest smoothed loss"
STEPS = 40
_FROM, _TO = 1e-6, 1.0  # _TO itself is not reached: a training's rate must be below it
_KEPT = 0.8  # of the smoothed loss at each step; fastai's 0.98 would lag half of 40 steps behind
_DIVERGED = 4.0


class RateSearch(BaseModel):
    """What a range test found: a step's rate, its loss, and the losses smoothed; ends where they diverged.

    suggestion: by rule; None where the loss was lowest within the first decade of rates: then none made it fall.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    rule: str = RULE


def rates() -> list[float]:
    """The rate of each step, each the same multiple of the one before it."""
    return [_FROM * (_TO / _FROM) ** (step / STEPS) for step in range(STEPS)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential mean after each loss, its bias towards zero corrected as Adam corrects its moments."""
    mean, found = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _KEPT * mean + (1 - _KEPT) * loss
        found.append(mean / (1 - _KEPT**count))
    return found


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """What RULE says; None where that is a rate below all that were tried."""
    lowest = min(range(len(smoothed)), key=lambda step: smoothed[step])
    suggestion = rates[lowest] / 10
    return suggestion if suggestion >= rates[0] else None


def range_test(
    network: Network | HFModel, trained: Trained, steps: Iterable[Step], settings: TrainSettings, progress: Progress
) -> RateSearch:
    """Train trained on up to STEPS of steps at rising rates; its weights are spoilt afterwards.

    Ends where the smoothed loss is four times the lowest, or a loss (which is not returned) or a gradient is no number.
    Raises TunesmithError where the first loss is none.
    """
    optimizer = make_optimizer(trained, settings)
    losses: list[float] = []
    with progress.task("trying learning rates", STEPS) as task:
        for rate, step in zip(rates(), steps, strict=False):
            loss = gradients(network, trained, step)
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed = smooth(losses)
            task.note(f"rate {rate:.1e}, loss {loss:.3f}")
            task.advance()
            if smoothed[-1] > _DIVERGED * min(smoothed):
                break
            if not math.isfinite(update(trained, optimizer, rate, settings.clip)):
                break
    if not losses:
        raise TunesmithError("the loss is no number before the first update", where="base", fix="check its weights")
    tried, smoothed = rates()[: len(losses)], smooth(losses)
    return RateSearch(rates=tried, losses=losses, smoothed=smoothed, suggestion=suggest(tried, smoothed))

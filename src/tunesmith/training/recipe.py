"""The settings that fit a training's rows and base, where the project leaves them open."""

from __future__ import annotations

import math

from tunesmith.training.settings import TrainSettings

# Measured on a base of width 576 (`python benchmarks/study.py --table`): with four times the rate for B, which starts
# at zero (LoRA+), 1,000 rows of slots give 7 points more. 200 rows make few steps, and want twice the rate.
_B_RATE, _MOST = 4.0, 2.0
_MANY, _FEW = 1000, 200  # rows from which, and up to which, the multiple of the rate does not change
_WIDEST = 1024  # wider bases want lower rates, and were not measured
# The same table: one epoch leaves most of 200 rows unlearned, and ten learn them. On 1,000 rows three do.
_READ = 3000  # rows to read in all
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 10


def fit_to_rows(settings: TrainSettings, rows: int, width: int | None) -> TrainSettings:
    """The settings with the epochs and the rates for so many rows and the base, where they state none.

    Without a budget, rows are read three times, and fewer than 1,000 more often, up to ten times. An adapter's default
    rate holds from 1,000 rows on, is twice as much for up to 200, and in between falls with a power of the rows. B has
    four times as much. Where `learning_rate` or `b_rate` is stated, both are as stated or as their defaults, and so
    they are for adapters that were not measured: PiSSA, rsLoRA, DoRA. Canaries are among the rows but do not count: a
    training with them shows what the training without them memorises. width: of the base's hidden states, None where
    it is not known.
    """
    if settings.canaries:
        rows -= settings.canaries.added
    settings = settings.model_copy(update={"epochs": epochs_for(settings, rows)})
    stated = settings.model_fields_set & {"learning_rate", "b_rate"}
    plain = settings.method == "lora" and (settings.start, settings.scaling, settings.dora) == ("zero", "rank", False)
    if stated or not plain or width is None or width > _WIDEST:
        return settings
    share = math.log(_MANY / min(_MANY, max(_FEW, rows))) / math.log(_MANY / _FEW)
    rate = float(f"{settings.learning_rate * _MOST**share:.3g}")
    return settings.model_copy(update={"b_rate": _B_RATE, "learning_rate": rate})


def epochs_for(settings: TrainSettings, rows: int) -> int:
    """How often a training with these settings reads so many rows, at most."""
    return round(usual_epochs(rows)) if leaves_epochs_open(settings) else settings.epochs


def leaves_epochs_open(settings: TrainSettings) -> bool:
    """Whether the number of rows decides how often they are read."""
    return settings.budget is None and "epochs" not in settings.model_fields_set


def usual_epochs(rows: float) -> float:
    """How often a training that states neither epochs nor a budget reads so many rows, before rounding."""
    return min(_MOST_EPOCHS, max(_LEAST_EPOCHS, _READ / rows))

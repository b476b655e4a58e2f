"""The settings that fit a training's rows, where the project leaves them open."""

from __future__ import annotations

import math

from tunesmith.training.settings import TrainSettings

# Measured with adapters of rank 16 on a base of width 576 (`python benchmarks/study.py --table`): on 50 and on 200 rows
# three times the rate gives 2 and 5 points more, on 1,000 rows it gives no more. Ten times is too much.
_MANY, _FEW = 1000, 200  # rows from which, and up to which, the multiple does not change
_MOST = 3.0
_WIDEST = 1024  # wider bases want lower rates, and were not measured
# The same table: one epoch leaves most of 200 rows unlearned, and ten learn them. On 1,000 rows three do.
# Its second round: four times the rate for B, which starts at zero (LoRA+), give 7 points more on 1,000 rows of slots.
_B_RATE = 4.0
_READ = 3000  # rows to read in all
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 10


def fit_to_rows(settings: TrainSettings, rows: int, width: int | None) -> TrainSettings:
    """The settings with the epochs and the learning rate for so many rows, where they state none: few rows make few
    steps.

    Without a budget, rows are read three times, and fewer than 1,000 more often, up to ten times. An adapter's default
    rate holds from 1,000 rows on. It is three times as much for up to 200 rows, and in between falls with a power of
    the rows; that of B is four times as much. width: of the base's hidden states, None where it is not known; wide
    bases and full training keep their rates.
    """
    settings = settings.model_copy(update={"epochs": epochs_for(settings, rows)})
    if settings.method != "lora" or width is None or width > _WIDEST:
        return settings
    if settings.start == "zero" and "b_rate" not in settings.model_fields_set:
        settings = settings.model_copy(update={"b_rate": _B_RATE})
    if "learning_rate" in settings.model_fields_set:
        return settings
    share = math.log(_MANY / min(_MANY, max(_FEW, rows))) / math.log(_MANY / _FEW)
    rate = float(f"{settings.learning_rate * _MOST**share:.3g}")
    return settings.model_copy(update={"learning_rate": rate})


def epochs_for(settings: TrainSettings, rows: int) -> int:
    """How often a training with these settings reads so many rows, at most."""
    if settings.budget is not None or "epochs" in settings.model_fields_set:
        return settings.epochs
    return min(_MOST_EPOCHS, max(_LEAST_EPOCHS, round(_READ / rows)))

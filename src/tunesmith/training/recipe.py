"""The settings that fit a training's rows, where the project leaves them open."""

from __future__ import annotations

import math

from tunesmith.training.settings import TrainSettings

# Measured with adapters of rank 16 on a base of 135 million parameters (`python benchmarks/study.py --table`): on 50 to
# 200 rows three times the rate gives 2 to 5 points more, on 1,000 rows it gives no more.
_MANY, _FEW = 1000, 200  # rows from which, and up to which, the multiple does not change
_MOST = 3.0


def fit_to_rows(settings: TrainSettings, rows: int) -> TrainSettings:
    """The settings with a learning rate for so many rows, unless they state one: few rows make few steps.

    An adapter's default holds from 1,000 rows on. It is three times as much for up to 200 rows, and in between falls
    with a power of the rows. Full training keeps its default.
    """
    if "learning_rate" in settings.model_fields_set or settings.method != "lora":
        return settings
    share = math.log(_MANY / min(_MANY, max(_FEW, rows))) / math.log(_MANY / _FEW)
    rate = float(f"{settings.learning_rate * _MOST**share:.3g}")
    return settings.model_copy(update={"learning_rate": rate})

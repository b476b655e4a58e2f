"""The trainings on subsets of the rows from which a learning curve is read."""

from __future__ import annotations

import math

from tunesmith.training.settings import TrainSettings

_LEAST_BATCH = 2
_SMALLEST, _MOST = 12, 4  # rows of the smallest subset, and how many subsets there are
_SHARE, _LEAST = 1 / 16, 100  # of the rows, in the largest subset by default; and rows, where half of all are as many


def subset_sizes(rows: int, largest: int | None = None) -> list[int]:
    """The rows of up to four subsets, each half of the next. largest: rows of the largest one."""
    top = min(largest or max(_LEAST, round(_SHARE * rows)), rows // 2)
    return [top >> step for step in reversed(range(_MOST)) if top >> step >= _SMALLEST]


def subset_settings(settings: TrainSettings, rows: int, whole: int) -> TrainSettings:
    """How a candidate with these settings is trained on so many of all rows.

    The recipe is the whole training's: its share of the budget, or the epochs that the settings state or leave open.
    Batches shrink with the square root of the rows, so that both the steps and the rows of a step grow evenly. The last
    weights are kept, and nothing is validated or rehearsed: that would take much of so short a training.
    """
    batch = max(min(_LEAST_BATCH, settings.batch), round(settings.batch * math.sqrt(rows / whole)))
    budget = None if settings.budget is None else settings.budget * rows / whole
    changes = {"rows": rows, "budget": budget, "batch": batch, "rehearse": 0.0, "keep": "last", "patience": None,
               "validate_by": "loss", "validations": 1, "validation_rows": 1}  # fmt: skip
    return TrainSettings.model_validate({**settings.model_dump(exclude_unset=True), **changes})

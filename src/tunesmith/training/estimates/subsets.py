"""The short trainings of a forecast: nested subsets of the training rows, and the settings of each."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tunesmith.data.dataset import Example
from tunesmith.training.settings import TrainSettings

_LEAST_BATCH = 2


def nested(rows: Sequence[Example], seed: int) -> list[Example]:
    """The rows in the order in which subsets grow: a subset of n rows is the first n.

    Whole groups follow each other, as they would be collected: rows drawn one by one would show nearly every group
    early, and make a small subset look better than it is.
    """
    members: dict[str, list[Example]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        members.setdefault(row.group, []).append(row)
    groups = sorted(members)
    random.Random(seed).shuffle(groups)
    return [row for group in groups for row in members[group]]


def subset_settings(
    settings: TrainSettings, rows: int, whole: int, epochs: int, budget: float | None = None
) -> TrainSettings:
    """How a candidate with these settings is trained on so many of all rows: for a number of epochs, with the learning
    rate falling at the end. budget: seconds after which it ends in any case.

    Batches shrink with the square root of the rows. So both the steps and the rows of a step grow evenly up to the
    whole training's: with batches of one size small subsets would measure that they have few steps, and with one number
    of steps the curve would bend where the batches cease to grow. What the settings leave open stays open, and is made
    to fit the subset's rows. Nothing is rehearsed: drawing it would take much of so short a training.
    """
    batch = max(min(_LEAST_BATCH, settings.batch), round(settings.batch * math.sqrt(rows / whole)))
    changes = {"budget": None, "epochs": epochs, "schedule": "wsd", "keep": "last", "patience": None, "rows": None,
               "batch": batch, "validate_by": "loss", "canaries": None, "rehearse": 0.0,
               "validations": settings.validations}  # fmt: skip
    made = TrainSettings.model_validate({**settings.model_dump(exclude_unset=True), **changes})
    # A project states one of the two, epochs or a budget. Here the budget only cuts short what has few epochs.
    return made.model_copy(update={"budget": budget})

"""Which settings a search tries: the present ones, and others around them and around the defaults."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import product
from typing import Any

from tunesmith.training.settings import TrainSettings

_SAME = 0.1  # rates that differ by less than this share count as one


def search_space(settings: TrainSettings, rows: int) -> dict[str, list[Any]]:
    """The values that a search tries of each setting. rows: training rows, which bound the batch.

    Rates: a third to ten times around the present one and around the method's default, so that a hopeless present one
    does not matter. They are in the order of their turns, the present one last. b_rate: 1 and 4, and the present one.
    """
    rate, default = settings.learning_rate, TrainSettings.model_validate({"method": settings.method}).learning_rate
    wanted = [default, 3 * rate, rate / 3, 10 * rate, rate / 10, 3 * default, default / 3, rate]
    rates: list[float] = []
    for each in wanted:
        rounded = rate if abs(each - rate) <= _SAME * rate else float(f"{each:.2g}")
        if rounded < 1 and all(abs(rounded - other) > _SAME * other for other in rates):
            rates.append(rounded)
    rates = [*(each for each in rates if each != rate), rate]
    space: dict[str, list[Any]] = {"learning_rate": rates}
    if settings.method == "lora":
        space["rank"] = sorted({max(1, settings.rank // 2), settings.rank, min(1024, 2 * settings.rank)})
        space["b_rate"] = sorted({1.0, 4.0, settings.b_rate})
    batches = {max(1, settings.batch // 2), settings.batch, 2 * settings.batch}
    space["batch"] = sorted(each for each in batches if each == settings.batch or each <= min(rows, 4096))
    return space


def draw_trials(settings: TrainSettings, rows: int) -> list[dict[str, Any]]:
    """The searched settings of every trial: the present ones, then all others, each once.

    The rates take turns, since they matter most; the other values are drawn by the training's seed (random search:
    Bergstra and Bengio 2012, JMLR 13). An alpha that is set keeps its ratio to the rank, and is named with it.
    """
    space = search_space(settings, rows)
    present, rates = {key: getattr(settings, key) for key in space}, space.pop("learning_rate")
    draw = random.Random(f"search {settings.seed}")
    by_rate = []
    for rate in rates:
        drawn = [
            {"learning_rate": rate, **dict(zip(space, values, strict=True))} for values in product(*space.values())
        ]
        draw.shuffle(drawn)
        by_rate.append([each for each in drawn if each != present])
    turns = max(map(len, by_rate))
    trials = [present, *(each[turn] for turn in range(turns) for each in by_rate if turn < len(each))]
    if settings.method == "lora" and settings.alpha is not None:
        return [{**each, "alpha": settings.alpha * each["rank"] / settings.rank} for each in trials]
    return trials


def with_values(settings: TrainSettings, values: Mapping[str, Any]) -> TrainSettings:
    """The settings with a trial's values."""
    return TrainSettings(**{**settings.model_dump(), **values})

"""What a forecast can do within its budget: how many held-out rows it asks, and which subsets it trains on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tunesmith.core.errors import Refused
from tunesmith.evaluation.forecasting.rows import LEAST_HELD

START = "start"  # who answers before the training
SMALLEST = 12  # rows of the first subset
RATIO = 2  # the largest subset has at most this part of the rows: beyond it, train
SUBSETS = 3  # besides the first one; each has half of the rows of the next
MOST_EPOCHS = 3  # of a subset
TIMED = 24  # held-out rows whose answers are timed before the number of rows is decided
_PLANNED = 0.95  # share of the budget that is planned with: some work takes longer than it was measured to
_ASKING = 0.5  # share of the budget for answers
_LEAST_TOP = 4 * SMALLEST  # rows of the largest subset, so that there are three
_ROOM = 1.25  # how many times as long the least work may take as it was measured to


def held_rows(available: int, budget: float, seconds: Mapping[str, float]) -> int:
    """How many of the available held-out rows to ask.

    seconds: of one answer, by who is asked. START is the base before the training, which is asked no further rows, but
    the models that are trained on subsets are, and take as long. Raises Refused where the budget does not suffice for
    LEAST_HELD rows.
    """
    each = sum(seconds.values()) + SUBSETS * seconds[START]
    rows = min(available, int(_ASKING * budget / max(each, 1e-9)))
    if rows < LEAST_HELD:
        raise _too_short(
            budget,
            f"asking {LEAST_HELD} held-out rows takes {LEAST_HELD * each:.0f} s",
            _ROOM * LEAST_HELD * each / _ASKING,
        )
    return rows


def epochs_of(rows: float, *, seconds: float, budget: float | None, epochs: int) -> float:
    """How often a training reads its rows. seconds: of one row; budget: the training's, if it has one; epochs: its
    setting, the most that it makes."""
    return float(epochs) if budget is None else min(float(epochs), budget / (rows * max(seconds, 1e-9)))


def subset_sizes(
    rows: int, pool: int, budget: float, spent: float, *, row: float, answers: float, epochs: int
) -> list[int]:
    """Rows of the subsets after the first one, ascending.

    rows: of the whole training; pool: those that subsets are drawn from. spent: seconds of the budget; row: seconds to
    train on one row once; answers: seconds that one subset's model takes to answer. Raises Refused where the budget
    does not suffice.
    """
    halves = sum(0.5**step for step in range(SUBSETS))
    left = _PLANNED * budget - spent - SUBSETS * answers
    top = min(max(rows // RATIO, _LEAST_TOP), pool, int(left / (halves * epochs * max(row, 1e-9))))
    if top < _LEAST_TOP:
        least = (spent + SUBSETS * answers + halves * epochs * row * _LEAST_TOP) / _PLANNED
        raise _too_short(budget, f"the least that says something takes {least:.0f} s", _ROOM * least)
    sizes = {top >> step for step in range(SUBSETS)}
    return sorted(size for size in sizes if size >= 1.5 * SMALLEST)


def _too_short(budget: float, why: str, needed: float) -> Refused:
    return Refused(
        f"the budget of {budget:.2g} s is too short for a forecast: {why}",
        where="--budget",
        fix=f"set it to {math.ceil(needed)}s or more, or name fewer or faster untuned candidates",
    )

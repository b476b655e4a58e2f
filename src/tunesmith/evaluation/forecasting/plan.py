"""What a forecast can do within its budget: how many held-out rows it asks, and which subsets it trains on.

Nothing is known of the machine's speed beforehand, and four answers may take half as long as thirty, since answers are
generated together. So a forecast asks in parts that grow, and plans each by the time that the largest part so far took.
Candidates that can hardly be the best untuned one any more are asked no further (a race, as in Maron and Moore 1994,
"Hoeffding Races"). Training begins with a pilot on few rows within a share of the budget, and what is left decides
about the other subsets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import Refused
from tunesmith.evaluation.report.wording import duration

PILOT = 4  # rows that every untuned candidate and the first subset's model are asked first
LEAST_ASKED = 16  # rows that the best candidate so far and the models of the subsets are asked, also where it is slow
SMALLEST = 12  # rows of the first subset
FIRST = 0.1  # share of the budget that the first subset's training may take
RATIO = 2  # the largest subset has at most this part of the rows: beyond it, train
SUBSETS = 3  # besides the first one, at most; each has half of the rows of the next
MOST_EPOCHS = 3  # of a subset
_GROWTH = 4  # rows after a part, as a multiple of those before it: a part's time says little about a far larger one's
_WORTHWHILE = 1.25  # a part that adds less than a quarter is not asked, nor trained on
_PLANNED = 0.95  # share of the budget that is planned with: some work takes longer than it was measured to
_ASKING = 0.5  # share of the budget for answers, those of the other subsets' models included
_PILOTS = 0.75  # share of the budget that the first answers may take: a training has to follow
_ROOM = 1.25  # how many times as long the least work may take as it was measured to
_BEHIND = 2.0  # standard errors from its mean, for the one candidate upwards and the best one downwards


@dataclass(frozen=True, slots=True)
class Answered:
    """What somebody was asked so far. total: of the scores. each: seconds of one row of the largest part."""

    rows: int
    total: float
    each: float

    @property
    def middle(self) -> float:
        """The mean score, with half a right and half a wrong answer added: see `learning_curve.untuned_means`."""
        return (self.total + 0.5) / (self.rows + 1)

    @property
    def error(self) -> float:
        """Of the middle, at most: scores between 0 and 1 vary less than answers that are right or wrong."""
        return math.sqrt(self.middle * (1.0 - self.middle) / (self.rows + 1))


def contenders(answered: Mapping[str, Answered]) -> list[str]:
    """Who may still be the best, by their middles, the best first."""
    if not answered:
        return []
    order = sorted(answered, key=lambda name: -answered[name].middle)
    best = answered[order[0]]
    least = best.middle - _BEHIND * best.error
    return [name for name in order if answered[name].middle + _BEHIND * answered[name].error >= least]


def check_pilots(budget: float, spent: float) -> None:
    """Raise Refused where the first answers took so much of the budget that no training can follow."""
    if spent > _PILOTS * budget:
        why = f"asking each untuned candidate {PILOT} rows takes {duration(spent)}"
        raise _too_short(budget, why, spent / _PILOTS, ", or name fewer or faster untuned candidates")


def next_part(
    asked: int, most: int, budget: float, spent: float, rates: Mapping[str, float], tuned: float
) -> tuple[Sequence[str], int] | None:
    """Which untuned candidates to ask next and up to which row; None where the answers so far have to do.

    The first subset's model is asked up to that row in addition. asked: rows so far, of at most so many; spent: seconds
    for answers so far. rates: seconds of one answer, by who may still be the best, the best first; tuned: of one of the
    first subset's model, as which SUBSETS more are counted. Where time does not suffice to ask everybody, the best is
    asked alone.
    """
    room = _ASKING * budget - spent - SUBSETS * asked * tuned
    for who in (list(rates), list(rates)[:1]):
        each = sum(rates[name] for name in who) + (1 + SUBSETS) * tuned
        rows = min(most, _GROWTH * asked, asked + int(max(0.0, room) / max(each, 1e-9)))
        if rows >= min(most, LEAST_ASKED) and (rows >= _WORTHWHILE * asked or asked < rows == most):
            return who, rows
    return (list(rates)[:1], min(most, LEAST_ASKED)) if asked < min(most, LEAST_ASKED) else None


def epochs_of(rows: float, *, seconds: float, budget: float | None, epochs: int) -> float:
    """How often a training reads its rows. seconds: of one row; budget: the training's, if it has one; epochs: its
    setting, the most that it makes."""
    return float(epochs) if budget is None else min(float(epochs), budget / (rows * max(seconds, 1e-9)))


def subset_plan(
    rows: int, pool: int, budget: float, spent: float, *, row: float, answers: float, epochs: int
) -> tuple[list[int], int]:
    """Rows of the subsets after the first one, ascending, and how often they are read; none where no time is left.

    rows: of the whole training; pool: those that subsets are drawn from. spent: seconds of the budget; row: seconds to
    train on one row once; answers: seconds that a subset takes besides, such as for answers; epochs: at most. Epochs
    are given up before a subset is.
    """
    left = _PLANNED * budget - spent
    for many in range(SUBSETS, 0, -1):
        halves = sum(0.5**step for step in range(many))
        for reads in range(epochs, 0, -1):
            top = min(rows // RATIO, pool, int((left - many * answers) / (halves * reads * max(row, 1e-9))))
            sizes = [top >> step for step in reversed(range(many))]
            if sizes[0] >= 1.5 * SMALLEST:
                return sizes, reads
    return [], epochs


def fitting(size: int, before: int, left: float, *, row: float, answers: float, epochs: int) -> int:
    """Rows of the next subset: as planned, or as many as fit; 0 where those are hardly more than the last one's.

    The machine may be slower than it was when the subsets were planned. before: rows of the last subset. left: seconds
    of the budget; row, answers, epochs: as subset_plan's, by what the last subset took.
    """
    fits = min(size, int((left - answers) / (epochs * max(row, 1e-9))))
    return fits if fits >= _WORTHWHILE * before else 0


def no_steps(budget: float, least: float) -> Refused:
    """The error of a budget in whose share the first subset's training cannot begin. least: seconds of four steps."""
    why = f"four steps on {SMALLEST} rows take {duration(least)}, more than a tenth of it"
    return _too_short(budget, why, least / FIRST)


def _too_short(budget: float, why: str, least: float, instead: str = "") -> Refused:
    return Refused(
        f"the budget of {duration(budget)} is too short for a forecast: {why}",
        where="--budget",
        fix=f"set it to {math.ceil(_ROOM * least)}s or more{instead}",
    )

"""Which rows a forecast asks and which it trains on. It never reads test rows."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tunesmith.core.errors import Inconclusive
from tunesmith.data.dataset import Example
from tunesmith.evaluation.stats.statistics import MINIMUM_GROUPS, effective_groups

LEAST_HELD = 30  # with fewer rows one answer is more than three points
LEAST_TRAINED = 100  # training rows: fewer leave no subsets to compare
MOST_HELD = 300


class Reserved(NamedTuple):
    """held: rows that are asked, those of the validation split first. validation: how many of them are of it.

    pool: the training rows that subsets are drawn from: no group is in both. whole: how many training rows there are.
    """

    held: list[Example]
    validation: int
    pool: list[Example]
    whole: int


def reserve(
    train: Sequence[Example],
    validation: Sequence[Example],
    shown: Collection[str],
    *,
    seed: int,
    lend: bool,
    chose: Collection[str] = (),
) -> Reserved:
    """Divide a dataset's rows for a forecast.

    Where there are fewer than MOST_HELD validation rows, whole groups of training rows are held out of the subsets in
    addition, at most half of the rows. shown: wordings of rows that a candidate shows in its prompt, which cannot be
    asked. lend: False keeps all training rows for the subsets, as where validation rows are newer. chose: groups of
    validation rows by which a candidate's prompt was searched for: on those, it scores higher than on others. Raises
    Inconclusive where too few rows or groups are left to forecast from, and where an answer calls functions.
    """
    if len(train) < LEAST_TRAINED:
        raise Inconclusive(
            f"{len(train)} training rows are too few to forecast from: it takes at least {LEAST_TRAINED}",
            where="data",
            fix="collect more rows, or train: so few take a minute",
        )
    draw = random.Random(seed)
    askable = [row for row in validation if row.wording not in shown and row.group not in chose]
    held = sorted(askable, key=lambda row: row.id)
    draw.shuffle(held)
    held = held[:MOST_HELD]
    own, pool = len(held), list(train)
    if lend and own < MOST_HELD:
        lent, pool = _lent(train, MOST_HELD - own, shown, draw)
        held += lent
    groups = effective_groups([row.group for row in held])
    if len(held) < LEAST_HELD or groups < MINIMUM_GROUPS:
        told = round(groups) if groups >= MINIMUM_GROUPS else min(round(groups), MINIMUM_GROUPS - 1)  # 19.9 are too few
        raise Inconclusive(
            f"{len(held)} rows in {told} groups of equal weight can be held out, which is too few to "
            f"forecast from: it takes {LEAST_HELD} rows in {MINIMUM_GROUPS} groups",
            where="data.split.validation",
            fix="raise it, or collect rows of more groups" + (", or search for prompts by fewer rows" if chose else ""),
        )
    if any(row.messages[-1].tool_calls for row in held):
        # Losses are of an answer's text. A template writes calls in another form, which is what a training learns.
        raise Inconclusive(
            "some held-out rows are answered by calls of functions, whose losses a forecast cannot measure",
            where="data",
            fix="train without a forecast",
        )
    return Reserved(held, own, pool, len(train))


def _lent(
    train: Sequence[Example], most: int, shown: Collection[str], draw: random.Random
) -> tuple[list[Example], list[Example]]:
    """Rows of whole groups, at most so many and at most half of all, and the other rows."""
    members: dict[str, list[Example]] = {}
    for row in train:
        members.setdefault(row.group, []).append(row)
    names = sorted(group for group, rows in members.items() if not any(row.wording in shown for row in rows))
    draw.shuffle(names)
    left, taken = min(most, len(train) // 2), set()
    for name in names:
        if len(members[name]) <= left:
            taken.add(name)
            left -= len(members[name])
    lent = sorted((row for row in train if row.group in taken), key=lambda row: row.id)
    draw.shuffle(lent)
    return lent, [row for row in train if row.group not in taken]

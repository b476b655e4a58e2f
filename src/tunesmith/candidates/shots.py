"""Choosing the examples that are shown before every request."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from tunesmith.data.dataset import Example


def choose_shots(examples: Sequence[Example], count: int) -> list[Example]:
    """count training examples that differ as much as their groups let them: one of each group before a second of any.

    Groups and rows are taken in the order of their hashed names, so that adding a row rarely changes the choice.
    """
    by_group: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda one: _order(one.id)):
        by_group[example.group].append(example)
    chosen: list[Example] = []
    turn = 0
    ordered = sorted(by_group, key=_order)
    while len(chosen) < min(count, len(examples)):
        chosen += [by_group[group][turn] for group in ordered if len(by_group[group]) > turn][: count - len(chosen)]
        turn += 1
    return chosen


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

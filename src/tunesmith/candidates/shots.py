"""Chooses the training examples that are shown before every request."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence

from tunesmith.candidates.retrieval import last_request, words
from tunesmith.data.dataset import Example


def choose_shots(examples: Sequence[Example], count: int, choose: str = "fixed") -> list[Example]:
    """count training examples, in one of two ways.

    fixed: one of each group before a second of any. Groups and rows are ordered by hashed names, so that a new row
    rarely changes the choice. diverse: the first of those, then repeatedly the example whose request and answer share
    the fewest words with those chosen (farthest-first traversal, Gonzalez 1985, by Jaccard distance).
    """
    if choose == "diverse":
        return _farthest_first(examples, count)
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


def draw_shots(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """count random training examples. The same seed gives the same examples."""
    ordered = sorted(examples, key=lambda one: _order(one.id))
    return random.Random(seed).sample(ordered, min(count, len(ordered)))


def _farthest_first(examples: Sequence[Example], count: int) -> list[Example]:
    ordered = sorted(examples, key=lambda one: _order(one.id))
    sets = [frozenset(words(f"{last_request(one.messages)} {one.answer}")) for one in ordered]
    if not ordered or count < 1:
        return []
    chosen = [0]
    nearest = [_likeness(sets[0], other) for other in sets]
    while len(chosen) < min(count, len(ordered)):
        nearest = [2.0 if place in chosen else value for place, value in enumerate(nearest)]
        place = min(range(len(ordered)), key=lambda each: (nearest[each], each))
        chosen.append(place)
        nearest = [max(value, _likeness(sets[place], other)) for value, other in zip(nearest, sets, strict=True)]
    return [ordered[place] for place in chosen]


def _likeness(left: frozenset[str], right: frozenset[str]) -> float:
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

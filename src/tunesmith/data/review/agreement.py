"""How far two reviewers agree beyond chance: Cohen's kappa (Cohen 1960), with a bootstrap interval over the items."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from tunesmith.core.values import View

LEAST = 10  # items; fewer give no useful interval
_DRAWS = 2000


class Agreement(View):
    """Two reviewers' decisions on the same items. same: items with equal decisions.

    kappa, low, high: 1 is full agreement, 0 what chance gives, with a 95% interval. All are None for fewer than LEAST
    items, and where both gave one and the same decision throughout.
    """

    reviewers: tuple[str, str]
    items: int
    same: int
    kappa: float | None
    low: float | None
    high: float | None


def agreements(decided: Mapping[int, Mapping[str, str]]) -> list[Agreement]:
    """The agreement of every two reviewers who decided on a same item. decided: item -> reviewer -> decision."""
    pairs: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for _, by in sorted(decided.items()):
        for first, second in combinations(sorted(by), 2):
            pairs[first, second].append((by[first], by[second]))
    return [_agreement(who, both) for who, both in sorted(pairs.items())]


def _agreement(who: tuple[str, str], both: Sequence[tuple[str, str]]) -> Agreement:
    same = sum(one == other for one, other in both)
    kappa = cohen_kappa(both) if len(both) >= LEAST else None
    low: float | None = None
    high: float | None = None
    if kappa is not None:
        draw = np.random.default_rng(0)
        drawn = (
            cohen_kappa([both[place] for place in draw.integers(len(both), size=len(both))]) for _ in range(_DRAWS)
        )
        # A draw in which chance alone explains everything shows full agreement on one decision.
        values = [1.0 if value is None else value for value in drawn]
        low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return Agreement(reviewers=who, items=len(both), same=same, kappa=kappa, low=low, high=high)


def cohen_kappa(both: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of pairs of decisions; None where both always gave one and the same."""
    first, second = Counter(one for one, _ in both), Counter(other for _, other in both)
    chance = sum(first[name] * second[name] for name in first) / len(both) ** 2
    if chance == 1:
        return None
    return (sum(one == other for one, other in both) / len(both) - chance) / (1 - chance)

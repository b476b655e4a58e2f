"""What the checks of a device have in common: what they return, and rows to train on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tunesmith.models.rendering import Rendered


class LeftOut(Exception):
    """Why a check cannot run here."""


class Found(NamedTuple):
    """What a check that passed found: one line for a person, and its figures."""

    detail: str
    figures: Mapping[str, float] = {}


def random_rows(lengths: Sequence[int], vocabulary: int) -> list[Rendered]:
    """Random token ids, all but the first to be learned."""
    draw = random.Random(1)
    return [
        Rendered(tuple(draw.randrange(2, vocabulary) for _ in range(length)), (False, *(True,) * (length - 1)))
        for length in lengths
    ]

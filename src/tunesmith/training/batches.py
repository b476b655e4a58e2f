"""The batches of a run and their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.models.batch import Batch, computed_tokens, lay_out
from tunesmith.models.rendering import Rendered

# Batches are cut from this many batches' worth of shuffled rows sorted by length: rows of a batch are then of like
# length (attention pads them to the longest), while which rows meet stays random.
_SORTED_TOGETHER = 8


def plan(rows: Sequence[Rendered], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Which rows form which batch of an epoch, in order: a function of its arguments alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    window = batch * _SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        like = sorted(order[start : start + window], key=lambda row: (len(rows[row].ids), row))
        batches.extend(like[first : first + batch] for first in range(0, len(like), batch))
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def lay_out_step(rows: Sequence[Rendered], tokens: int, *, share: bool = True) -> list[Batch]:
    """A step's rows as parts of at most so many computed tokens each (a single longer row is a part of its own).

    Parts share the work of their common prefix only among themselves, so they are as few and as full as can be.
    share: false where nothing is.
    """
    parts: list[list[Rendered]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if parts[-1] and computed_tokens([*parts[-1], row], share=share) > tokens:
            parts.append([])
        parts[-1].append(row)
    return [lay_out(part, share=share) for part in parts]

"""The batches of a run and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tunesmith.engines.batch import Batch, computed_tokens, lay_out
from tunesmith.models.rendering import Rendered
from tunesmith.training.settings import TrainSettings

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


def lay_out_run(
    rows: Sequence[Rendered], settings: TrainSettings, processes: int, *, share: bool = True
) -> list[list[list[Batch]]]:
    """All steps of a run, in order: see lay_out_epoch."""
    epochs = (lay_out_epoch(rows, settings, epoch, processes, share=share) for epoch in range(settings.epochs))
    return [step for epoch in epochs for step in epoch]


def lay_out_epoch(
    rows: Sequence[Rendered], settings: TrainSettings, epoch: int, processes: int, *, share: bool = True
) -> Iterator[list[list[Batch]]]:
    """An epoch's steps, in order: of each the parts of every process's share; of a short step some may have none."""
    for batch in plan(rows, settings.batch, settings.seed, epoch):
        dealt = deal([rows[row] for row in batch], processes)
        yield [lay_out_step(own, settings.tokens, share=share) if own else [] for own in dealt]


def lay_out_validation(rows: Sequence[Rendered], settings: TrainSettings, *, share: bool = True) -> list[Batch]:
    """The batches that the validation loss is taken on, of no more tokens than a step's parts."""
    return [
        part
        for batch in plan(rows, settings.batch, 0, 0)
        for part in lay_out_step([rows[row] for row in batch], settings.tokens, share=share)
    ]


def deal(rows: Sequence[Rendered], processes: int) -> list[list[Rendered]]:
    """A step's rows in shares of about equal tokens: the longest first, each to the share with the fewest so far."""
    shares: list[list[Rendered]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        least = tokens.index(min(tokens))
        shares[least].append(row)
        tokens[least] += len(row.ids)
    return shares

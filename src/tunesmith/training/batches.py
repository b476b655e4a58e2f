"""From rendered rows to the batches of a run: their order, and how a batch is laid end to end.

A batch's rows stand one after another without padding. What all of them begin with (the system prompt, the
template's opening) stands once, before them: every row's attention reads it from there, so it is computed once, and
its gradient is the sum over the rows, exactly as if each row had carried its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.models.rendering import Rendered

# Batches are cut from this many batches' worth of shuffled rows sorted by length: rows of a batch are then of like
# length (attention pads them to the longest), while which rows meet stays random.
_SORTED_TOGETHER = 8


@dataclass(frozen=True)
class Batch:
    """prefix tokens shared by all rows, then each row's own tokens.

    ids, positions: [T]. lengths: own tokens of each row. predicts: places in T whose hidden state predicts a label.
    labels: [N] the tokens predicted there.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    lengths: tuple[int, ...]
    predicts: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens computed, the shared ones once."""
        return self.ids.numel()


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


def lay_out(rows: Sequence[Rendered]) -> Batch:
    """Lay a batch's rows end to end behind what they share."""
    prefix = _shared(rows)
    ids = list(rows[0].ids[:prefix])
    positions = list(range(prefix))
    lengths: list[int] = []
    predicts: list[int] = []
    labels: list[int] = []
    for row in rows:
        last = max(place for place, marked in enumerate(row.trained) if marked)
        own = row.ids[prefix:last]  # the last label is predicted, never read
        offset = len(ids) - prefix
        for place in range(prefix + 1, last + 1):
            if row.trained[place]:
                predicts.append(offset + place - 1)
                labels.append(row.ids[place])
        ids.extend(own)
        positions.extend(range(prefix, last))
        lengths.append(len(own))
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        prefix=prefix,
        lengths=tuple(lengths),
        predicts=torch.tensor(predicts),
        labels=torch.tensor(labels),
    )


def label_count(row: Rendered) -> int:
    """Labels of a row: its trained tokens (the first token of all is never predicted)."""
    return sum(row.trained[1:])


def _shared(rows: Sequence[Rendered]) -> int:
    """Length of the common beginning that leaves every row the token before its first label."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    same = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        same += 1
    return max(0, min(same, min(row.trained.index(True) for row in rows) - 1))

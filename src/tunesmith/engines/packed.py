"""The tokens of a batch without filler, as one row, for a network that treats them one by one outside attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch's tokens as one row [1, T]: the prefix, the longest row, the other rows.

    ids, positions: [1, T]. predicts: [N] places of the T tokens that predict labels. prefix: its number of tokens.
    padded: [B, L] places of each row's tokens; a short row repeats its last one. real: which of the B * L are no
    repetition, in the order of the T tokens after the prefix.
    """

    ids: Tensor
    positions: Tensor
    predicts: Tensor
    prefix: int
    padded: Tensor
    real: Tensor


def read_lengths(batch: Batch) -> Tensor:
    """[B] how many tokens of each row are read: it ends with the one that predicts its last label. What follows is
    filler."""
    starts, row_of = _starts(batch), batch.label_rows
    return torch.ones_like(starts).scatter_reduce_(0, row_of, batch.predicts - starts[row_of] + 1, "amax")


def _starts(batch: Batch) -> Tensor:
    lengths = torch.tensor(batch.lengths)
    return batch.prefix + lengths.cumsum(0) - lengths


def pack(batch: Batch, device: torch.device | None = None) -> Packed:
    """The tokens of a batch without filler. device: for the tensors; the batch's where it is None.

    The longest row comes first: it goes on from the prefix without a restart, so its mask holds for every row.
    """
    prefix, starts, needed = batch.prefix, _starts(batch), read_lengths(batch)
    order = needed.argsort(descending=True, stable=True)
    within, last = torch.arange(int(needed.max())), needed[order, None] - 1
    padded, real = starts[order, None] + within.minimum(last), (within <= last).flatten().nonzero()[:, 0]
    chosen = torch.cat([torch.arange(prefix), padded.flatten()[real]])
    place = torch.zeros(batch.tokens, dtype=torch.long)
    place[chosen] = torch.arange(len(chosen))
    found = (batch.ids[chosen][None], batch.positions[chosen][None], place[batch.predicts], place[padded], real)
    ids, positions, predicts, padded, real = (tensor.to(device or tensor.device) for tensor in found)
    return Packed(ids, positions, predicts, prefix, padded, real)

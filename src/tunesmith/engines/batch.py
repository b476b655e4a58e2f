"""Rows laid end to end for one forward pass, with their common prefix computed once.

A batch has no padding between rows. What all rows begin with (the system prompt, the template's first tokens) comes
once, before them. Every row's attention reads it from there. Its gradient is the sum over the rows, exactly as if each
row had a copy.

Rows may end in filler: tokens after a row's last label, which nothing reads. oneDNN compiles and keeps a program of
about 0.3 MB for each new matrix shape, so rows of many lengths would use more and more memory. With filler there are a
few dozen shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from tunesmith.models.rendering import Rendered


@dataclass(frozen=True)
class Batch:
    """The shared prefix's tokens, then each row's tokens after the prefix.

    ids, positions: [T]. prefix: number of shared tokens. lengths: of each row after the prefix, filler included.
    predicts: [N] indices into the T tokens whose hidden states predict labels. labels: [N] the tokens to predict.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    lengths: tuple[int, ...]
    predicts: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Number of computed tokens, the shared ones counted once."""
        return self.ids.numel()

    @property
    def label_rows(self) -> Tensor:
        """[N] the row that each label belongs to, by its place in the batch."""
        ends = self.prefix + torch.tensor(self.lengths).cumsum(0)
        return torch.bucketize(self.predicts, ends, right=True)


def lay_out(rows: Sequence[Rendered], *, share: bool = True) -> Batch:
    """A batch of rows. share: compute their common prefix once; False: compute each row whole."""
    prefix = _shared(rows) if share else 0
    ids = list(rows[0].ids[:prefix])
    positions = list(range(prefix))
    lengths = _filled(prefix, [_last(row) - prefix for row in rows])
    predicts: list[int] = []
    labels: list[int] = []
    for row, length in zip(rows, lengths, strict=True):
        last = _last(row)
        tokens = row.ids[prefix:last]
        offset = len(ids) - prefix
        for place in range(prefix + 1, last + 1):
            if row.trained[place]:
                predicts.append(offset + place - 1)
                labels.append(row.ids[place])
        ids.extend(tokens)
        ids.extend([tokens[-1]] * (length - len(tokens)))
        positions.extend(range(prefix, prefix + length))
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        prefix=prefix,
        lengths=tuple(lengths),
        predicts=torch.tensor(predicts),
        labels=torch.tensor(labels),
    )


def empty_batch() -> Batch:
    """One token and no label, for a rank that has no row left when the others have."""
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(torch.tensor([0]), torch.tensor([0]), prefix=0, lengths=(1,), predicts=nothing, labels=nothing)


def computed_tokens(rows: Sequence[Rendered], *, share: bool = True) -> int:
    """Number of tokens that lay_out(rows) computes."""
    shared = _shared(rows) if share else 0
    return shared + sum(_filled(shared, [_last(row) - shared for row in rows]))


def label_count(row: Rendered) -> int:
    """Number of a row's labels: its trained tokens, except a first token, which nothing predicts."""
    return sum(row.trained[1:])


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all rows have in common."""
    return len(commonprefix([tuple(row) for row in rows]))  # noqa: RUF071 - of tokens, not of paths


def _filled(prefix: int, lengths: Sequence[int]) -> list[int]:
    """Lengths with filler, so that the longest and the sum are among a few numbers.

    Short rows get the filler first, since attention computes all rows as if they were as long as the longest.
    """
    filled = list(lengths)
    longest = filled[filled.index(max(filled))] = _rounded(max(filled))
    wanted = _rounded(prefix + sum(filled)) - prefix - sum(filled)
    for row in sorted(range(len(filled)), key=lambda row: filled[row]):
        added = min(wanted, longest - filled[row])
        filled[row] += added
        wanted -= added
    return filled


def _rounded(count: int) -> int:
    """count, rounded up to a multiple of 4 and of an eighth of the power of two below it."""
    grain = max(4, 1 << max(0, count.bit_length() - 4))
    return -(-count // grain) * grain


def _shared(rows: Sequence[Rendered]) -> int:
    """Length of the common prefix, short enough that each row keeps the token before its first label."""
    return max(0, min(common_prefix([row.ids for row in rows]), min(row.trained.index(True) for row in rows) - 1))


def _last(row: Rendered) -> int:
    """Index of a row's last label, which is predicted but never read."""
    return len(row.trained) - 1 - row.trained[::-1].index(True)


def read_lengths(batch: Batch) -> Tensor:
    """[B] how many tokens of each row are read: it ends with the one that predicts its last label. What follows is
    filler."""
    starts, row_of = _starts(batch), batch.label_rows
    return torch.ones_like(starts).scatter_reduce_(0, row_of, batch.predicts - starts[row_of] + 1, "amax")


def _starts(batch: Batch) -> Tensor:
    lengths = torch.tensor(batch.lengths)
    return batch.prefix + lengths.cumsum(0) - lengths


class Packed:
    """The tokens of a batch without filler, as one row [1, T]: the prefix, the longest row, the other rows.

    ids, positions: [1, T]. predicts: [N] places of the T tokens that predict labels. prefix: its number of tokens.
    padded: [B, L] places of each row's tokens; a short row repeats its last one. real: which of the B * L are no
    repetition, in the order of the T tokens after the prefix. The longest row comes first: it goes on from the prefix
    without a restart, so its mask holds for every row.
    """

    def __init__(self, batch: Batch, device: torch.device | None = None) -> None:
        """device: for the tensors; the batch's where it is None."""
        self.prefix, starts, needed = batch.prefix, _starts(batch), read_lengths(batch)
        order = needed.argsort(descending=True, stable=True)
        within, last = torch.arange(int(needed.max())), needed[order, None] - 1
        padded, real = starts[order, None] + within.minimum(last), (within <= last).flatten().nonzero()[:, 0]
        chosen = torch.cat([torch.arange(self.prefix), padded.flatten()[real]])
        place = torch.zeros(batch.tokens, dtype=torch.long)
        place[chosen] = torch.arange(len(chosen))
        tensors = (batch.ids[chosen][None], batch.positions[chosen][None], place[batch.predicts], place[padded], real)
        moved = (tensor.to(device or tensor.device) for tensor in tensors)
        self.ids, self.positions, self.predicts, self.padded, self.real = moved

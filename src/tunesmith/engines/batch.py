"""How rows are laid end to end, so that what all of them begin with is computed once.

A batch's rows stand one after another without padding. Their common beginning (the system prompt, the template's
opening) stands once, before them: every row's attention reads it from there, and its gradient is the sum over the
rows, exactly as if each row had carried its own copy.

Rows may end in filler: tokens behind a row's last label, which nothing reads. The libraries that multiply matrices make
a program for every new shape and keep it, some 0.3 MB each, so a run of rows of many lengths would grow for hours: with
filler it has a few dozen shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.models.rendering import Rendered


@dataclass(frozen=True)
class Batch:
    """prefix tokens shared by all rows, then each row's own tokens.

    ids, positions: [T]. lengths: own tokens of each row, filler included. predicts: places in T whose hidden state
    predicts a label.
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


def lay_out(rows: Sequence[Rendered], *, share: bool = True) -> Batch:
    """Lay a batch's rows end to end behind what they share; share: false where each is computed whole."""
    prefix = _shared(rows) if share else 0
    ids = list(rows[0].ids[:prefix])
    positions = list(range(prefix))
    lengths = _filled(prefix, [_last(row) - prefix for row in rows])
    predicts: list[int] = []
    labels: list[int] = []
    for row, length in zip(rows, lengths, strict=True):
        last = _last(row)
        own = row.ids[prefix:last]
        offset = len(ids) - prefix
        for place in range(prefix + 1, last + 1):
            if row.trained[place]:
                predicts.append(offset + place - 1)
                labels.append(row.ids[place])
        ids.extend(own)
        ids.extend([own[-1]] * (length - len(own)))
        positions.extend(range(prefix, prefix + length))
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        prefix=prefix,
        lengths=tuple(lengths),
        predicts=torch.tensor(predicts),
        labels=torch.tensor(labels),
    )


def computed_tokens(rows: Sequence[Rendered], *, share: bool = True) -> int:
    """Tokens that a batch of rows computes."""
    shared = _shared(rows) if share else 0
    return shared + sum(_filled(shared, [_last(row) - shared for row in rows]))


def label_count(row: Rendered) -> int:
    """Labels of a row: its trained tokens (the first token of all is never predicted)."""
    return sum(row.trained[1:])


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    same = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        same += 1
    return same


def _filled(prefix: int, lengths: Sequence[int]) -> list[int]:
    """Lengths with filler, so that the longest and the sum of all are among a few numbers; short rows take it first,
    since attention works on all as if they were as long as the longest."""
    filled = list(lengths)
    longest = filled[filled.index(max(filled))] = _rounded(max(filled))
    wanted = _rounded(prefix + sum(filled)) - prefix - sum(filled)
    for row in sorted(range(len(filled)), key=lambda row: filled[row]):
        added = min(wanted, longest - filled[row])
        filled[row] += added
        wanted -= added
    return filled


def _rounded(count: int) -> int:
    """count or a little more: a multiple of 4, and of an eighth of the power of two below it."""
    grain = max(4, 1 << max(0, count.bit_length() - 4))
    return -(-count // grain) * grain


def _shared(rows: Sequence[Rendered]) -> int:
    """Length of the common beginning that leaves every row the token before its first label."""
    return max(0, min(common_prefix([row.ids for row in rows]), min(row.trained.index(True) for row in rows) - 1))


def _last(row: Rendered) -> int:
    """Place of a row's last label: predicted, never read."""
    return len(row.trained) - 1 - row.trained[::-1].index(True)

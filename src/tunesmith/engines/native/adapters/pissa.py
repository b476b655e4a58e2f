"""PiSSA: an adapter that starts at the principal singular vectors of the weight it changes.

Method: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation". The paper splits the
weight W into B0 A0 and a frozen residual, and trains B A from B0 A0 on. Here W stays whole, and B A - B0 A0 is added to
it: the same sum. It is computed as B (A - A0) + (B - B0) A0, low-rank factors of twice the rank. These hold no
difference of large products, so bf16 copies do not lose small changes. The saved adapter has the same form: an ordinary
adapter of twice the rank for the unchanged base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B transposed [rank, out], fp32: scale B A is the best approximation of weight [out, in] of that
    rank. A and B each take the square root of the singular values, as in PEFT.

    The vectors are eigenvectors of the smaller Gram matrix in fp64, with the sign that makes their largest entry
    positive. Raises UsageError for a rank higher than the weight's.
    """
    if rank > min(weight.shape):
        raise UsageError(
            f"rank {rank} exceeds the {min(weight.shape)} singular vectors of a {weight.shape[0]} x {weight.shape[1]} "
            "weight",
            where="train.rank, train.start",
            fix=f"set rank to {min(weight.shape)} or lower, or leave start out",
        )
    wide = weight.double()
    flat = wide.shape[0] <= wide.shape[1]
    wide = wide if flat else wide.t()  # [small, large]
    _, vectors = torch.linalg.eigh(wide @ wide.t())  # in ascending order
    left = vectors[:, -rank:].flip(1).t()  # [rank, small]
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    left = left * torch.where(largest < 0, -1.0, 1.0)
    right = left @ wide  # [rank, large], of lengths that are the singular values
    half = torch.linalg.vector_norm(right, dim=1, keepdim=True).sqrt()
    root = math.sqrt(scale)
    left, right = left * half / root, right / half.clamp_min(1e-30) / root
    return (right.float(), left.float()) if flat else (left.float(), right.float())


class Pissa:
    """The start of an adapter, and the low-rank factors that its change since then is.

    a [n r, in] and c [n r, out]: the masters of every place at the start. The factors of a place have 2 R rows: the
    upper half is A - A0 and C, the lower half A0 and C - C0, each with zeros up to R.
    """

    def __init__(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> None:
        self._first = [(one.clone(), other.clone()) for one, other in zip(a, c, strict=True)]

    def refresh(self, place: int, a: Tensor, c: Tensor, scale: float, into_a: Tensor, into_c: Tensor) -> None:
        """Write the factors of a place with masters a and c into its copies [2 R, in] and [2 R, out], c times scale."""
        a0, c0 = self._first[place]
        for copy, halves in ((into_a, (a - a0, a0)), (into_c, (c * scale, (c - c0) * scale))):
            copy.zero_()
            for half, into in zip(halves, copy.chunk(2), strict=True):
                into[: len(half)] = half

    def gradients(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The masters' gradients by place, from those of the factors: B is in both halves, A in the upper one only."""
        upper = [each.chunk(2)[0].float() for each in a]
        both = [torch.add(*(half.float() for half in each.chunk(2))) for each in c]
        return list(zip(upper, both, strict=True))

    def adapter(self, a: Sequence[Tensor], c: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """a and c of the adapter of twice the rank that masters a and c are: the rows of each layer together."""

        def joined(upper: Tensor, lower: Tensor) -> Tensor:
            return torch.cat([half.unflatten(0, (-1, rank)) for half in (upper, lower)], 1).flatten(0, 1)

        places = list(zip(self._first, a, c, strict=True))
        return (
            [joined(now - a0, a0) for (a0, _), now, _ in places],
            [joined(now, now - c0) for (_, c0), _, now in places],
        )

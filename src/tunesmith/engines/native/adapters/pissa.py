"""PiSSA: an adapter that starts at the principal singular vectors of the weight it changes.

Method: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation". There the weight W is
split into A0, B0 and a residual that is frozen, and B A is trained from B0 A0 on. Here W stays whole and what is added
to it is B A - B0 A0, the same sum, written as B (A - A0) + (B - B0) A0: a pair of twice the rank without a difference
of large numbers, so that bf16 copies do not round a small departure away. That pair is also what is released: an
ordinary adapter of the base as it is, and no second set of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.errors import UsageError


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B transposed [rank, out], fp32: scale B A is the best approximation of weight [out, in] of that
    rank, its singular values shared evenly between the two, as in PEFT.

    By the eigenvectors of the smaller Gram matrix in fp64; of a vector and its opposite the one whose largest entry is
    positive is taken. Raises UsageError where the weight has no such rank.
    """
    if rank > min(weight.shape):
        raise UsageError(
            f"rank {rank} is more than a weight of {weight.shape[0]} x {weight.shape[1]} has singular vectors",
            where="train.rank, train.start",
            fix=f"set rank to {min(weight.shape)} or lower, or leave start out",
        )
    wide = weight.double()
    flat = wide.shape[0] <= wide.shape[1]
    wide = wide if flat else wide.t()  # [small, large]
    _, vectors = torch.linalg.eigh(wide @ wide.t())  # in ascending order
    mine = vectors[:, -rank:].flip(1).t()  # [rank, small]
    largest = mine.gather(1, mine.abs().argmax(1, keepdim=True))
    mine = mine * torch.where(largest < 0, -1.0, 1.0)
    others = mine @ wide  # [rank, large], of lengths that are the singular values
    half = torch.linalg.vector_norm(others, dim=1, keepdim=True).sqrt()
    root = math.sqrt(scale)
    mine, others = mine * half / root, others / half.clamp_min(1e-30) / root
    return (others.float(), mine.float()) if flat else (mine.float(), others.float())


class Departure:
    """Masters a [n r, in], c [n r, out] of every place as they were at the start, and what they add beyond that: pairs
    of 2 R rows, the upper half A - A0 and C, the lower A0 and C - C0, each with zeros up to R."""

    def __init__(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> None:
        self._first = [(one.clone(), other.clone()) for one, other in zip(a, c, strict=True)]

    def refresh(self, place: int, a: Tensor, c: Tensor, scale: float, into_a: Tensor, into_c: Tensor) -> None:
        """Write what a place's masters add now into its copies [2 R, in] and [2 R, out]; c times the scale."""
        a0, c0 = self._first[place]
        for copy, halves in ((into_a, (a - a0, a0)), (into_c, (c * scale, (c - c0) * scale))):
            copy.zero_()
            for half, into in zip(halves, copy.chunk(2), strict=True):
                into[: len(half)] = half

    def gradients(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The masters' gradients by place, from those of the pairs: B is in both halves, A in the upper one alone."""
        upper = [each.chunk(2)[0].float() for each in a]
        both = [torch.add(*(half.float() for half in each.chunk(2))) for each in c]
        return list(zip(upper, both, strict=True))

    def adapter(self, a: Sequence[Tensor], c: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """a and c of an adapter of twice the rank: each part has its rows of both halves together."""

        def joined(upper: Tensor, lower: Tensor) -> Tensor:
            return torch.cat([half.unflatten(0, (-1, rank)) for half in (upper, lower)], 1).flatten(0, 1)

        places = list(zip(self._first, a, c, strict=True))
        return (
            [joined(now - a0, a0) for (a0, _), now, _ in places],
            [joined(into, into - c0) for (_, c0), _, into in places],
        )

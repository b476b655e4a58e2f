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
from tunesmith.models.products import Pair


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
    """Masters a [R, in], c [R, out] of every place as they were at the start, and what they add beyond that: pairs of
    2 R rows, the upper half A - A0 and C, the lower A0 and C - C0."""

    def __init__(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> None:
        self._first = [(one.clone(), other.clone()) for one, other in zip(a, c, strict=True)]

    def refresh(
        self, a: Sequence[Tensor], c: Sequence[Tensor], factors: Sequence[Tensor], pairs: Sequence[Pair]
    ) -> None:
        """Write what the masters add now into the pairs' copies; c times its factor."""
        for (a0, c0), now, into, factor, pair in zip(self._first, a, c, factors, pairs, strict=True):
            pair.a.copy_(torch.cat((now - a0, a0)))
            pair.c.copy_(torch.cat((into * factor, (into - c0) * factor)))

    def gradients(self, a: Sequence[Tensor], c: Sequence[Tensor]) -> list[Tensor]:
        """The masters' gradients, flat, from those of the pairs: B stands in both halves, A in the upper one alone."""
        upper = [each.chunk(2)[0].float().flatten() for each in a]
        both = [torch.add(*(half.float() for half in each.chunk(2))).flatten() for each in c]
        return [torch.cat(upper), torch.cat(both)]

    def adapter(
        self, a: Sequence[Tensor], c: Sequence[Tensor], rank: int, parts: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """a and c of an adapter of twice the rank. parts: of every place; each has its rows of both halves together."""

        def joined(upper: Tensor, lower: Tensor, count: int) -> Tensor:
            halves = [half[: count * rank].unflatten(0, (count, rank)) for half in (upper, lower)]
            return torch.cat(halves, 1).flatten(0, 1)

        places = list(zip(self._first, a, c, parts, strict=True))
        return (
            [joined(now - a0, a0, count) for (a0, _), now, _, count in places],
            [joined(into, into - c0, count) for (_, c0), _, into, count in places],
        )

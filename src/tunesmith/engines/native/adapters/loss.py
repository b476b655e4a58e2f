"""Cross-entropy over a large vocabulary in chunks, its gradient made in the forward pass.

Only hidden states that predict a label come here, and no more than a chunk's logits exist at a time.
Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.products import PackedLinear

LOGIT_ROWS = 384
_LEARNT_CHUNK = 1024  # where the head learns: its whole gradient is summed up once a chunk
_GRAIN = 32  # chunks are multiples of it, so that they have few sizes: see models.batch


class _CrossEntropy(torch.autograd.Function):
    """sizes: rows of hidden that are each one's whose loss is a sum of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: PackedLinear,
        labels: Tensor,
        share: Tensor,
        sizes: Sequence[int],
        weight: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        losses = torch.empty(hidden.shape[0])
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        learns = gradient is not None and weight is not None
        learnt: Tensor | None = None
        for piece in _pieces(hidden.shape[0], _LEARNT_CHUNK if learns else LOGIT_ROWS):
            scores = ops.cap_(head(hidden[piece]), cap)
            slope = None if cap is None or gradient is None else 1 - (scores / cap).square_()
            losses[piece] = ops.cross_entropy_(scores, labels[piece], None if gradient is None else share[piece])
            if slope is not None:
                scores.mul_(slope)
            if gradient is not None:
                gradient[piece] = head.input_gradient(scores)
            if learns:
                part = scores.t() @ hidden[piece]
                learnt = part if learnt is None else learnt.float().add_(part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.learnt = None if learnt is None else learnt.to(hidden.dtype)
        ctx.sizes = sizes
        # Copies: a sum of products may be made in another order where its numbers lie elsewhere in memory.
        each = zip(losses.split(sizes), share.split(sizes), strict=True)
        return torch.stack([own.clone().dot(part.clone()) for own, part in each])

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, None, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        learnt, ctx.learnt = ctx.learnt, None
        above = above.to(gradient.dtype)
        sizes = torch.tensor(ctx.sizes)
        factor = above.repeat_interleave(sizes, output_size=len(gradient))[:, None]
        return gradient * factor, None, None, None, None, None if learnt is None else learnt.mul_(above[0]), None


def cross_entropy(
    hidden: Tensor,
    head: PackedLinear,
    labels: Tensor,
    share: Tensor,
    weight: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The negative log-likelihoods of labels [N] under hidden [N, M], each times its share [N], summed: a scalar.

    share: a label's weight over the sum of the whole step's, so that accumulation does not change the loss. weight:
    the head's own, where it learns. cap: of the logits, see models.ops.cap_.
    """
    return _cross_entropies(head, [(hidden, labels, share)], weight, cap)[0]


def _cross_entropies(
    head: PackedLinear, parts: Sequence[tuple[Tensor, Tensor, Tensor]], weight: Tensor | None, cap: float | None
) -> Tensor:
    spare = [-hidden.shape[0] % _GRAIN for hidden, _, _ in parts]
    hidden = torch.cat([F.pad(part[0], (0, 0, 0, more)) for part, more in zip(parts, spare, strict=True)])
    labels, share = (
        torch.cat([F.pad(part[place], (0, more)) for part, more in zip(parts, spare, strict=True)]) for place in (1, 2)
    )
    sizes = [part[0].shape[0] + more for part, more in zip(parts, spare, strict=True)]
    return _CrossEntropy.apply(hidden, head, labels, share, sizes, weight, cap)  # type: ignore[no-any-return]


def _pieces(rows: int, most: int) -> list[slice]:
    """Rows in as few pieces of at most so many as there can be, of about one size: each reads the head's weight."""
    count = -(-rows // most)
    size = -(-rows // count // _GRAIN) * _GRAIN if count else 0
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)] if count else []

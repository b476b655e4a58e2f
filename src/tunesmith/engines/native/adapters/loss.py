"""Cross-entropy over a large vocabulary in chunks; its gradient is computed in the forward pass.

It takes only the hidden states that predict a label, and holds the logits of one chunk at a time.
Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.products import PackedLinear

LOGIT_ROWS = 384
GRAIN = 32  # rows of a chunk are a multiple of it, so that there are few shapes: see engines.batch
LEARNED_ROWS = 1024  # where the head is trained: its whole gradient is summed once a chunk


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: PackedLinear,
        labels: Tensor,
        coefficients: Tensor,
        weight: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        losses = torch.empty(hidden.shape[0])
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        learns = gradient is not None and weight is not None
        learned: Tensor | None = None
        for chunk in _chunks(hidden.shape[0], LEARNED_ROWS if learns else LOGIT_ROWS):
            scores = ops.cap_(head(hidden[chunk]), cap)
            slope = None if cap is None or gradient is None else 1 - (scores / cap).square_()
            losses[chunk] = ops.cross_entropy_(scores, labels[chunk], None if gradient is None else coefficients[chunk])
            if slope is not None:
                scores.mul_(slope)
            if gradient is not None:
                gradient[chunk] = head.input_gradient(scores)
            if learns:
                part = scores.t() @ hidden[chunk]
                learned = part if learned is None else learned.float().add_(part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.learned = None if learned is None else learned.to(hidden.dtype)
        return losses.dot(coefficients)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        learned, ctx.learned = ctx.learned, None
        above = above.to(gradient.dtype)
        return gradient * above, None, None, None, None if learned is None else learned.mul_(above), None


def cross_entropy(
    hidden: Tensor,
    head: PackedLinear,
    labels: Tensor,
    coefficients: Tensor,
    weight: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The sum of the labels' negative log-likelihoods, each times its coefficient: a scalar.

    hidden: [N, M], behind the final norm. labels: [N]. coefficients: [N], fp32. weight: the head's weight where it is
    trained. cap: of the logits, see ops.cap_.
    """
    more = -hidden.shape[0] % GRAIN
    return _CrossEntropy.apply(  # type: ignore[no-any-return]
        F.pad(hidden, (0, 0, 0, more)), head, F.pad(labels, (0, more)), F.pad(coefficients, (0, more)), weight, cap
    )


def label_losses(hidden: Tensor, head: PackedLinear, labels: Tensor, cap: float | None = None) -> Tensor:
    """Each label's negative log-likelihood [N], fp32, without gradients. The arguments are those of cross_entropy."""
    count = hidden.shape[0]
    hidden, labels = F.pad(hidden, (0, 0, 0, -count % GRAIN)), F.pad(labels, (0, -count % GRAIN))
    losses = torch.empty(hidden.shape[0])
    for chunk in _chunks(hidden.shape[0], LOGIT_ROWS):
        losses[chunk] = ops.cross_entropy_(ops.cap_(head(hidden[chunk]), cap), labels[chunk], None)
    return losses[:count]


def _chunks(rows: int, most: int) -> list[slice]:
    """Rows in as few chunks of at most so many as possible, of about equal size: each chunk reads the head's weight."""
    count = -(-rows // most)
    size = -(-rows // count // GRAIN) * GRAIN if count else 0
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)] if count else []

"""Cross-entropy over a large vocabulary in chunks, its gradient made in the forward pass.

Only hidden states that predict a label come here, and no more than a chunk's logits exist at a time.
Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.models import ops
from tunesmith.models.products import Frozen

_CHUNK = 256


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Frozen, labels: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], _CHUNK):
            piece = slice(start, start + _CHUNK)
            scores = head(hidden[piece])
            losses = ops.cross_entropy_(scores, labels[piece], None if gradient is None else share[piece])
            total += losses.dot(share[piece])
            if gradient is not None:
                gradient[piece] = head.back(scores)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None


def cross_entropy(hidden: Tensor, head: Frozen, labels: Tensor, share: Tensor) -> Tensor:
    """The negative log-likelihoods of labels [N] under hidden [N, M], each times its share [N], summed: a scalar.

    share: a label's weight over the sum of the whole step's, so that accumulation does not change the loss.
    """
    return _CrossEntropy.apply(hidden, head, labels, share)  # type: ignore[no-any-return]

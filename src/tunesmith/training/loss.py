"""Cross-entropy over a large vocabulary in chunks, its gradient made in the forward pass.

Only hidden states that predict a label come here, and no more than a chunk's logits exist at a time.
Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, divisor: float) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], _CHUNK):
            piece, wanted = hidden[start : start + _CHUNK], labels[start : start + _CHUNK, None]
            scores = F.linear(piece, head)
            normaliser = _log_sum(scores)
            total += (normaliser - scores.gather(1, wanted).float()).sum()
            if gradient is not None:
                share = scores.float().sub_(normaliser).exp_()
                share.scatter_add_(1, wanted, share.new_full(wanted.shape, -1.0))
                gradient[start : start + _CHUNK] = share.to(hidden.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.divisor = divisor
        return total / divisor

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (above / ctx.divisor).to(gradient.dtype), None, None, None


def _log_sum(scores: Tensor) -> Tensor:
    """log(sum(exp(scores))) of each row in fp32, [N, 1]."""
    return torch.logsumexp(scores.float(), -1, keepdim=True)


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, divisor: float) -> Tensor:
    """Sum of the negative log-likelihoods of labels [N] under hidden [N, M] @ head [V, M].T, over divisor: a scalar.

    divisor: how many labels the whole step has, so that accumulation does not change the loss.
    """
    return _CrossEntropy.apply(hidden, head, labels, divisor)  # type: ignore[no-any-return]

"""Cross-entropy over a large vocabulary in chunks, its gradient made in the forward pass.

Only hidden states that predict a label come here, and no more than a chunk's logits exist at a time.
Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models import ops
from tunesmith.models.products import Frozen

LOGIT_ROWS = 256
_LEARNT_CHUNK = 1024  # where the head learns: its whole gradient is summed up once a chunk
_GRAIN = 32  # chunks are multiples of it, so that they have few sizes: see models.batch


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Frozen,
        labels: Tensor,
        share: Tensor,
        weight: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        learns = gradient is not None and weight is not None
        learnt: Tensor | None = None
        chunk = _LEARNT_CHUNK if learns else LOGIT_ROWS
        for start in range(0, hidden.shape[0], chunk):
            piece = slice(start, start + chunk)
            scores = ops.cap_(head(hidden[piece]), cap)
            slope = None if cap is None or gradient is None else 1 - (scores / cap).square_()
            losses = ops.cross_entropy_(scores, labels[piece], None if gradient is None else share[piece])
            total += losses.dot(share[piece])
            if slope is not None:
                scores.mul_(slope)
            if gradient is not None:
                gradient[piece] = head.back(scores)
            if learns:
                part = scores.t() @ hidden[piece]
                learnt = part if learnt is None else learnt.float().add_(part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.learnt = None if learnt is None else learnt.to(hidden.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        learnt, ctx.learnt = ctx.learnt, None
        factor = above.to(gradient.dtype)
        return gradient * factor, None, None, None, None if learnt is None else learnt.mul_(factor), None


def cross_entropy(
    hidden: Tensor,
    head: Frozen,
    labels: Tensor,
    share: Tensor,
    weight: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The negative log-likelihoods of labels [N] under hidden [N, M], each times its share [N], summed: a scalar.

    share: a label's weight over the sum of the whole step's, so that accumulation does not change the loss. weight:
    the head's own, where it learns. cap: of the logits, see models.ops.cap_.
    """
    spare = -hidden.shape[0] % _GRAIN
    hidden, labels, share = F.pad(hidden, (0, 0, 0, spare)), F.pad(labels, (0, spare)), F.pad(share, (0, spare))
    return _CrossEntropy.apply(hidden, head, labels, share, weight, cap)  # type: ignore[no-any-return]

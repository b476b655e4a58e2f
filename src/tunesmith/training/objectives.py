"""What a training minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch


class CrossEntropy:
    """Supervised fine-tuning: the mean negative log-likelihood of a step's labels, every label with the same weight.

    Implements engines.training_protocol.Objective.
    """

    def coefficients(self, batch: Batch, divisor: float) -> Tensor:
        """The weight of each label [N]: one over the step's labels, so that accumulation does not change the loss."""
        return torch.full((batch.labels.numel(),), 1.0 / divisor)

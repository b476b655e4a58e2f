"""What a training minimises: a loss over the log-probabilities that the model gives to the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.training.settings import TrainSettings


class Objective(ABC):
    """A loss of each batch. A step minimises the sum over its batches, on all ranks.

    linear: whether the loss is a weighted sum of the log-probabilities. Its gradient is then the same everywhere, and
    the engine need not find the log-probabilities first. uses_reference: whether the loss compares with the base, which
    costs a forward pass more.
    """

    linear: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = False

    @abstractmethod
    def loss(self, batch: Batch, log_probabilities: Tensor, reference: Tensor | None, divisor: float) -> Tensor:
        """The loss of a batch with labels: a scalar, through which autograd finds the gradient.

        log_probabilities: of each label [N], fp32, by the model in training. reference: those by the base as it was
        before training, where the objective uses them. divisor: how many labels the whole step has, over all its
        batches and all ranks. batch.label_rows says which row a label belongs to.
        """

    def weigh(
        self, batch: Batch, log_probabilities: Tensor, reference: Tensor | None, divisor: float
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the weight of each label's negative log-likelihood [N] that gives a weighted sum of them the
        same gradient."""
        with torch.enable_grad():
            leaf = log_probabilities.detach().cpu().requires_grad_()
            loss = self.loss(batch, leaf, reference, divisor)
        return loss.detach(), -torch.autograd.grad(loss, leaf)[0]


class CrossEntropy(Objective):
    """Supervised fine-tuning: the mean negative log-likelihood of a step's labels, every label with the same weight.

    The divisor is the whole step's, so that accumulation does not change the loss.
    """

    linear = True

    def loss(self, batch: Batch, log_probabilities: Tensor, reference: Tensor | None, divisor: float) -> Tensor:
        """Minus the sum of the log-probabilities, over divisor."""
        return -log_probabilities.sum() / divisor


def objective_of(_settings: TrainSettings) -> Objective:
    """The objective of a training. All trainings are supervised."""
    return CrossEntropy()

"""The arithmetic of a step: gradients, update, and how well validation rows are fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.ranks import ALONE, Ranks, whole
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.training.batches.batch_plan import Step, step_labels
from tunesmith.training.objectives import Objective
from tunesmith.training.settings import TrainSettings


def parameters(model: TrainableModel) -> list[Tensor]:
    """The tensors that the optimiser moves, in the order of the model's groups."""
    return [tensor for group in model.parameter_groups() for tensor in group.tensors]


def gradients(model: TrainableModel, objective: Objective, step: Step, ranks: Ranks = ALONE) -> float:
    """Leave a step's gradients on the model's parameters; returns its loss, the sum over all batches on all ranks.

    Each rank divides by the labels of all ranks, and the gradients of the ranks are added.
    """
    labels = step_labels(step) or 1.0  # none where a rank without rows tries a step out
    losses = [_add_gradients(model, objective, batch, labels) for batch in step]
    return ranks.total(sum(map(float, losses)))


def _add_gradients(model: TrainableModel, objective: Objective, batch: Batch, divisor: float) -> Tensor:
    """Add a batch's gradients to those on the parameters; returns its loss."""
    reference = -model.reference_losses(batch).cpu() if objective.uses_reference else None
    weighed: list[Tensor] = []

    def weights(log_probabilities: Tensor) -> Tensor:
        if not log_probabilities.numel():  # a rank has no row left
            return torch.zeros(0)
        loss, each = objective.weigh(batch, log_probabilities, reference, divisor)
        weighed.append(loss)
        return each

    loss = model.loss(batch, weights(torch.zeros(batch.labels.numel())) if objective.linear else weights)
    loss.backward()
    model.collect_gradients()
    return loss.detach() if objective.linear or not weighed else weighed[0]


def validation_fit(model: TrainableModel, batches: Sequence[Batch], ranks: Ranks = ALONE) -> dict[str, float]:
    """{"loss", "probability"}: the mean loss over all labels of the batches, on all ranks, and the mean probability
    that the model gives them."""
    losses = [model.label_losses(batch).double() for batch in batches]
    sums_of = {"loss": [each.sum() for each in losses], "probability": [each.neg().exp().sum() for each in losses]}
    labels = step_labels(batches)
    return {name: ranks.total(math.fsum(map(float, sums))) / labels for name, sums in sums_of.items()}


def make_optimizer(model: TrainableModel, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters, before its first step."""
    groups = [
        {
            "params": list(group.tensors),
            "rate_multiple": group.rate_multiple,
            "weight_decay": settings.weight_decay if group.weight_decay else 0.0,
        }
        for group in model.parameter_groups()
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.999), fused=True)


def update(model: TrainableModel, optimizer: torch.optim.AdamW, rate: float, clip: float) -> float:
    """Move the parameters by their gradients, and drop the gradients; returns the gradients' norm before clipping.

    Where the norm is NaN or infinite nothing is moved: parameters that became NaN would never recover.
    """
    moved = parameters(model)
    length = whole(torch.nn.utils.get_total_norm([each.grad for each in moved if each.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(moved, clip, length)
    norm = float(length)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_multiple"]
        optimizer.step()
        model.parameters_changed()
    optimizer.zero_grad(set_to_none=True)
    return norm

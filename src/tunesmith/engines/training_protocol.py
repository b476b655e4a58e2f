"""What the trainer needs from a model under training. engines/native and engines/hf implement it.

What is minimised (training/objectives.py) and which weights move (the weight settings) are separate. An engine computes
a weighted sum of the labels' negative log-likelihoods and its gradients. The trainer has the objective, which gives the
labels their weights, and knows steps, schedule, validation and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.protocol import Completion, Engine, Generation
from tunesmith.engines.settings import WeightSettings


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that the optimiser moves in the same way.

    tensors: fp32 leaves of any shape. rate_multiple: their learning rate as a multiple of the schedule's. weight_decay:
    whether weight decay applies to them.
    """

    tensors: Sequence[Tensor]
    rate_multiple: float = 1.0
    weight_decay: bool = True


# The weight of each label [N] of a batch, fp32; or a function that finds them from the labels' log-probabilities [N].
LabelWeights = Tensor | Callable[[Tensor], Tensor]


class TrainableModel(Protocol):
    """A base model in which some weights are trained.

    A step calls loss(...).backward() and collect_gradients() once for each of its batches, then lets the optimiser move
    the tensors of parameter_groups(), then calls parameters_changed().
    """

    @property
    def engine_name(self) -> str:
        """The engine's name in records."""

    @property
    def device(self) -> torch.device:
        """The device that it computes on. Batches lie on the CPU."""

    @property
    def shares_prefix(self) -> bool:
        """Whether rows of a batch may share their common beginning, so that it is computed once."""

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""

    def environment(self) -> Mapping[str, str]:
        """What the trained bytes depend on besides their input, such as kernels and library versions. A training is
        only resumed in the same environment."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """The tensors to optimise. Every call returns the same tensors in the same order."""

    def loss(self, batch: Batch, weights: LabelWeights) -> Tensor:
        """The sum of a batch's negative log-likelihoods, each times its label's weight: a scalar, with gradients unless
        autograd is off. The weights get no gradient."""

    def label_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""

    def reference_losses(self, batch: Batch) -> Tensor:
        """As label_losses, by the base as it was before training.

        Raises Refused where this process has only weights that training changes.
        """

    def collect_gradients(self) -> None:
        """After a backward pass: add its gradients to `.grad` of the tensors in parameter_groups()."""

    def parameters_changed(self) -> None:
        """After the tensors in parameter_groups() were written to: bring everything computed from them up to date."""

    def save(self, folder: Path) -> None:
        """Write the trained model's files into an existing folder: an adapter in PEFT's layout, or model.safetensors.

        Raises TunesmithError where the training changed nothing that the files would keep.
        """

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes that loss, backward pass and collect_gradients() of a batch need on top of what is allocated now."""

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products in a batch's loss and backward pass."""

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second that this machine reaches on the model's largest matrix product, for as
        many rows as a batch has tokens. Measured once for each size."""


class UnloadingEngine(Engine, Protocol):
    """An engine in this process, which answers with a model while that is trained."""

    def unload(self, name: str) -> None:
        """Forget a model that was trained in full, and with it a copy of the base in memory. Adapters stay."""


class LoadedModel(Protocol):
    """A base model's frozen weights in this process, loaded once: it answers, and candidates train on it in turn."""

    def engine(self) -> UnloadingEngine:
        """The engine that answers with these weights."""

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> TrainableModel:
        """A new trainable model on these weights, at its start.

        seed: of randomly drawn start weights. state_bytes: bytes that the trainer will hold for each trained number
        besides the number itself (its gradient, the optimiser's state, the best weights so far). Raises UsageError or
        Refused for settings that this engine or base cannot honour, and where memory cannot hold the weights.
        """


class ShardedModel(LoadedModel, Protocol):
    """A base model that several ranks hold together, and on which one adapter is trained."""

    def answer_together(self, requests: Sequence[Generation], model: TrainableModel | None) -> list[Completion]:
        """Rank 0's requests, answered by all ranks with the model in training as it is now; None: by the base.

        Every rank calls this and gets all answers. The requests of other ranks do not count.
        """

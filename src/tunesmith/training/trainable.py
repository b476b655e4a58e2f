"""What the loop asks of the weights under training, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tunesmith.engines.hf.lora import HFLora
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native.network.network import Linear, Network
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.base import Base
from tunesmith.models.families import ours


class Trainable(Protocol):
    """Weights under training: fp32 masters for the optimiser, copies of them to compute with.

    network: what a forward pass runs through. masters: flat fp32 tensors.
    """

    network: Network
    masters: list[Tensor]

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups, one a master, in their order; `multiple` is of the learning rate."""
        ...

    def linear(self) -> Linear:
        """The linear layers; a backward pass leaves the gradients of what is trained here."""
        ...

    def loss(self, hidden: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """The negative log-likelihoods of labels [N] under normed hidden states [N, M], each times its share [N],
        summed: a scalar with gradients."""
        ...

    def take_gradients(self) -> None:
        """Move the last backward pass's gradients onto the masters, in fp32, on top of what they hold."""
        ...

    def refresh_copies(self) -> None:
        """Round the masters into the copies, after the masters changed."""
        ...

    def files(self, base: Base) -> Mapping[str, bytes]:
        """What is kept of the training, by file name, bound to the base it was trained on."""
        ...


# What the loop trains: weights on the one network, or an adapter within another family's own module.
Trained = Trainable | HFLora


def open_network(base: Base) -> Network | HFModel:
    """What a base is trained on: the one network where it computes the family, else transformers' own module."""
    return load_network(base.folder) if ours(base.family) else HFModel(base)

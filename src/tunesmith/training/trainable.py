"""What the loop asks of the weights under training, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from tunesmith.models.base import BaseModel
from tunesmith.models.families import ours
from tunesmith.models.foreign import Foreign
from tunesmith.models.network import Linear, Network
from tunesmith.models.weights import load_network
from tunesmith.training.foreign import ForeignLora
from tunesmith.training.four_bits import check_four_bits


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

    def files(self, base: BaseModel) -> Mapping[str, bytes]:
        """What is kept of the training, by file name, bound to the base it was trained on."""
        ...


# What the loop trains: weights on the one network, or an adapter within another family's own module.
Trained = Trainable | ForeignLora


def open_network(base: BaseModel, quantize: Literal["4bit"] | None = None, processes: int = 1) -> Network | Foreign:
    """What a base is trained on: the one network where it computes the family, else transformers' own module.

    quantize: of the settings; raises UsageError or Refused where it cannot be, processes: with how many it is shared.
    """
    if quantize is not None:
        check_four_bits(base.family, processes)
        return load_network(base.folder, four_bits=True)
    return load_network(base.folder) if ours(base.family) else Foreign(base)

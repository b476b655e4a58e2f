"""What LoRA and full fine-tuning on the native network have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native import kernels
from tunesmith.engines.native.adapters import costs
from tunesmith.engines.native.adapters.loss import cross_entropy, label_losses
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import Linear, Network, final, forward, frozen_linear
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.settings import NATIVE
from tunesmith.engines.training_protocol import LabelWeights, TrainableModel


class NativeTrainable(TrainableModel):
    """The methods of a trainable model that do not depend on which weights are trained.

    network: what the forward pass runs through. first: its first trained layer. base_network: the base's, which
    training leaves alone. masters: the trained numbers as fp32 master weights, flat tensors that the optimiser moves.
    """

    engine_name = NATIVE
    device = torch.device("cpu")
    shares_prefix = True
    network: Network
    base_network: Network
    first: int
    masters: list[Tensor]

    def environment(self) -> Mapping[str, str]:
        """Which kernels compute: compiled ones, by the digest of their source and compiler, or portable ones."""
        return {"kernels": kernels.identity()}

    def loss(self, batch: Batch, weights: LabelWeights) -> Tensor:
        """The weighted sum of a batch's negative log-likelihoods: a scalar, with gradients unless autograd is off.

        Weights that depend on log-probabilities cost the head's product once more.
        """
        network, predicting = self.network, _predicting(self.network, self.linear(), batch)
        learned = network.head.weight if network.embedding.requires_grad else None
        if not isinstance(weights, Tensor):
            weights = weights(-_losses(network, predicting, batch))
        return cross_entropy(predicting, network.head, batch.labels, weights, learned, network.shape.logit_cap)

    @torch.no_grad()
    def label_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""
        return _losses(self.network, _predicting(self.network, self.linear(), batch), batch)

    @torch.no_grad()
    def reference_losses(self, batch: Batch) -> Tensor:
        """As label_losses, by the base's network."""
        base = self.base_network
        return _losses(base, _predicting(base, frozen_linear(base), batch), batch)

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes that loss, backward pass and collect_gradients() of a batch need on top of what is allocated now."""
        gradients = sum(master.nbytes for master in self.masters)
        kept = costs.kept_bytes(self.network, batch, self.first, self.kept_numbers())
        return kept + costs.passing_bytes(self.network, batch) + gradients + self.missing_bytes()

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products in a batch's loss and backward pass."""
        return costs.frozen_flops(self.network, batch, self.first) + self.trained_flops(batch)

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second on the widest linear layer, for as many rows as a batch has tokens."""
        return costs.peak_flops(self.network, batch.tokens)

    @abstractmethod
    def linear(self) -> Linear:
        """The linear layers as trained; a backward pass leaves gradients for collect_gradients()."""

    @abstractmethod
    def kept_numbers(self) -> int:
        """Numbers that the trained linear layers keep of each token for the backward pass."""

    @abstractmethod
    def missing_bytes(self) -> int:
        """Bytes of copies that the next pass will make."""

    @abstractmethod
    def trained_flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's products for what is trained."""


def _predicting(network: Network, linear: Linear, batch: Batch) -> Tensor:
    """The hidden states [N, M] that predict a batch's labels, behind the final norm."""
    hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
    return final(network, hidden[batch.predicts])


@torch.no_grad()
def _losses(network: Network, predicting: Tensor, batch: Batch) -> Tensor:
    return label_losses(predicting, network.head, batch.labels, network.shape.logit_cap)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: PackedLinear) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.product.input_gradient(gradient), None


def frozen(product: PackedLinear, x: Tensor) -> Tensor:
    """A frozen linear layer that passes gradients on to x [T, in]."""
    return _FrozenLinear.apply(x, product)  # type: ignore[no-any-return]

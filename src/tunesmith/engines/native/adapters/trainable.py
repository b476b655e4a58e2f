"""What LoRA and full fine-tuning on the native network have in common: the loss, and what a batch costs in memory and
floating-point operations.

Shapes: T tokens of a batch, N labels, M model width, H query heads, K key/value heads, D head size, F the MLP's middle.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native import kernels
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.attention import KEPT_WEIGHTS, SHARES, fits_tiles, shared_prefix_attention
from tunesmith.engines.native.network.network import Layer, Linear, Network, final, forward, frozen_linear
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.process import MEASURED_ROWS, measured_flops
from tunesmith.engines.settings import NATIVE, WeightSettings
from tunesmith.engines.training_protocol import LabelWeights, TrainableModel
from tunesmith.models.base import Base


class NativeTrainable(TrainableModel):
    """The methods of a trainable model that do not depend on which weights are trained.

    network: what the forward pass runs through. first: its first trained layer. base_network: the base's, which
    training leaves alone. masters: the trained numbers as fp32 master weights, flat tensors that the optimiser moves.
    """

    engine_name = NATIVE
    device = torch.device("cpu")
    shares_prefix = True
    network: Network
    masters: list[Tensor]

    def __init__(self, base: Base, network: Network, settings: WeightSettings) -> None:
        self._base, self.base_network = base, network
        self.first = 0 if settings.layers is None else max(0, network.shape.layers - settings.layers)

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(map(len, self.masters))

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
        more = -len(predicting) % GRAIN
        labels, weights = (F.pad(each, (0, more)) for each in (batch.labels, weights))
        predicting = F.pad(predicting, (0, 0, 0, more))
        loss: Tensor = _CrossEntropy.apply(predicting, network.head, labels, weights, learned, network.shape.logit_cap)
        return loss

    def label_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""
        return label_losses(self.network, self.linear(), batch)

    def reference_losses(self, batch: Batch) -> Tensor:
        """As label_losses, by the base's network."""
        return label_losses(self.base_network, frozen_linear(self.base_network), batch)

    def memory_estimate(self, batch: Batch) -> int:
        """Bytes that loss, backward pass and collect_gradients() of a batch need on top of what is allocated now."""
        gradients = sum(master.nbytes for master in self.masters)
        kept = kept_bytes(self.network, batch, self.first, self.kept_numbers())
        return kept + _passing_bytes(self.network, batch) + gradients + self.missing_bytes()

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products in a batch's loss and backward pass.

        Of a token, where the linear layers have N numbers, B of them from the first trained layer on: 2 N forward, and
        2 B back to the inputs, besides what is trained. Of a label: 4 for each number of the head. Attention,
        element-wise work and what is computed twice are left out.
        """
        sizes = [sum(product.numel() for product in layer.linear.values()) for layer in self.network.layers]
        every_token = 2.0 * (sum(sizes) + sum(sizes[self.first :])) * batch.tokens
        return every_token + 4.0 * self.network.head.numel() * batch.labels.numel() + self.trained_flops(batch)

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second on the widest linear layer, for as many rows as a batch has tokens."""
        widest = max(self.network.layers[0].linear.values(), key=lambda product: product.out)
        return _peak(min(batch.tokens, MEASURED_ROWS), widest.into, widest.out, self.network.dtype)

    @abstractmethod
    def linear(self) -> Linear:
        """The linear layers as trained; a backward pass leaves gradients for collect_gradients()."""

    @abstractmethod
    def kept_numbers(self) -> int:
        """Numbers that the trained linear layers keep of each token for the backward pass."""

    def missing_bytes(self) -> int:
        """Bytes of copies that the next pass will make."""
        return 0

    @abstractmethod
    def trained_flops(self, batch: Batch) -> float:
        """Floating-point operations of a batch's products for what is trained."""


def _predicting(network: Network, linear: Linear, batch: Batch) -> Tensor:
    """The hidden states [N, M] that predict a batch's labels, behind the final norm."""
    hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
    return final(network, hidden[batch.predicts])


@torch.no_grad()
def label_losses(network: Network, linear: Linear, batch: Batch) -> Tensor:
    """The negative log-likelihood of each label [N] of a batch, fp32, without gradients."""
    return _losses(network, _predicting(network, linear, batch), batch)


@torch.no_grad()
def _losses(network: Network, predicting: Tensor, batch: Batch) -> Tensor:
    """The negative log-likelihood of each label [N] of a batch, fp32."""
    count, cap = len(predicting), network.shape.logit_cap
    hidden, labels = F.pad(predicting, (0, 0, 0, -count % GRAIN)), F.pad(batch.labels, (0, -count % GRAIN))
    losses = torch.empty(len(hidden))
    for chunk in _chunks(len(hidden), LOGIT_ROWS):
        losses[chunk] = ops.cross_entropy_(ops.cap_(network.head(hidden[chunk]), cap), labels[chunk], None)
    return losses[:count]


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


_FP32 = 4  # bytes of a number


def kept_bytes(network: Network, batch: Batch, first: int, numbers: int) -> int:
    """Bytes that autograd keeps from the forward to the backward pass of a batch.

    first: the first trained layer; the layers below it keep nothing. numbers: what the trained parts of the linear
    layers keep of each token, on top of the network itself, in the network's dtype.
    """
    size, tokens, labels = network.dtype.itemsize, batch.tokens, batch.labels.numel()
    total = numbers * size * tokens + sum(_layer_bytes(network, layer, batch) for layer in network.layers[first:])
    if not network.layers[first].attention_norm.requires_grad:  # with a frozen input too, the first norm keeps no scale
        total -= _FP32 * tokens
    if network.embedding.requires_grad and network.shape.embedding_scale is not None:
        total += size
    padded = labels + -labels % GRAIN  # of which the loss keeps the gradient
    return total + labels * (network.shape.width * size + _FP32) + padded * network.shape.width * size


def _layer_bytes(network: Network, layer: Layer, batch: Batch) -> int:
    """Of one layer: two sums with the scales of their norms, attention, the attention's output, both halves of the
    gated MLP. Some families norm each head's query and key, or what a sub-layer adds."""
    shape, size, tokens = network.shape, network.dtype.itemsize, batch.tokens
    numbers = 2 * shape.width + shape.heads * shape.head + layer.linear["gate_up"].out
    scales = 2
    if layer.q_norm is not None:
        heads = shape.heads + shape.kv_heads
        numbers, scales = numbers + heads * shape.head, scales + heads
    for norm in (layer.after_attention, layer.after_mlp):
        if norm is not None:
            numbers, scales = numbers + shape.width, scales + 1
    return tokens * (numbers * size + scales * _FP32) + _attention_bytes(network, layer, batch)[0]


def _attention_bytes(network: Network, layer: Layer, batch: Batch) -> tuple[int, int]:
    """Bytes that a layer's attention keeps, and those of its gradients for a moment.

    Kept are queries, keys and values: as they are with two numbers for each query where tiles do attention; else in
    padded blocks, with the attention weights where those are few.
    """
    shape, size = network.shape, network.dtype.itemsize
    each = (shape.heads + 2 * shape.kv_heads) * shape.head
    longest, rows = max(batch.lengths), len(batch.lengths)
    if fits_tiles(shape, layer.window, batch.prefix + longest, network.embedding):
        # The prefix's gradients are summed in a few parts.
        summed = _FP32 * (min(rows, SHARES) + 1) * shape.kv_heads * 2 * batch.prefix * shape.head
        return batch.tokens * (each * size + 2 * shape.heads * _FP32), summed
    blocks = (batch.prefix + rows * longest) * each
    weights = shape.heads * (batch.prefix**2 + rows * longest * (batch.prefix + longest))  # padding included
    if weights <= KEPT_WEIGHTS:
        return (blocks + weights) * size, weights * size
    return blocks * size, 2 * weights * size  # they are computed again


def _passing_bytes(network: Network, batch: Batch) -> int:
    """Bytes that a batch needs for a moment, at the most, besides what is kept: a chunk of logits, or a layer's
    gradients of attention weights and activations."""
    shape, size, layer = network.shape, network.dtype.itemsize, network.layers[0]
    logits = min(LOGIT_ROWS, batch.labels.numel() + GRAIN) * shape.vocabulary * size
    activations = 2 * batch.tokens * layer.linear["gate_up"].out * size
    return max(logits, _attention_bytes(network, layer, batch)[1] + activations)


@cache
def _peak(rows: int, into: int, out: int, dtype: torch.dtype) -> float:
    weight, x = (torch.full((size, into), 0.01, dtype=dtype) for size in (out, rows))
    product = PackedLinear(weight)
    return measured_flops(lambda: product(x), 2.0 * rows * into * out)


LOGIT_ROWS = 384
GRAIN = 32  # rows of a chunk are a multiple of it, so that there are few shapes: see engines.batch
LEARNED_ROWS = 1024  # where the head is trained: its whole gradient is summed once a chunk


class _CrossEntropy(torch.autograd.Function):
    """The sum of the labels' negative log-likelihoods, each times its coefficient, in chunks, since the vocabulary is
    large. Its gradient is computed in the forward pass.

    hidden: [N, M], behind the final norm, of a multiple of GRAIN labels [N]; their coefficients are fp32. weight: the
    head's weight where it is trained. cap: of the logits, see ops.cap_. Of the logits one chunk is held at a time.
    Method: Hsu et al. 2024, "Liger Kernel"; Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: PackedLinear,
        labels: Tensor,
        coefficients: Tensor,
        weight: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        losses = torch.empty(hidden.shape[0])
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        learns = gradient is not None and weight is not None
        learned: Tensor | None = None
        for chunk in _chunks(hidden.shape[0], LEARNED_ROWS if learns else LOGIT_ROWS):
            scores = ops.cap_(head(hidden[chunk]), cap)
            slope = None if cap is None or gradient is None else 1 - (scores / cap).square_()
            losses[chunk] = ops.cross_entropy_(scores, labels[chunk], None if gradient is None else coefficients[chunk])
            if slope is not None:
                scores.mul_(slope)
            if gradient is not None:
                gradient[chunk] = head.input_gradient(scores)
            if learns:
                part = scores.t() @ hidden[chunk]
                learned = part if learned is None else learned.float().add_(part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.learned = None if learned is None else learned.to(hidden.dtype)
        return losses.dot(coefficients)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        learned, ctx.learned = ctx.learned, None
        above = above.to(gradient.dtype)
        return gradient * above, None, None, None, None if learned is None else learned.mul_(above), None


def _chunks(rows: int, most: int) -> list[slice]:
    """Rows in as few chunks of at most so many as possible, of about equal size: each chunk reads the head's weight."""
    count = -(-rows // most)
    size = -(-rows // count // GRAIN) * GRAIN if count else 0
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)] if count else []

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
        kept = kept_bytes(self.network, batch, self.first, self.kept_numbers())
        return kept + passing_bytes(self.network, batch) + gradients + self.missing_bytes()

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products in a batch's loss and backward pass."""
        return frozen_flops(self.network, batch, self.first) + self.trained_flops(batch)

    def peak_flops(self, batch: Batch) -> float:
        """Floating-point operations a second on the widest linear layer, for as many rows as a batch has tokens."""
        return peak_flops(self.network, batch.tokens)

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
    return tokens * (numbers * size + scales * _FP32) + _attention_bytes(network, layer, batch)


def _attention_bytes(network: Network, layer: Layer, batch: Batch) -> int:
    """Queries, keys and values: as they are with two numbers for each query where tiles do attention; else in padded
    blocks, with the attention weights where those are few."""
    shape, size = network.shape, network.dtype.itemsize
    each = shape.heads + 2 * shape.kv_heads
    longest, rows = max(batch.lengths), len(batch.lengths)
    if fits_tiles(shape, layer.window, batch.prefix + longest, network.embedding):
        return batch.tokens * (each * shape.head * size + 2 * shape.heads * _FP32)
    blocks = (batch.prefix + rows * longest) * each * shape.head
    weights = attention_weights(network, batch)
    return (blocks + (weights if weights <= KEPT_WEIGHTS else 0)) * size


def attention_weights(network: Network, batch: Batch) -> int:
    """How many attention weights a layer has for a batch, padding included."""
    longest, rows = max(batch.lengths), len(batch.lengths)
    return network.shape.heads * (batch.prefix**2 + rows * longest * (batch.prefix + longest))


def passing_bytes(network: Network, batch: Batch) -> int:
    """Bytes that a batch needs for a moment, at the most, besides what is kept: a chunk of logits, or a layer's
    gradients of attention weights and activations."""
    shape, size, layer = network.shape, network.dtype.itemsize, network.layers[0]
    logits = min(LOGIT_ROWS, batch.labels.numel() + GRAIN) * shape.vocabulary * size
    activations = 2 * batch.tokens * layer.linear["gate_up"].out * size
    longest, rows = max(batch.lengths), len(batch.lengths)
    if fits_tiles(shape, layer.window, batch.prefix + longest, network.embedding):
        # The prefix's gradients are summed in a few parts.
        attention = _FP32 * (min(rows, SHARES) + 1) * shape.kv_heads * 2 * batch.prefix * shape.head
    else:
        weights = attention_weights(network, batch)
        attention = size * weights * (1 if weights <= KEPT_WEIGHTS else 2)  # many are computed again
    return max(logits, attention + activations)


def frozen_flops(network: Network, batch: Batch, first: int) -> float:
    """Floating-point operations of the matrix products that every training needs.

    Of a token, where the linear layers have N numbers, B of them from the first trained layer on: 2 N forward, and 2 B
    back to the inputs. Of a label: 4 for each number of the head. Attention, element-wise work and what is computed
    twice are left out.
    """
    sizes = [sum(product.numel() for product in layer.linear.values()) for layer in network.layers]
    return 2.0 * (sum(sizes) + sum(sizes[first:])) * batch.tokens + 4.0 * network.head.numel() * batch.labels.numel()


def peak_flops(network: Network, tokens: int) -> float:
    """Floating-point operations a second on the network's widest linear layer, for so many tokens."""
    widest = max(network.layers[0].linear.values(), key=lambda product: product.out)
    return _peak(min(tokens, MEASURED_ROWS), widest.into, widest.out, network.dtype)


@cache
def _peak(rows: int, into: int, out: int, dtype: torch.dtype) -> float:
    weight, x = (torch.full((size, into), 0.01, dtype=dtype) for size in (out, rows))
    product = PackedLinear(weight)
    return measured_flops(lambda: product(x), 2.0 * rows * into * out)


LOGIT_ROWS = 384
GRAIN = 32  # rows of a chunk are a multiple of it, so that there are few shapes: see engines.batch
LEARNED_ROWS = 1024  # where the head is trained: its whole gradient is summed once a chunk


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over a large vocabulary in chunks; its gradient is computed in the forward pass.

    It takes only the hidden states that predict a label, and holds the logits of one chunk at a time.
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


def cross_entropy(
    hidden: Tensor,
    head: PackedLinear,
    labels: Tensor,
    coefficients: Tensor,
    weight: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The sum of the labels' negative log-likelihoods, each times its coefficient: a scalar.

    hidden: [N, M], behind the final norm. labels: [N]. coefficients: [N], fp32. weight: the head's weight where it is
    trained. cap: of the logits, see ops.cap_.
    """
    more = -hidden.shape[0] % GRAIN
    return _CrossEntropy.apply(  # type: ignore[no-any-return]
        F.pad(hidden, (0, 0, 0, more)), head, F.pad(labels, (0, more)), F.pad(coefficients, (0, more)), weight, cap
    )


def label_losses(hidden: Tensor, head: PackedLinear, labels: Tensor, cap: float | None = None) -> Tensor:
    """Each label's negative log-likelihood [N], fp32, without gradients. The arguments are those of cross_entropy."""
    count = hidden.shape[0]
    hidden, labels = F.pad(hidden, (0, 0, 0, -count % GRAIN)), F.pad(labels, (0, -count % GRAIN))
    losses = torch.empty(hidden.shape[0])
    for chunk in _chunks(hidden.shape[0], LOGIT_ROWS):
        losses[chunk] = ops.cross_entropy_(ops.cap_(head(hidden[chunk]), cap), labels[chunk], None)
    return losses[:count]


def _chunks(rows: int, most: int) -> list[slice]:
    """Rows in as few chunks of at most so many as possible, of about equal size: each chunk reads the head's weight."""
    count = -(-rows // most)
    size = -(-rows // count // GRAIN) * GRAIN if count else 0
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)] if count else []

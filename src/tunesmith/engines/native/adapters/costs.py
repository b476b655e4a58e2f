"""What training on the native network costs: memory of a batch, floating-point operations, the machine's speed.

Shapes: T tokens of a batch, N labels, M model width, H query heads, K key/value heads, D head size, F the MLP's middle.
"""

from __future__ import annotations

from functools import cache

import torch

from tunesmith.engines.batch import Batch
from tunesmith.engines.native.adapters.loss import GRAIN, LOGIT_ROWS
from tunesmith.engines.native.network.attention import KEPT_WEIGHTS, SHARES, fits_tiles
from tunesmith.engines.native.network.network import Layer, Network
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.process import MEASURED_ROWS, measured_flops

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

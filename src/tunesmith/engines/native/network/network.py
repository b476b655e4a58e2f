"""The decoder-only transformer of Llama, Gemma and related families, as functions over frozen weights.

Training and decoding share one forward function. What differs between them is passed in: how attention finds its keys,
and how a linear layer applies an adapter.

Shapes: T tokens of any number of rows laid end to end (no padding), H query heads, K key/value heads, D head size,
M model width, F the MLP's middle.

Methods: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), gated MLP (Shazeer 2020), grouped-query
attention (Ainslie et al. 2023), sliding windows (Beltagy et al. 2020), capped scores and logits (Gemma Team 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.models.weight_files import HEAD

# (layer, group, x [T, in]) -> [T, out]. group: a key of GROUPS.
Linear = Callable[[int, str, Tensor], Tensor]
# (layer, qkv [T, (H + 2 K) * D] with queries and keys not yet rotated) -> [T, H * D]
Attend = Callable[[int, Tensor], Tensor]

# Linear layers with the same input are computed as one product: group -> names of its parts, in the order of its rows.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Shape:
    """A network's sizes, and how its family differs from Llama.

    attention_scale: factor of attention scores. norm_offset: added to the norms' weights. embedding_scale: factor of
    the embeddings. gelu: the MLP's gate is tanh-approximated GELU instead of SiLU. score_cap and logit_cap: a cap c
    replaces attention scores or logits s by c tanh(s / c). A field's default means Llama's way, here and in Layer.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    epsilon: float
    attention_scale: float
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    gelu: bool = False
    score_cap: float | None = None
    logit_cap: float | None = None


@dataclass(frozen=True)
class Layer:
    """One layer's frozen weights.

    linear: group -> its weight. after_attention, after_mlp: norms of a sub-layer's output. rotary: index into
    Network.rotary. window: number of places that a token sees, including itself; None: all.
    """

    linear: dict[str, PackedLinear]
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    rotary: int = 0
    window: int | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: inverse_frequencies [D / 2], all zero in layers without rotation."""

    inverse_frequencies: Tensor
    scale: float


@dataclass(frozen=True)
class Network:
    """A base's frozen weights, ready to compute."""

    shape: Shape
    embedding: Tensor  # [vocabulary, M]
    head: PackedLinear  # [vocabulary, M]; made of the embedding if they are tied
    tied: bool
    final_norm: Tensor
    layers: tuple[Layer, ...]
    rotary: tuple[Rotary, ...]

    @property
    def repeated(self) -> frozenset[str]:
        """The base's tensors that repeat another one: the head where it is the embedding."""
        return frozenset({HEAD} if self.tied else ())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.embedding.dtype

    def parts(self, group: str) -> tuple[int, ...]:
        """Output sizes of a group's parts, in order."""
        shape = self.shape
        if group == "qkv":
            return (shape.heads * shape.head, shape.kv_heads * shape.head, shape.kv_heads * shape.head)
        out = self.layers[0].linear[group].out
        return (out // 2, out // 2) if group == "gate_up" else (out,)


def forward(network: Network, ids: Tensor, linear: Linear, attend: Attend) -> Tensor:
    """Hidden states [T, M] before the final norm, of ids [T]. attend knows the tokens' positions."""
    x = embedded(network, ids)
    shape = network.shape
    epsilon, offset = shape.epsilon, shape.norm_offset

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, epsilon, offset)

    added: Tensor | None = None  # the previous sub-layer's output, not yet added to x
    for number, layer in enumerate(network.layers):
        x, h = add_norm(x, added, layer.attention_norm, epsilon, offset)
        qkv = _head_norms(network, layer, linear(number, "qkv", h))
        mixed = normed(linear(number, "o", attend(number, qkv)), layer.after_attention)
        x, h = add_norm(x, mixed, layer.mlp_norm, epsilon, offset)
        added = linear(number, "down", gated(linear(number, "gate_up", h), gelu=shape.gelu))
        added = normed(added, layer.after_mlp)
    assert added is not None
    return x + added


def embedded(network: Network, ids: Tensor) -> Tensor:
    """The first layer's input [T, M] for ids [T]."""
    x, scale = embed(ids, network.embedding), network.shape.embedding_scale
    # transformers rounds the factor to the weights' dtype
    return x if scale is None else x * torch.tensor(scale, dtype=x.dtype)


def final(network: Network, hidden: Tensor) -> Tensor:
    """The final norm of hidden states [T, M], which is the head's input."""
    return rms_norm(hidden, network.final_norm, network.shape.epsilon, network.shape.norm_offset)


def logits(network: Network, hidden: Tensor) -> Tensor:
    """Logits [T, vocabulary] of hidden states [T, M] before the final norm."""
    scores, cap = network.head(final(network, hidden)), network.shape.logit_cap
    return scores if cap is None else torch.tanh(scores / cap) * cap


def frozen_linear(network: Network) -> Linear:
    """The base's linear layers without an adapter and without gradients (adapters/lora.py has those with gradients)."""
    return lambda number, group, x: network.layers[number].linear[group](x)


def angles(network: Network, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """cos and sin [T, D / 2], fp32, of positions [T], for each of the network's rotations."""
    pairs = [(positions.float()[:, None] * rotary.inverse_frequencies, rotary.scale) for rotary in network.rotary]
    return [(angle.cos() * scale, angle.sin() * scale) for angle, scale in pairs]


def _head_norms(network: Network, layer: Layer, qkv: Tensor) -> Tensor:
    """qkv with the norms that some families apply to each head's query and key."""
    if layer.q_norm is None or layer.k_norm is None:
        return qkv
    shape = network.shape
    q, k, v = qkv.split(network.parts("qkv"), dim=-1)
    q, k = (
        rms_norm(part.unflatten(-1, (-1, shape.head)), weight, shape.epsilon, shape.norm_offset).flatten(-2)
        for part, weight in ((q, layer.q_norm), (k, layer.k_norm))
    )
    return torch.cat((q, k, v), -1)


class _Embedding(torch.autograd.Function):
    """Embedding whose gradients are summed in fp32: in bf16, a frequent token's sum would stop growing."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape).index_add_(0, ids, gradient.float())
        return None, total.to(gradient.dtype)


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows [T, M] of weight [vocabulary, M] for ids [T]."""
    return _Embedding.apply(ids, weight) if weight.requires_grad else F.embedding(ids, weight)


class Recompute:
    """Lets a function's backward pass compute its output again, for the gradients of the function that reads it.

    Otherwise the reading function would keep that output for its own backward pass. Of the numbers that a layer would
    keep for a token, the outputs of norms and the gated middle are a third. output: which of the function's outputs it
    is. Method: activation recomputation, Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

    def __init__(self, output: int = 0) -> None:
        self.output = output
        self._callbacks: list[Callable[[Tensor], None]] = []

    def ask(self, use: Callable[[Tensor], None]) -> None:
        """Call use with the output, equal to the bit, within the current backward pass."""
        self._callbacks.append(use)

    @property
    def asked(self) -> bool:
        """Whether the output must be computed again."""
        return bool(self._callbacks)

    def give(self, output: Tensor | None) -> None:
        """Call the callbacks with the output."""
        callbacks, self._callbacks = self._callbacks, []
        for use in callbacks:
            assert output is not None
            use(output)


def recompute(x: Tensor) -> Recompute | None:
    """The Recompute of the function whose output x is; None if x must be kept for the backward pass."""
    again: Recompute | None = getattr(x.grad_fn, "recompute", None)
    return None if again is None or again.output != x.output_nr else again


class _AddNorm(torch.autograd.Function):
    """The sum of x and y, None where y is None, and its norm. The backward pass computes the normalised input again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float, offset: float
    ) -> tuple[Tensor | None, Tensor]:
        total, out, scale = ops.add_norm(x, y, weight, epsilon, offset)
        ctx.save_for_backward(total, weight, scale)
        ctx.adds, ctx.offset, ctx.recompute = y is not None, offset, Recompute(output=1)
        return total if ctx.adds else None, out

    @staticmethod
    def backward(
        ctx: Any, sum_gradient: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        total, weight, scale = ctx.saved_tensors
        asked = ctx.recompute.asked
        result, out = ops.norm_backward(gradient, total, weight, scale, sum_gradient, ctx.offset, again=asked)
        ctx.recompute.give(out)
        weight_gradient = _norm_weight_gradient(gradient, total, scale) if ctx.needs_input_grad[2] else None
        return result, result if ctx.adds else None, weight_gradient, None, None


def _norm_weight_gradient(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Gradient [M] of a norm's weight: its output's gradient times the normalised input x * scale, summed over rows."""
    width = x.shape[-1]
    products = gradient.reshape(-1, width).float() * x.reshape(-1, width).float()
    return (scale.view(1, -1) @ products).view(width).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension with weight + offset, computed in fp32."""
    return add_norm(x, None, weight, epsilon, offset)[1]


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x + y (x where y is None) and its RMSNorm."""
    compute = _AddNorm.apply if torch.is_grad_enabled() else ops.add_norm
    total, out, *_ = compute(x, y, weight, epsilon, offset)
    return x if y is None else total, out


class _Gated(torch.autograd.Function):
    """act(gate) * up. It keeps only its input, and computes the activation again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu, ctx.recompute = gelu, Recompute()
        return ops.gated(gate_up, gelu=gelu)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        result, out = ops.gated_backward(gradient, gate_up, gelu=ctx.gelu, again=ctx.recompute.asked)
        ctx.recompute.give(out)
        return result, None


def gated(gate_up: Tensor, *, gelu: bool = False) -> Tensor:
    """The gated MLP's middle: [T, 2 * F] -> [T, F]."""
    if not torch.is_grad_enabled():
        return ops.gated(gate_up, gelu=gelu)
    return _Gated.apply(gate_up, gelu)  # type: ignore[no-any-return]

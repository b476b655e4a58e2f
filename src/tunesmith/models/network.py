"""The decoder-only transformer of Llama and its kin, as functions over frozen weights.

One forward serves training and decoding: what differs between them, how attention finds its keys and how a linear
layer applies an adapter, is passed in. Shapes: T tokens of any number of rows laid end to end (no padding), H query
heads, K key/value heads, D head size, M model width.

Methods: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), gated MLP (Shazeer 2020), grouped-query
attention (Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, group, x [T, in]) -> [T, out], where group is one of GROUPS.
Linear = Callable[[int, str, Tensor], Tensor]
# (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Linear layers that read the same input are one product: group -> the names of its parts, in the order of its rows.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Shape:
    """A network's sizes."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One layer's frozen weights. linear: group -> [out, in]; bias: group -> [out], only where the family has one."""

    linear: dict[str, Tensor]
    bias: dict[str, Tensor]
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class Network:
    """A base's frozen weights, ready to run."""

    shape: Shape
    embedding: Tensor  # [vocabulary, M]
    head: Tensor  # [vocabulary, M]; the embedding itself where the family ties them
    final_norm: Tensor
    layers: tuple[Layer, ...]
    inverse_frequencies: Tensor  # [D / 2]
    rope_scale: float

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.embedding.dtype

    def parts(self, group: str) -> tuple[int, ...]:
        """Output sizes of a group's parts."""
        shape = self.shape
        if group == "qkv":
            return (shape.heads * shape.head, shape.kv_heads * shape.head, shape.kv_heads * shape.head)
        out = self.layers[0].linear[group].shape[0]
        return (out // 2, out // 2) if group == "gate_up" else (out,)


def forward(network: Network, ids: Tensor, positions: Tensor, linear: Linear, attend: Attend) -> Tensor:
    """Hidden states [T, M] before the final norm, of ids [T] at positions [T]."""
    shape = network.shape
    x = F.embedding(ids, network.embedding)
    cos, sin = rotation(network, positions)
    for number, layer in enumerate(network.layers):
        h = rms_norm(x, layer.attention_norm, shape.epsilon)
        q, k, v = linear(number, "qkv", h).split(network.parts("qkv"), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, shape.head)) for part in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, shape.epsilon), rms_norm(k, layer.k_norm, shape.epsilon)
        mixed = attend(number, rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + linear(number, "o", mixed)
        h = rms_norm(x, layer.mlp_norm, shape.epsilon)
        x = x + linear(number, "down", gated(linear(number, "gate_up", h)))
    return x


def logits(network: Network, hidden: Tensor) -> Tensor:
    """Logits [T, vocabulary] of hidden states [T, M]."""
    return F.linear(rms_norm(hidden, network.final_norm, network.shape.epsilon), network.head)


def frozen_linear(network: Network) -> Linear:
    """The base's own linear layers, no adapter."""

    def apply(number: int, group: str, x: Tensor) -> Tensor:
        layer = network.layers[number]
        return F.linear(x, layer.linear[group], layer.bias.get(group))

    return apply


def rotation(network: Network, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D / 2] of rotary positions."""
    angles = positions.float()[:, None] * network.inverse_frequencies
    return tuple((f(angles) * network.rope_scale).to(network.dtype)[:, None] for f in (torch.cos, torch.sin))  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    """Recomputes the normalised input in the backward pass instead of keeping it. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        inner = gradient.float() * weight
        return (scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, in fp32 inside."""
    return _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """The backward pass of a rotation is the rotation the other way: nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = gradient.chunk(2, -1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [T, heads, D]."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps its input alone and computes the sigmoid again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        result = torch.empty_like(gate_up)
        to_gate, to_up = result.chunk(2, -1)
        torch.mul(gradient, silu, out=to_up)
        torch.mul(gradient * up, sigmoid + silu * (1 - sigmoid), out=to_gate)
        return result


def gated(gate_up: Tensor) -> Tensor:
    """The gated MLP's middle: [T, 2 * F] -> [T, F]."""
    return _Gated.apply(gate_up)  # type: ignore[no-any-return]

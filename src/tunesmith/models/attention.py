"""Attention of rows behind a shared prefix, forward and backward in one function each.

The scores of a row against the shared prefix are one product for all rows; those against its own tokens are causal.
Small dense products beat masked flash kernels on CPU at these lengths. Shapes: K key/value heads, G query heads for
each, B rows padded to L own tokens, P prefix tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.batch import Batch
from tunesmith.models.network import Attend, Network


class Layout:
    """Where a batch's tokens lie in the padded [B, L] block that attention works on."""

    def __init__(self, prefix: int, lengths: Sequence[int], network: Network) -> None:
        self.prefix, self.rows, self.longest = prefix, len(lengths), max(lengths)
        slots = [row * self.longest + place for row, length in enumerate(lengths) for place in range(length)]
        self.even = len(slots) == self.rows * self.longest
        self.slots = torch.tensor(slots)
        self.group = network.shape.heads // network.shape.kv_heads
        self.scale = 1.0 / math.sqrt(network.shape.head)
        self.own_mask = _causal(self.longest, self.group, network.dtype)
        self.prefix_mask = _causal(self.prefix, self.group, network.dtype)

    def pad(self, x: Tensor) -> Tensor:
        """Own tokens [sum(lengths), heads, D] -> [B, L, heads, D], zeros where a row is shorter."""
        if self.even:
            return x.view(self.rows, self.longest, *x.shape[1:])
        padded = x.new_zeros(self.rows * self.longest, *x.shape[1:])
        return padded.index_copy_(0, self.slots, x).view(self.rows, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """The way back."""
        flat = x.flatten(0, 1)
        return flat if self.even else flat.index_select(0, self.slots)


def shared_prefix_attention(batch: Batch, network: Network) -> Attend:
    """Attention for one batch, to be passed to network.forward."""
    layout = Layout(batch.prefix, batch.lengths, network)

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Attention.apply(q, k, v, layout).flatten(1)  # type: ignore[no-any-return]

    return attend


def attend_rows(layout: Layout, q: Tensor, k: Tensor, v: Tensor, kp: Tensor | None, vp: Tensor | None) -> Tensor:
    """Mixed values [T, H, D] of rows whose shared prefix was computed before: kp, vp [K, P, D]. No gradients."""
    queries = _queries(layout.pad(q), layout.group)
    if kp is not None and vp is not None:
        kp, vp = kp[:, None], vp[:, None]
    mixed, _ = _attend(queries, _keys(layout.pad(k)), _keys(layout.pad(v)), kp, vp, layout.own_mask, layout.scale)
    return layout.unpad(_tokens(mixed, layout.group))


def _causal(length: int, group: int, dtype: torch.dtype) -> Tensor:
    """[G * L, L]: 0 where a query may look, a large negative number where not."""
    return torch.full((length, length), -1e9, dtype=dtype).triu(1).repeat(group, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        cut = layout.prefix
        kept: list[Tensor] = []
        out = torch.empty_like(q)
        kp = vp = None
        if cut:
            qp, kp, vp = _queries(q[None, :cut], layout.group), _keys(k[None, :cut]), _keys(v[None, :cut])
            mixed, weights = _attend(qp, kp, vp, None, None, layout.prefix_mask, layout.scale)
            out[:cut] = _tokens(mixed, layout.group)[0]
            kept += [qp, kp, vp, weights]
        qo, ko, vo = (
            _queries(layout.pad(q[cut:]), layout.group),
            _keys(layout.pad(k[cut:])),
            _keys(layout.pad(v[cut:])),
        )
        mixed, weights = _attend(qo, ko, vo, kp, vp, layout.own_mask, layout.scale)
        out[cut:] = layout.unpad(_tokens(mixed, layout.group))
        ctx.save_for_backward(*kept, qo, ko, vo, weights)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        layout: Layout = ctx.layout
        cut, group = layout.prefix, layout.group
        saved = ctx.saved_tensors
        qo, ko, vo, weights = saved[-4:]
        heads = ko.shape[0]
        size = gradient.shape[-1]
        dq = torch.empty_like(gradient)
        dk = gradient.new_empty(gradient.shape[0], heads, size)
        dv = torch.empty_like(dk)
        kp, vp = (saved[1], saved[2]) if cut else (None, None)
        own = _queries(layout.pad(gradient[cut:]), group)
        gq, gk, gv, gkp, gvp = _attend_backward(own, qo, ko, vo, kp, vp, weights, layout.scale)
        dq[cut:] = layout.unpad(_tokens(gq, group))
        dk[cut:] = layout.unpad(gk.permute(1, 2, 0, 3))
        dv[cut:] = layout.unpad(gv.permute(1, 2, 0, 3))
        if cut:
            qp, kp, vp, prefix_weights = saved[:4]
            above = _queries(gradient[None, :cut], group)
            gq, gk, gv, _, _ = _attend_backward(above, qp, kp, vp, None, None, prefix_weights, layout.scale)
            dq[:cut] = _tokens(gq, group)[0]
            dk[:cut] = (gk[:, 0] + gkp[:, 0]).transpose(0, 1)
            dv[:cut] = (gv[:, 0] + gvp[:, 0]).transpose(0, 1)
        return dq, dk, dv, None


def _queries(x: Tensor, group: int) -> Tensor:
    """[B, L, K * G, D] -> [K, B, G * L, D]."""
    rows, length, heads, size = x.shape
    return (
        x.view(rows, length, heads // group, group, size).permute(2, 0, 3, 1, 4).reshape(-1, rows, group * length, size)
    )


def _tokens(x: Tensor, group: int) -> Tensor:
    """[K, B, G * L, D] -> [B, L, K * G, D]."""
    heads, rows, many, size = x.shape
    x = x.view(heads, rows, group, many // group, size).permute(1, 3, 0, 2, 4)
    return x.reshape(rows, many // group, heads * group, size)


def _keys(x: Tensor) -> Tensor:
    """[B, L, K, D] -> [K, B, L, D]."""
    return x.permute(2, 0, 1, 3).contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor | None, vp: Tensor | None, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Mixed values [K, B, G * L, D] and the attention weights [K, B, G * L, P + L]."""
    heads, rows, many, _ = q.shape
    scores = (q @ k.transpose(-1, -2)).mul_(scale).add_(mask)
    if kp is not None:
        shared = (q.flatten(1, 2) @ kp[:, 0].transpose(-1, -2)).mul_(scale)
        scores = torch.cat((shared.view(heads, rows, many, -1), scores), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    cut = 0 if kp is None else kp.shape[2]
    mixed = weights[..., cut:] @ v
    if vp is not None:
        mixed += (weights[..., :cut].flatten(1, 2) @ vp[:, 0]).view_as(mixed)
    return mixed, weights


def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor | None,
    vp: Tensor | None,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the prefix's k and v [K, 1, P, D] (empty where there is none)."""
    cut = 0 if kp is None else kp.shape[2]
    into = gradient @ v.transpose(-1, -2)
    if vp is not None:
        shared = (gradient.flatten(1, 2) @ vp[:, 0].transpose(-1, -2)).view(*into.shape[:-1], cut)
        into = torch.cat((shared, into), -1)
    wide = weights.float()
    inner = wide * into
    scores = (inner - wide * inner.sum(-1, keepdim=True)).mul_(scale).to(q.dtype)
    own, own_weights = scores[..., cut:], weights[..., cut:]
    gq = own @ k
    gk = own.transpose(-1, -2) @ q
    gv = own_weights.transpose(-1, -2) @ gradient
    if kp is None:
        empty = gq.new_empty(0)
        return gq, gk, gv, empty, empty
    above = scores[..., :cut].flatten(1, 2)
    gq += (above @ kp[:, 0]).view_as(gq)
    gkp = above.transpose(-1, -2) @ q.flatten(1, 2)
    gvp = weights[..., :cut].flatten(1, 2).transpose(-1, -2) @ gradient.flatten(1, 2)
    return gq, gk, gv, gkp[:, None], gvp[:, None]

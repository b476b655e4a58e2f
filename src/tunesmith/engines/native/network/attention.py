"""Attention of rows behind a shared prefix, forward and backward in one function each.

On processors with tiles one kernel each way does it a row at a time in the caches (native/attention_tiles.h).
Elsewhere, and where windows or caps change the scores, it is products of blocks: the scores of a row against the shared
prefix are one product for all rows; those against its own tokens are causal. Weights of long rows are computed again in
the backward pass: kept, they would be the largest thing in memory. Shapes: K key/value heads, G query heads for each, B
rows padded to L own tokens, P prefix tokens, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.network import Attend, Network, Shape, angles

SHARES = 8  # of rows, whose gradients of the prefix are summed apart: as in attention_tiles.h
KEPT_WEIGHTS = 1 << 22  # numbers: a layer's weights up to this many are kept for the backward pass


class Blocks(NamedTuple):
    """Queries, keys and values as attention works on them: the prefix's [K, G * P, D] and [K, P, D], the rows'
    [K, B, G * L, D] and [K, B, L, D]. Slots behind the end of a row hold zeros."""

    qp: Tensor
    kp: Tensor
    vp: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Layout:
    """Where a batch's tokens lie in the padded blocks, and their rotary angles."""

    def __init__(self, prefix: int, lengths: Sequence[int], positions: Tensor, network: Network) -> None:
        shape = network.shape
        self.shape, self.prefix, self.rows, self.longest = shape, prefix, len(lengths), max(lengths)
        self.kv, self.group, self.scale = shape.kv_heads, shape.heads // shape.kv_heads, shape.attention_scale
        rows = [-1] * prefix + [row for row, length in enumerate(lengths) for _ in range(length)]
        places = [*range(prefix), *(place for length in lengths for place in range(length))]
        self.row_of, self.place_of = torch.tensor(rows), torch.tensor(places)
        self.starts = torch.tensor([prefix, *lengths]).cumsum(0)
        self.turns = angles(network, positions)
        self.rotary = [layer.rotary for layer in network.layers]
        self.windows, self.cap = [layer.window for layer in network.layers], shape.score_cap
        self.native = native.TokenLayout(
            *(len(rows), prefix, self.rows, self.longest, self.kv, self.group, shape.head),
            *(self.row_of.data_ptr(), self.place_of.data_ptr(), self.starts.data_ptr()),
        )

    def on_tiles(self, qkv: Tensor, layer: int) -> bool:
        """Whether attention_tiles.h does a layer's attention."""
        return fits_tiles(self.shape, self.windows[layer], self.prefix + self.longest, qkv)

    def blocks(self, like: Tensor) -> Blocks:
        """Blocks to be filled, slots of no token too."""
        kv, group, size = self.kv, self.group, self.shape.head
        own = like.new_empty(kv * self.rows * self.longest * size * (group + 2))
        q, k, v = own.split([kv * self.rows * self.longest * size * part for part in (group, 1, 1)])
        early = like.new_empty(kv * self.prefix * size * (group + 2))
        qp, kp, vp = early.split([kv * self.prefix * size * part for part in (group, 1, 1)])
        return Blocks(
            qp.view(kv, group * self.prefix, size),
            kp.view(kv, self.prefix, size),
            vp.view(kv, self.prefix, size),
            q.view(kv, self.rows, group * self.longest, size),
            k.view(kv, self.rows, self.longest, size),
            v.view(kv, self.rows, self.longest, size),
        )

    def split(self, qkv: Tensor, layer: int) -> Blocks:
        """qkv [T, (H + 2 K) * D] of a layer to blocks, queries and keys rotated."""
        blocks = self.blocks(qkv)
        cos, sin = self.turns[self.rotary[layer]]
        kernel = ops.kernel_for("split", qkv)
        if kernel is not None:
            self._call(kernel, qkv.contiguous(), blocks, cos, sin)
            return blocks
        heads = self.kv * self.group
        parts = qkv.unflatten(-1, (-1, self.shape.head)).split((heads, self.kv, self.kv), 1)
        turned = (ops.rotate(parts[0], cos, sin), ops.rotate(parts[1], cos, sin), parts[2])
        for part, early, own in zip(turned, blocks[:3], blocks[3:], strict=True):
            self._fill(part, early, own)
        return blocks

    def join(self, blocks: Blocks, layer: int) -> Tensor:
        """Gradients of the blocks back to a gradient of qkv."""
        heads = self.kv * self.group
        cos, sin = self.turns[self.rotary[layer]]
        out = blocks.q.new_empty(len(self.row_of), (heads + 2 * self.kv) * self.shape.head)
        kernel = ops.kernel_for("split_backward", out)
        if kernel is not None:
            self._call(kernel, out, blocks, cos, sin)
            return out
        parts = [self._take(early, own) for early, own in zip(blocks[:3], blocks[3:], strict=True)]
        turned = (ops.rotate(parts[0], cos, -sin), ops.rotate(parts[1], cos, -sin), parts[2])
        return torch.cat(turned, 1).flatten(1)

    def tokens(self, early: Tensor, own: Tensor) -> Tensor:
        """Mixed values in the queries' blocks to [T, H * D]."""
        out = own.new_empty(len(self.row_of), self.kv * self.group * self.shape.head)
        kernel = ops.kernel_for("gather", out)
        if kernel is None:
            return self._take(early, own).flatten(1)
        self._gather(kernel, out, early, own, 1)
        return out

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H * D] to the queries' blocks."""
        blocks = self.blocks(x)
        kernel = ops.kernel_for("gather", x)
        if kernel is None:
            self._fill(x.unflatten(-1, (-1, self.shape.head)), blocks.qp, blocks.q)
        else:
            self._gather(kernel, x.contiguous(), blocks.qp, blocks.q, 0)
        return blocks.qp, blocks.q

    def _call(self, kernel: Any, flat: Tensor, blocks: Blocks, cos: Tensor, sin: Tensor) -> None:
        at = ops.at
        kernel(ctypes.byref(self.native), at(flat), at(cos), at(sin), *map(at, blocks), torch.get_num_threads())

    def _gather(self, kernel: Any, flat: Tensor, early: Tensor, own: Tensor, to_tokens: int) -> None:
        at = ops.at
        kernel(ctypes.byref(self.native), at(flat), at(early), at(own), to_tokens, torch.get_num_threads())

    def _fill(self, x: Tensor, early: Tensor, own: Tensor) -> None:
        """x [T, heads, D] into the blocks of queries, keys or values."""
        heads, size, cut = x.shape[1], x.shape[2], self.prefix
        group = heads // self.kv
        early.view(self.kv, group, cut, size).copy_(x[:cut].view(cut, self.kv, group, size).permute(1, 2, 0, 3))
        padded = x.new_zeros(self.rows, self.longest, heads, size)
        padded[self.row_of[cut:], self.place_of[cut:]] = x[cut:]
        padded = padded.view(self.rows, self.longest, self.kv, group, size)
        own.view(self.kv, self.rows, group, self.longest, size).copy_(padded.permute(2, 0, 3, 1, 4))

    def _take(self, early: Tensor, own: Tensor) -> Tensor:
        """The way back: [T, heads, D]."""
        size, cut = own.shape[-1], self.prefix
        group = own.shape[2] // self.longest
        first = early.reshape(self.kv, group, cut, size).permute(2, 0, 1, 3).reshape(cut, self.kv * group, size)
        rest = own.reshape(self.kv, self.rows, group, self.longest, size).permute(1, 3, 0, 2, 4)
        rest = rest.reshape(self.rows, self.longest, -1, size)[self.row_of[cut:], self.place_of[cut:]]
        return torch.cat((first, rest))


def fits_tiles(shape: Shape, window: int | None, seen: int, like: Tensor) -> bool:
    """Whether attention_tiles.h does the attention of rows of up to so many places, on numbers like those: on a
    processor with tiles, in bf16, where each token sees all before it."""
    if shape.score_cap is not None or shape.head % 32 or (window is not None and window < seen):
        return False
    if like.dtype != torch.bfloat16:
        return False
    library = native.library()
    return library is not None and library.tiles() == 1


def shared_prefix_attention(batch: Batch, network: Network) -> Attend:
    """Attention for one batch, to be passed to network.forward."""
    layout = Layout(batch.prefix, batch.lengths, batch.positions, network)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        how = _OnTiles if layout.on_tiles(qkv, layer) else _Attention
        return how.apply(qkv, layout, layer)  # type: ignore[no-any-return]

    return attend


def mix(layout: Layout, blocks: Blocks, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mixed values of the prefix's tokens and of the rows', as queries lie, and the weights behind them: the prefix's,
    the rows' on the prefix [K, B * G * L, P], the rows' own [K * B, G * L, L].

    Where the prefix was computed before, its queries are left out: qp is empty, kp and vp are not.
    """
    qp, kp, vp, q, k, v = blocks
    window, cap = layout.windows[layer], layout.cap
    early = qp @ kp.transpose(1, 2)
    mixed_early = qp
    if qp.numel():
        ops.softmax_(None, early, layout.scale, window, cap)
        mixed_early = early @ vp
    flat = q.flatten(1, 2)
    shared = flat @ kp.transpose(1, 2)
    own = q.flatten(0, 1) @ k.flatten(0, 1).transpose(1, 2)
    ops.softmax_(shared if kp.numel() else None, own, layout.scale, window, cap)
    mixed = own @ v.flatten(0, 1)
    if kp.numel():
        mixed.view_as(flat).baddbmm_(shared, vp)
    return mixed_early, mixed.view_as(q), early, shared, own


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, layer: int) -> Tensor:
        blocks = layout.split(qkv, layer)
        early, own, *weights = mix(layout, blocks, layer)
        kept = sum(weight.numel() for weight in weights) <= KEPT_WEIGHTS
        ctx.save_for_backward(*blocks, *(weights if kept else ()))
        ctx.layout, ctx.layer = layout, layer
        return layout.tokens(early, own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layout: Layout = ctx.layout
        blocks = Blocks(*ctx.saved_tensors[:6])
        qp, kp, vp, q, k, v = blocks
        early, shared, own = ctx.saved_tensors[6:] or mix(layout, blocks, ctx.layer)[2:]
        gp, g = layout.queries(gradient)
        out = layout.blocks(gradient)
        flat, rows = g.flatten(1, 2), g.flatten(0, 1)
        to_own = rows @ v.flatten(0, 1).transpose(1, 2)
        torch.bmm(own.transpose(1, 2), rows, out=out.v.flatten(0, 1))
        if not layout.prefix:
            ops.softmax_backward_(None, own, None, to_own, layout.scale)
            _through_cap(layout, to_own, q.flatten(0, 1), k.flatten(0, 1))
        else:
            to_shared = flat @ vp.transpose(1, 2)
            ops.softmax_backward_(shared, own, to_shared, to_own, layout.scale)
            to_early = gp @ vp.transpose(1, 2)
            ops.softmax_backward_(None, early, None, to_early, layout.scale)
            _through_cap(layout, to_own, q.flatten(0, 1), k.flatten(0, 1))
            _through_cap(layout, to_shared, q.flatten(1, 2), kp)
            _through_cap(layout, to_early, qp, kp)
            torch.bmm(early.transpose(1, 2), gp, out=out.vp).baddbmm_(shared.transpose(1, 2), flat)
            torch.bmm(to_early, kp, out=out.qp)
            torch.bmm(to_early.transpose(1, 2), qp, out=out.kp).baddbmm_(to_shared.transpose(1, 2), q.flatten(1, 2))
        torch.bmm(to_own, k.flatten(0, 1), out=out.q.flatten(0, 1))
        torch.bmm(to_own.transpose(1, 2), q.flatten(0, 1), out=out.k.flatten(0, 1))
        if layout.prefix:
            out.q.flatten(1, 2).baddbmm_(to_shared, kp)
        return layout.join(out, ctx.layer), None, None


class _OnTiles(torch.autograd.Function):
    """The same with one kernel each way. Beside qkv it keeps two numbers for each query: the weights are made again."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, layer: int) -> Tensor:
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), layout.kv * layout.group * layout.shape.head)
        largest, inverse = torch.empty(2, layout.kv, len(qkv) * layout.group)
        _on_tiles("attend", layout, layer, qkv, out, largest, inverse)
        ctx.save_for_backward(qkv, largest, inverse)
        ctx.layout, ctx.layer = layout, layer
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, largest, inverse = ctx.saved_tensors
        out = torch.empty_like(qkv)
        _on_tiles("attend_backward", ctx.layout, ctx.layer, qkv, gradient.contiguous(), largest, inverse, out)
        return out, None, None


def _on_tiles(name: str, layout: Layout, layer: int, qkv: Tensor, *others: Tensor) -> None:
    at, turns = ops.at, layout.turns[layout.rotary[layer]]
    getattr(native.library(), name)(
        *(ctypes.byref(layout.native), at(qkv), *map(at, turns), *map(at, others)),
        *(ctypes.c_float(layout.scale), torch.get_num_threads()),
    )


def _through_cap(layout: Layout, gradient: Tensor, q: Tensor, k: Tensor) -> None:
    """A gradient of capped scores to one of the scores q k^T themselves, in place: times 1 - tanh^2."""
    if layout.cap is not None:
        ratio = (q @ k.transpose(1, 2)).float().mul_(layout.scale / layout.cap).tanh_()
        gradient.mul_(1 - ratio.square_())

"""Attention of rows with a shared prefix, with its backward pass.

On processors with tiles, one kernel for each direction computes a row at a time within the caches
(kernels/attention_tiles.h). On others, and for windows or capped scores, it is made of block products: one product
for all rows' scores on the shared prefix, and causal scores of each row on itself. The backward pass computes the
weights of long rows again, because keeping them would take most of the memory.

Shapes: T tokens, K key/value heads, G query heads for each (H = K * G), B rows padded to L tokens after the prefix,
P prefix tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.engines.batch import Batch
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.network import Attend, Network, Shape, angles

SHARES = 8  # parts of the rows with separate sums of prefix gradients; must equal SHARES of attention_tiles.h
KEPT_WEIGHTS = 1 << 22  # a layer's attention weights are kept for the backward pass if they are at most so many numbers


class Blocks(NamedTuple):
    """Queries, keys and values in the layout of block products.

    The prefix's queries qp [K, G * P, D], keys kp and values vp [K, P, D]. The rows' queries q [K, B, G * L, D], keys k
    and values v [K, B, L, D]. Slots after a row's last token hold zeros.
    """

    qp: Tensor
    kp: Tensor
    vp: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Layout:
    """Where a batch's tokens go in the padded blocks, and their rotary angles.

    row_of [T]: a token's row; -1: the prefix. place_of [T]: its index in the row or prefix. starts: rows' first tokens.
    """

    def __init__(self, prefix: int, lengths: Sequence[int], positions: Tensor, network: Network) -> None:
        shape = network.shape
        self.shape, self.prefix, self.rows, self.longest = shape, prefix, len(lengths), max(lengths)
        self.kv, self.group, self.scale = shape.kv_heads, shape.heads // shape.kv_heads, shape.attention_scale
        rows = [-1] * prefix + [row for row, length in enumerate(lengths) for _ in range(length)]
        places = [*range(prefix), *(place for length in lengths for place in range(length))]
        self.row_of, self.place_of = torch.tensor(rows), torch.tensor(places)
        self.starts = torch.tensor([prefix, *lengths]).cumsum(0)
        self.turns = angles(network, positions)
        self.layers, self.cap = network.layers, shape.score_cap
        self.native = native.TokenLayout(
            *(len(rows), prefix, self.rows, self.longest, self.kv, self.group, shape.head),
            *(self.row_of.data_ptr(), self.place_of.data_ptr(), self.starts.data_ptr()),
        )

    def blocks(self, like: Tensor) -> Blocks:
        """Uninitialised blocks with the dtype of `like`."""
        heads = (self.group, 1, 1)  # for each key/value head: queries, keys, values
        shared = (like.new_empty(self.kv, part * self.prefix, self.shape.head) for part in heads)
        own = (like.new_empty(self.kv, self.rows, part * self.longest, self.shape.head) for part in heads)
        return Blocks(*shared, *own)

    def split(self, qkv: Tensor, layer: int) -> Blocks:
        """The blocks of a layer's qkv [T, (H + 2 K) * D], with queries and keys rotated."""
        blocks = self.blocks(qkv)
        cos, sin = self.turns[self.layers[layer].rotary]
        if ops.ran("split", qkv, self.native, qkv.contiguous(), cos, sin, *blocks, True):
            return blocks
        heads = self.kv * self.group
        parts = qkv.unflatten(-1, (-1, self.shape.head)).split((heads, self.kv, self.kv), 1)
        rotated = (ops.rotate(parts[0], cos, sin), ops.rotate(parts[1], cos, sin), parts[2])
        for part, shared, own in zip(rotated, blocks[:3], blocks[3:], strict=True):
            self._fill(part, shared, own)
        return blocks

    def join(self, blocks: Blocks, layer: int) -> Tensor:
        """The gradient of qkv [T, (H + 2 K) * D] for gradients of the blocks."""
        heads = self.kv * self.group
        cos, sin = self.turns[self.layers[layer].rotary]
        out = blocks.q.new_empty(len(self.row_of), (heads + 2 * self.kv) * self.shape.head)
        if ops.ran("split", out, self.native, out, cos, sin, *blocks, False):
            return out
        parts = [self._take(shared, own) for shared, own in zip(blocks[:3], blocks[3:], strict=True)]
        rotated = (ops.rotate(parts[0], cos, -sin), ops.rotate(parts[1], cos, -sin), parts[2])
        return torch.cat(rotated, 1).flatten(1)

    def tokens(self, shared: Tensor, own: Tensor) -> Tensor:
        """Values mixed by attention, in the blocks of queries, as [T, H * D]."""
        out = own.new_empty(len(self.row_of), self.kv * self.group * self.shape.head)
        ran = ops.ran("gather", out, self.native, out, shared, own, True)
        return out if ran else self._take(shared, own).flatten(1)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H * D] in the blocks of queries: qp and q."""
        blocks = self.blocks(x)
        if not ops.ran("gather", x, self.native, x.contiguous(), blocks.qp, blocks.q, False):
            self._fill(x.unflatten(-1, (-1, self.shape.head)), blocks.qp, blocks.q)
        return blocks.qp, blocks.q

    def _fill(self, x: Tensor, shared: Tensor, own: Tensor) -> None:
        """Copy x [T, heads, D] to blocks of queries, keys or values, in PyTorch."""
        heads, size, cut = x.shape[1], x.shape[2], self.prefix
        group = heads // self.kv
        shared.view(self.kv, group, cut, size).copy_(x[:cut].view(cut, self.kv, group, size).permute(1, 2, 0, 3))
        padded = x.new_zeros(self.rows, self.longest, heads, size)
        padded[self.row_of[cut:], self.place_of[cut:]] = x[cut:]
        padded = padded.view(self.rows, self.longest, self.kv, group, size)
        own.view(self.kv, self.rows, group, self.longest, size).copy_(padded.permute(2, 0, 3, 1, 4))

    def _take(self, shared: Tensor, own: Tensor) -> Tensor:
        """The reverse of _fill: [T, heads, D] from blocks."""
        size, cut = own.shape[-1], self.prefix
        group = own.shape[2] // self.longest
        first = shared.reshape(self.kv, group, cut, size).permute(2, 0, 1, 3).reshape(cut, self.kv * group, size)
        rest = own.reshape(self.kv, self.rows, group, self.longest, size).permute(1, 3, 0, 2, 4)
        rest = rest.reshape(self.rows, self.longest, -1, size)[self.row_of[cut:], self.place_of[cut:]]
        return torch.cat((first, rest))


def fits_tiles(shape: Shape, window: int | None, seen: int, like: Tensor) -> bool:
    """Whether attention_tiles.h computes attention over up to `seen` places, for tensors like `like`.

    It does on a processor with tiles, in bf16, if each token sees all earlier ones.
    """
    if shape.score_cap is not None or shape.head % 32 or (window is not None and window < seen):
        return False
    kernel = ops.kernel_for("tiles", like)
    return kernel is not None and kernel() == 1


def shared_prefix_attention(batch: Batch, network: Network) -> Attend:
    """The attend function of network.forward for one batch."""
    layout = Layout(batch.prefix, batch.lengths, batch.positions, network)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        on_tiles = fits_tiles(layout.shape, layout.layers[layer].window, layout.prefix + layout.longest, qkv)
        function = _OnTiles if on_tiles else _Attention
        return function.apply(qkv, layout, layer)  # type: ignore[no-any-return]

    return attend


def mix(layout: Layout, blocks: Blocks, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values mixed by attention, of the prefix's tokens and of the rows' (in the layouts of qp and q), and the weights.

    The weights are those of the prefix [K, G * P, P], of the rows on the prefix [K, B * G * L, P], and of the rows on
    themselves [K * B, G * L, L].
    """
    qp, kp, vp, q, k, v = blocks
    window, cap = layout.layers[layer].window, layout.cap
    prefix = qp @ kp.transpose(1, 2)
    mixed_prefix = qp
    if layout.prefix:
        ops.softmax_(None, prefix, layout.scale, window, cap)
        mixed_prefix = prefix @ vp
    flat = q.flatten(1, 2)
    shared = flat @ kp.transpose(1, 2)
    own = q.flatten(0, 1) @ k.flatten(0, 1).transpose(1, 2)
    ops.softmax_(shared if layout.prefix else None, own, layout.scale, window, cap)
    mixed = own @ v.flatten(0, 1)
    if layout.prefix:
        mixed.view_as(flat).baddbmm_(shared, vp)
    return mixed_prefix, mixed.view_as(q), prefix, shared, own


class _Attention(torch.autograd.Function):
    """Attention as block products: (qkv, layout, layer) -> [T, H * D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, layer: int) -> Tensor:
        blocks = layout.split(qkv, layer)
        prefix, own, *weights = mix(layout, blocks, layer)
        kept = sum(weight.numel() for weight in weights) <= KEPT_WEIGHTS
        ctx.save_for_backward(*blocks, *(weights if kept else ()))
        ctx.layout, ctx.layer = layout, layer
        return layout.tokens(prefix, own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layout: Layout = ctx.layout
        blocks = Blocks(*ctx.saved_tensors[:6])
        qp, kp, vp, q, k, v = blocks
        prefix, shared, own = ctx.saved_tensors[6:] or mix(layout, blocks, ctx.layer)[2:]
        gp, g = layout.queries(gradient)  # gradients of the mixed values, of the prefix and of the rows
        out = layout.blocks(gradient)  # gradients of the blocks
        flat, rows = g.flatten(1, 2), g.flatten(0, 1)
        to_own = rows @ v.flatten(0, 1).transpose(1, 2)
        to_shared = flat @ vp.transpose(1, 2) if layout.prefix else None
        ops.softmax_backward_(None if to_shared is None else shared, own, to_shared, to_own, layout.scale)
        _through_cap(layout, to_own, q.flatten(0, 1), k.flatten(0, 1))
        torch.bmm(own.transpose(1, 2), rows, out=out.v.flatten(0, 1))
        torch.bmm(to_own, k.flatten(0, 1), out=out.q.flatten(0, 1))
        torch.bmm(to_own.transpose(1, 2), q.flatten(0, 1), out=out.k.flatten(0, 1))
        if to_shared is not None:
            to_prefix = gp @ vp.transpose(1, 2)
            ops.softmax_backward_(None, prefix, None, to_prefix, layout.scale)
            _through_cap(layout, to_shared, q.flatten(1, 2), kp)
            _through_cap(layout, to_prefix, qp, kp)
            torch.bmm(prefix.transpose(1, 2), gp, out=out.vp).baddbmm_(shared.transpose(1, 2), flat)
            torch.bmm(to_prefix, kp, out=out.qp)
            torch.bmm(to_prefix.transpose(1, 2), qp, out=out.kp).baddbmm_(to_shared.transpose(1, 2), q.flatten(1, 2))
            out.q.flatten(1, 2).baddbmm_(to_shared, kp)
        return layout.join(out, ctx.layer), None, None


class _OnTiles(torch.autograd.Function):
    """_Attention with one kernel for each direction. It keeps qkv and two numbers for each query, but no weights."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, layer: int) -> Tensor:
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), layout.kv * layout.group * layout.shape.head)
        largest, inverse = torch.empty(2, layout.kv, len(qkv) * layout.group)
        _call_tiles("attend", layout, layer, qkv, out, largest, inverse)
        ctx.save_for_backward(qkv, largest, inverse)
        ctx.layout, ctx.layer = layout, layer
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, largest, inverse = ctx.saved_tensors
        out = torch.empty_like(qkv)
        _call_tiles("attend_backward", ctx.layout, ctx.layer, qkv, gradient.contiguous(), largest, inverse, out)
        return out, None, None


def _call_tiles(name: str, layout: Layout, layer: int, qkv: Tensor, *others: Tensor) -> None:
    turns = layout.turns[layout.layers[layer].rotary]
    ops.call(getattr(native.library(), name), layout.native, qkv, *turns, *others, float(layout.scale))


def _through_cap(layout: Layout, gradient: Tensor, q: Tensor, k: Tensor) -> None:
    """Turn a gradient of capped scores into one of the scores q k^T, in place: times 1 - tanh^2."""
    if layout.cap is not None:
        ratio = (q @ k.transpose(1, 2)).float().mul_(layout.scale / layout.cap).tanh_()
        gradient.mul_(1 - ratio.square_())

"""PackedLinear weights and low-rank pairs, and their products: the one place where matrices meet activations.

Where the processor multiplies bf16 (AMX, AVX-512 BF16) and native/ could be compiled, weights are laid out once the way
its product reads them, and a layer's frozen and low-rank products are one sum, rounded once. Where the tensor library
can keep a weight laid out for its own product (bf16 on other x86 processors), that is used; elsewhere plain products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network.ops import at
from tunesmith.engines.native.runtime import LargePages

_ROWS = 512  # how many rows of activations the tensor library's layout is chosen for
TILE = 32  # tiles multiply blocks of so many rows, columns and summands
_pages, _backward_pages = LargePages(), LargePages()  # read one after another in each direction


class LowRankFactors:
    """A low-rank change of a weight: x A^T C is added to the product, a [R, in], c [R, out], R a multiple of TILE.

    Call refresh after a or c changed.
    """

    def __init__(self, a: Tensor, c: Tensor) -> None:
        self.a, self.c = a, c
        self._tiles = _tiles(a) and _tiles(c)
        if self._tiles:
            self._packed = [torch.empty_like(x) for x in (a, a, c, c)]
        self.refresh()

    def refresh(self) -> None:
        """Lay the pair out again."""
        if self._tiles:
            _pack(self.a, self._packed[0], self._packed[1])
            _pack(self.c, self._packed[2], self._packed[3])

    def low(self, x: Tensor) -> Tensor:
        """x A^T: [T, in] -> [T, R]."""
        return _product(x, self._packed[0], self.a.shape[0]) if self._tiles else x @ self.a.t()

    def into_low(self, gradient: Tensor) -> Tensor:
        """gradient C^T: [T, out] -> [T, R]."""
        return _product(gradient, self._packed[2], self.c.shape[0]) if self._tiles else gradient @ self.c.t()

    @property
    def down(self) -> Tensor:
        """What low makes low values with."""
        return self._packed[0] if self._tiles else self.a

    @property
    def up(self) -> Tensor:
        """What low values are multiplied with on top of a product."""
        return self._packed[3] if self._tiles else self.c

    @property
    def back(self) -> Tensor:
        """What gradients of low values are multiplied with on top of a product's gradient."""
        return self._packed[1] if self._tiles else self.a


class PackedLinear:
    """A weight [out, in] with its bias [out], which no training changes.

    plain: multiply it as it lies, for a weight that changes after all: laying it out anew costs what it saves.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, plain: bool = False) -> None:
        self.out, self.into, self.bias = weight.shape[0], weight.shape[1], bias
        self._tiles = not plain and _tiles(weight)
        self._packs = not plain and not self._tiles and _packs(weight)
        self.wide_bias = bias.float() if bias is not None and self._tiles else None
        self._backward: Tensor | None = None
        self._forward = weight
        if self._tiles:
            self._forward = _pages.empty_like(weight)
            _pack(weight.contiguous(), self._forward, None)
        elif self._packs:
            self._forward = _laid_out(weight)

    @property
    def weight(self) -> Tensor:
        """The weight as it was given."""
        if self._tiles:
            blocks = self._forward.view(self.out // 32, self.into // 32, 2, 16, 16, 2)
            return blocks.permute(0, 2, 4, 1, 3, 5).reshape(self.out, self.into)
        return self._forward.to_dense() if self._packs else self._forward

    @property
    def tiles(self) -> Tensor | None:
        """The weight laid out for tiles; None where it is not."""
        return self._forward if self._tiles else None

    @property
    def row_by_row(self) -> bool:
        """Whether what a row gives does not depend on the rows beside it, to the bit."""
        return self._tiles or self._packs

    def numel(self) -> int:
        """How many numbers the weight has."""
        return self.out * self.into

    def __call__(self, x: Tensor, low: Tensor | None = None, pair: LowRankFactors | None = None) -> Tensor:
        """x W^T + bias, and low C where a pair is given: [T, in] -> [T, out]."""
        if self._tiles:
            return _product(x, self._forward, self.out, low, None if pair is None else pair.up, self.wide_bias)
        y: Tensor
        if self._packs:
            y = torch.ops.mkldnn._linear_pointwise(x, self._forward, self.bias, "none", [], "")
        else:
            y = F.linear(x, self._forward, self.bias)
        return y if low is None or pair is None else y.addmm_(low, pair.c)

    def back(self, gradient: Tensor, low: Tensor | None = None, pair: LowRankFactors | None = None) -> Tensor:
        """gradient W, and low A where a pair is given: [T, out] -> [T, in]."""
        self._lay_out_backward()
        if self._tiles and self._backward is not None:
            return _product(gradient, self._backward, self.into, low, None if pair is None else pair.back)
        if self._backward is not None:
            x: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, self._backward, None, "none", [], "")
        else:
            x = gradient @ self._forward
        return x if low is None or pair is None else x.addmm_(low, pair.a)

    def _lay_out_backward(self) -> None:
        """At the first gradient: what only answers needs no second copy."""
        if self._backward is None and self._tiles:
            self._backward = _backward_pages.empty_like(self._forward)
            _pack(self.weight, None, self._backward)
        elif self._backward is None and self._packs:
            self._backward = _laid_out(self.weight.t().contiguous())

    def apart(
        self, x: Tensor, sizes: Sequence[int], low: Sequence[Tensor | None], pairs: Sequence[LowRankFactors | None]
    ) -> Tensor:
        """As each span of x, sizes long, has by itself, with low values and a pair of its own or None.

        One product for all spans where rows stand alone (see row_by_row); else they are made span by span.
        """
        if self._tiles:
            up = [None if pair is None else pair.up for pair in pairs]
            return _products(x, self._forward, self.out, sizes, low, up, self.wide_bias)
        if not self._packs:
            return torch.cat([self(*each) for each in zip(x.split(sizes), low, pairs, strict=True)])
        y = self(x)
        for own, lower, pair in zip(y.split(sizes), low, pairs, strict=True):
            if lower is not None and pair is not None:
                own.addmm_(lower, pair.c)
        return y

    def back_apart(
        self,
        gradient: Tensor,
        sizes: Sequence[int],
        low: Sequence[Tensor | None],
        pairs: Sequence[LowRankFactors | None],
    ) -> Tensor:
        """The same of back."""
        if self._tiles:
            self._lay_out_backward()
            assert self._backward is not None
            down = [None if pair is None else pair.back for pair in pairs]
            return _products(gradient, self._backward, self.into, sizes, low, down)
        if not self._packs:
            return torch.cat([self.back(*each) for each in zip(gradient.split(sizes), low, pairs, strict=True)])
        x = self.back(gradient)
        for own, lower, pair in zip(x.split(sizes), low, pairs, strict=True):
            if lower is not None and pair is not None:
                own.addmm_(lower, pair.a)
        return x


def outer(low: Tensor, x: Tensor, out: Tensor) -> None:
    """low^T x into out: [T, R] and [T, N] to [R, N], the gradient of a pair's factor."""
    if not (_tiles(out) and low.dtype == x.dtype == out.dtype):
        torch.mm(low.t(), x, out=out)
        return
    library = _tile_library()
    assert library is not None
    low, x, wide = low.contiguous(), x.contiguous(), ctypes.c_int64
    sizes = (wide(low.shape[1]), at(x), wide(x.shape[1]), wide(x.shape[0]))
    library.outer(at(low), *sizes, at(out), torch.get_num_threads())


@cache
def _tile_library() -> ctypes.CDLL | None:
    library = native.library()
    return library if library is not None and library.tiles() else None


def _tiles(weight: Tensor) -> bool:
    fits = weight.dtype == torch.bfloat16
    return fits and not any(size % TILE for size in weight.shape) and _tile_library() is not None


def _packs(weight: Tensor) -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.bfloat16 and supported


def _laid_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)  # type: ignore[no-any-return]


def _pack(weight: Tensor, across: Tensor | None, along: Tensor | None) -> None:
    rows, columns = weight.shape
    library = _tile_library()
    assert library is not None
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(columns))
    library.pack(at(weight), *sizes, at(across), at(along), torch.get_num_threads())


class _Span(ctypes.Structure):
    """tiles.cpp's Span."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "a2", "b2")),
        *((name, ctypes.c_int64) for name in ("depth2", "rows")),
        ("c", ctypes.c_void_p),
    )


def _product(
    x: Tensor, packed: Tensor, out: int, low: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return _products(x, packed, out, [x.shape[0]], [low], [up], bias)


def _products(
    x: Tensor,
    packed: Tensor,
    out: int,
    sizes: Sequence[int],
    low: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    bias: Tensor | None = None,
) -> Tensor:
    """Spans of x, sizes long, each with low values and what those are multiplied with of its own, or without."""
    x = x.contiguous()
    y, depth, row = x.new_empty(x.shape[0], out), x.shape[1], 0
    spans = (_Span * len(sizes))()
    for span, size, lower, above in zip(spans, sizes, low, up, strict=True):
        span.a, span.c, span.rows = x.data_ptr() + row * depth * 2, y.data_ptr() + row * out * 2, size
        if lower is not None and above is not None:
            span.a2, span.b2, span.depth2 = lower.data_ptr(), above.data_ptr(), lower.shape[1]
        row += size
    library = _tile_library()
    assert library is not None
    wide = ctypes.c_int64
    library.product(spans, wide(len(sizes)), at(packed), wide(depth), at(bias), wide(out), torch.get_num_threads())
    return y

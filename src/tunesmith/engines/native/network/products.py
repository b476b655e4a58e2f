"""Products of activations with frozen weights and with low-rank factors, each laid out for the fastest kernel there is.

Three layouts, tried in this order:

- tiles: bf16 on a processor that multiplies bf16 (AMX or AVX-512 BF16) with compiled kernels. A layer's frozen and
  low-rank products are then one sum that is rounded once.
- mkldnn: bf16 on other x86 processors, in the layout of PyTorch's oneDNN product.
- plain: everything else, with PyTorch's own products.

Shapes: T tokens, R low-rank columns.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.native import kernels
from tunesmith.engines.native.kernels import INT64, POINTER
from tunesmith.engines.native.network.ops import call
from tunesmith.engines.native.runtime import LargePages

TILE = 32  # tiles multiply blocks of so many rows, columns and summands
_MKLDNN_ROWS = 512  # number of activation rows that the mkldnn layout is chosen for
# Two blocks of memory, since each direction reads its weights one after another.
_forward_pages, _backward_pages = LargePages(), LargePages()


class LowRankFactors:
    """A low-rank change of a weight: x A^T C is added to its product.

    a: A [R, in]. c: C [R, out], LoRA's B transposed. R is a multiple of TILE. Call refresh after a or c changed. The
    others are a and c, laid out for the product that they are named for.
    """

    def __init__(self, a: Tensor, c: Tensor) -> None:
        self.a, self.c = a, c
        self._tiles = _fits_tiles(a) and _fits_tiles(c)
        self.a_for_low, self.a_for_gradient, self.c_for_gradient, self.c_for_output = a, a, c, c
        if self._tiles:
            self.a_for_low, self.a_for_gradient = torch.empty_like(a), torch.empty_like(a)
            self.c_for_gradient, self.c_for_output = torch.empty_like(c), torch.empty_like(c)
        self.refresh()

    def refresh(self) -> None:
        """Lay out the factors again."""
        if self._tiles:
            _pack(self.a, self.a_for_low, self.a_for_gradient)
            _pack(self.c, self.c_for_gradient, self.c_for_output)

    def low(self, x: Tensor) -> Tensor:
        """The low-rank activations x A^T: [T, in] -> [T, R]."""
        return _product(x, self.a_for_low, self.a.shape[0]) if self._tiles else x @ self.a.t()

    def low_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the low-rank activations, gradient C^T: [T, out] -> [T, R]."""
        return _product(gradient, self.c_for_gradient, self.c.shape[0]) if self._tiles else gradient @ self.c.t()


class PackedLinear:
    """A linear layer's weight [out, into] and bias [out], laid out once for fast products. Training does not change it.

    plain: keep the weight as it is. Full fine-tuning does so, because its weights change with every step. Laying them
    out again would cost what the layout saves.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, plain: bool = False) -> None:
        self.out, self.into, self.bias = weight.shape[0], weight.shape[1], bias
        self._tiles = not plain and _fits_tiles(weight)
        bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._mkldnn = bf16 and not plain and not self._tiles
        self.wide_bias = bias.float() if bias is not None and self._tiles else None
        self._backward: Tensor | None = None
        self._forward = weight
        if self._tiles:
            self._forward = _forward_pages.empty_like(weight)
            _pack(weight.contiguous(), self._forward, None)
        elif self._mkldnn:
            self._forward = _mkldnn_layout(weight)

    @property
    def weight(self) -> Tensor:
        """The weight [out, into] in its usual layout."""
        if self._tiles:
            blocks = self._forward.view(self.out // 32, self.into // 32, 2, 16, 16, 2)
            return blocks.permute(0, 2, 4, 1, 3, 5).reshape(self.out, self.into)
        return self._forward.to_dense() if self._mkldnn else self._forward

    @property
    def tiles(self) -> Tensor | None:
        """The weight laid out for tiles; None in another layout."""
        return self._forward if self._tiles else None

    def numel(self) -> int:
        """Number of elements of the weight."""
        return self.out * self.into

    def __call__(self, x: Tensor, low: Tensor | None = None, factors: LowRankFactors | None = None) -> Tensor:
        """x W^T + bias, plus low C where factors are given: [T, into] -> [T, out]."""
        if self._tiles:
            c = None if factors is None else factors.c_for_output
            return _product(x, self._forward, self.out, low, c, self.wide_bias)
        y: Tensor
        if self._mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(x, self._forward, self.bias, "none", [], "")
        else:
            y = F.linear(x, self._forward, self.bias)
        return y if low is None or factors is None else y.addmm_(low, factors.c)

    def input_gradient(
        self, gradient: Tensor, low_gradient: Tensor | None = None, factors: LowRankFactors | None = None
    ) -> Tensor:
        """gradient W, plus low_gradient A where factors are given: [T, out] -> [T, into]."""
        # Laid out at the first gradient: a network that only answers needs no second copy.
        if self._backward is None and self._tiles:
            self._backward = _backward_pages.empty_like(self._forward)
            _pack(self.weight, None, self._backward)
        elif self._backward is None and self._mkldnn:
            self._backward = _mkldnn_layout(self.weight.t().contiguous())
        if self._backward is None:
            x = gradient @ self._forward
        elif self._tiles:
            a = None if factors is None else factors.a_for_gradient
            return _product(gradient, self._backward, self.into, low_gradient, a)
        else:
            x = torch.ops.mkldnn._linear_pointwise(gradient, self._backward, None, "none", [], "")
        return x if low_gradient is None or factors is None else x.addmm_(low_gradient, factors.a)


def outer(low: Tensor, x: Tensor, out: Tensor) -> None:
    """Write low^T x into out, a low-rank factor's gradient: low [T, R], x [T, N], out [R, N]."""
    if not (_fits_tiles(out) and low.dtype == x.dtype == out.dtype):
        torch.mm(low.t(), x, out=out)
        return
    low, x = low.contiguous(), x.contiguous()
    call(_tile_library().outer, low, low.shape[1], x, x.shape[1], x.shape[0], out)


@cache
def _tile_library() -> Any:
    """The library where it has tiles, else None."""
    library = kernels.library()
    return library if library is not None and library.tiles() else None


def _fits_tiles(weight: Tensor) -> bool:
    fits = weight.dtype == torch.bfloat16 and not any(size % TILE for size in weight.shape)
    return fits and _tile_library() is not None


def _mkldnn_layout(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _MKLDNN_ROWS)  # type: ignore[no-any-return]


def _pack(weight: Tensor, forward: Tensor | None, backward: Tensor | None) -> None:
    """Write a weight [n, k] into forward as the operand [k, n] of x W^T, and into backward as [n, k] of gradient W."""
    call(_tile_library().pack, weight, *weight.shape, forward, backward)


class _Operands(ctypes.Structure):
    """Operands of kernels.h."""

    _fields_ = kernels.fields((POINTER, "a a2 b2"), (INT64, "depth2 rows"), (POINTER, "c"))


def _product(
    x: Tensor,
    packed: Tensor,
    out: int,
    low: Tensor | None = None,
    packed_low: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [T, K] times packed [K, out], plus low [T, R] times packed_low [R, out] where given, plus bias: [T, out]."""
    x = x.contiguous()
    rows, depth = x.shape
    y = x.new_empty(rows, out)
    more: tuple[int | None, int | None, int] = (None, None, 0)
    if low is not None and packed_low is not None:
        more = (low.data_ptr(), packed_low.data_ptr(), low.shape[1])
    operands = _Operands(x.data_ptr(), *more, rows, y.data_ptr())
    call(_tile_library().product, operands, packed, depth, bias, out)
    return y

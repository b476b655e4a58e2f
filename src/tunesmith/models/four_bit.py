"""A frozen weight kept as 4-bit blocks and unpacked for each product: the base of QLoRA.

Method: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs": NF4, a scale for each block of 64
numbers, the scales themselves quantised to 8 bits in blocks of 256. bitsandbytes packs and unpacks; each linear layer
of the base is packed by itself, so that its numbers are those that transformers makes of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.products import Frozen, Pair

KIND, BLOCK = "nf4", 64


def described() -> dict[str, Any]:
    """How weights are quantised, as part of what a training depends on."""
    return {"type": KIND, "block": BLOCK, "double": True, "bitsandbytes": version("bitsandbytes")}


class FourBit(Frozen):
    """A weight [out, in] as parts that lie one below the other, with its bias [out].

    Products are plain ones, and so are those of a pair on top: as it lies, not as tiles have it laid out.
    """

    def __init__(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> None:
        self.out, self.into, self.bias = sum(len(part) for part in parts), parts[0].shape[1], bias
        self._tiles = self._packs = False  # plain products, of runs trained together each its own
        self._parts = [(*_pack(part), len(part)) for part in parts]

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with: unpacked anew, in the dtype it was given in."""
        parts = [_unpack(*part, self.into) for part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        """What the weight takes in memory."""
        return sum(
            blocks.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes
            for blocks, state, _ in self._parts
        )

    def __call__(self, x: Tensor, low: Tensor | None = None, pair: Pair | None = None) -> Tensor:
        """x W^T + bias, and low C where a pair is given: [T, in] -> [T, out]."""
        y = F.linear(x, self.weight, self.bias)
        return y if low is None or pair is None else y.addmm_(low, pair.c)

    def back(self, gradient: Tensor, low: Tensor | None = None, pair: Pair | None = None) -> Tensor:
        """gradient W, and low A where a pair is given: [T, out] -> [T, in]."""
        x = gradient @ self.weight
        return x if low is None or pair is None else x.addmm_(low, pair.a)


def _pack(weight: Tensor) -> tuple[Tensor, Any]:
    """Packed a block a row: the library unpacks rows that no block ends with wrongly on a processor (0.50.2)."""
    rows = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    packed: tuple[Tensor, Any] = _library().quantize_4bit(
        rows, blocksize=BLOCK, quant_type=KIND, compress_statistics=True
    )
    return packed


def _unpack(blocks: Tensor, state: Any, rows: int, columns: int) -> Tensor:
    numbers: Tensor = _library().dequantize_4bit(blocks, state)
    return numbers.flatten()[: rows * columns].view(rows, columns)


@cache
def _library() -> Any:
    with _closed():
        from bitsandbytes import functional
    return functional


@contextmanager
def _closed() -> Iterator[None]:
    """Where the package `kernels` is installed, bitsandbytes fetches code from a hub as it is imported, and warns where
    it is not. That code is for products we do not call: it is kept from looking."""
    log = logging.getLogger("bitsandbytes")
    level, kernels = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels

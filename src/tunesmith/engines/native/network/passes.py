"""A decoding pass that is run again and again, by the calls of kernels that its first run made.

network.forward prepares each call of a kernel in Python. That takes about eight microseconds, together a tenth of a
small model's pass. The recorded calls are one call of tiles.cpp, during which other threads can compute.

Shapes: T tokens, M width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from tunesmith.engines.native import kernels
from tunesmith.engines.native.kernels import FLOAT, INT64, POINTER
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.network import (
    Attend,
    Layer,
    Linear,
    Network,
    Shape,
    angles,
    embedded,
    run_layers,
)

# What only kernels compute, of the fields that have a default, which means that a network is as Llama's there.
_BY_KERNELS = ("norm_offset", "embedding_scale", "logit_cap", "rotary")  # the second and third around the layers


def fits(network: Network) -> bool:
    """Whether nothing but kernels computes a network's layers: they are like Llama's, in bf16, on a processor with
    tiles."""
    if not _by_kernels(network.shape) or not all(map(_by_kernels, network.layers)):
        return False
    return all(product.tiles is not None for layer in network.layers for product in layer.linear.values())


def _by_kernels(described: Shape | Layer) -> bool:
    stated = [each for each in fields(described) if each.default is not MISSING and each.name not in _BY_KERNELS]
    return all(getattr(described, each.name) is each.default for each in stated)


class _Call(ctypes.Structure):
    """Call of tiles.cpp."""

    _fields_ = kernels.fields((POINTER, "kernel"), (INT64 * 12, "numbers"), (FLOAT * 2, "fractions"))


class RecordedPass:
    """A pass of T tokens at places that grow, with the same prefixes and adapters."""

    def __init__(
        self,
        network: Network,
        linear: Linear,
        attention: Callable[[list[tuple[Tensor, Tensor]]], Attend],
        ids: Tensor,
        positions: Tensor,
    ) -> None:
        """Run the pass for the first time. attention: by the angles of the tokens."""
        self._network, self._x, self._turns = network, embedded(network, ids), angles(network, positions)
        with ops.recorded() as self._calls:
            self._parts = run_layers(network, self._x, linear, attention(self._turns))
        self._prepared: ctypes.Array[_Call] | None = None

    def hidden(self) -> Tensor:
        """Hidden states [T, M] before the final norm, of the last run."""
        x, added = self._parts
        return x + added

    def repeat(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [T, M], of ids [T] at positions [T], as network.forward computes them."""
        self._x.copy_(embedded(self._network, ids))
        for before, now in zip(self._turns, angles(self._network, positions), strict=True):
            for kept, turn in zip(before, now, strict=True):
                kept.copy_(turn)
        if self._prepared is None:
            self._prepared = (_Call * len(self._calls))(*(_prepared(kernel, given) for kernel, given, _ in self._calls))
        kernels.library().repeat(self._prepared, INT64(len(self._prepared)))
        return self.hidden()


def _prepared(kernel: Any, given: Sequence[Any]) -> _Call:
    fractions = [each.value for each in given if isinstance(each, FLOAT)]
    numbers = [each.value or 0 for each in given if not isinstance(each, FLOAT)]
    return _Call(ctypes.cast(kernel, POINTER), (INT64 * 12)(*numbers), (FLOAT * 2)(*fractions))

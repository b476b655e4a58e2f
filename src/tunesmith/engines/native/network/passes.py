"""A decoding pass through all layers in one native call, for the networks that kernels/pass.cpp computes.

network.forward calls each kernel from Python. Each call costs about ten microseconds, a tenth of a small model's pass.

Shapes: T tokens, M width, H query heads, K key/value heads, D head size, F the MLP's middle, R low-rank columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.native import kernels
from tunesmith.engines.native.adapters.adapter import Place
from tunesmith.engines.native.kernels import FLOAT, INT64, POINTER
from tunesmith.engines.native.network.network import GROUPS, Layer, Network, Shape, angles, embedded
from tunesmith.engines.native.network.ops import Places, PrefixPages
from tunesmith.engines.native.network.products import LowRankFactors, PackedLinear

# Place -> its factors, and a mask [T, R] of the low-rank activations to set to zero because they belong to another
# row's adapter (no mask: there are none). Returns None for a place that is not adapted.
MaskedFactors = tuple[LowRankFactors, Tensor | None]
FactorsAt = Callable[[Place], MaskedFactors | None]
# Pages of keys and of values, by layer.
Caches = tuple[Sequence[Tensor], Sequence[Tensor]]

# What pass.cpp computes of the fields that have a default, which means that a network is as Llama's there.
_COMPUTED = ("norm_offset", "embedding_scale", "logit_cap", "rotary")  # the second and third in Python, around the pass


class _Product(ctypes.Structure):
    """Product of pass.cpp."""

    _fields_ = kernels.fields((POINTER, "packed a_for_low c_for_output bias masked"), (INT64, "out into rank"))


class _Layer(ctypes.Structure):
    """PassLayer of pass.cpp."""

    _fields_ = kernels.fields((POINTER, "attention_norm mlp_norm keys values"), (_Product, " ".join(GROUPS)))


class _Group(ctypes.Structure):
    """Group of pass.cpp."""

    _fields_ = kernels.fields((INT64, "first count prefix prompt"), (POINTER, "shared"))


_BUFFERS = "x added normed qkv q mixed gate_up middle low norms"


class _Pass(ctypes.Structure):
    """Pass of pass.cpp."""

    _fields_ = kernels.fields(
        (INT64, "rows width layers groups threads"),
        (FLOAT, "epsilon offset scale"),
        (POINTER, f"layer group pages cosine sine {_BUFFERS}"),
    )


def fits(network: Network) -> bool:
    """Whether pass.cpp computes a network: layers like Llama's, in bf16, on a processor with tiles."""
    library = kernels.library()
    if library is None or library.tiles() != 1 or network.dtype != torch.bfloat16 or len(network.rotary) != 1:
        return False
    if not _computes(network.shape) or not all(map(_computes, network.layers)):
        return False
    return all(product.tiles is not None for layer in network.layers for product in layer.linear.values())


def _computes(described: Shape | Layer) -> bool:
    """Whether pass.cpp takes every field into account."""
    stated = [each for each in fields(described) if each.default is not MISSING and each.name not in _COMPUTED]
    return all(getattr(described, each.name) is each.default for each in stated)


class Pass:
    """A decoding pass that can be run again and again: T tokens at places, with the same prefixes and adapters."""

    def __init__(
        self,
        network: Network,
        factors: FactorsAt,
        places: Places,
        groups: Sequence[tuple[Sequence[PrefixPages] | None, slice, bool]],
        caches: Caches,
    ) -> None:
        """groups: a prefix's keys and values by layer, its rows' tokens, and whether they are of one prompt."""
        self._network, shape, tokens = network, network.shape, len(places.lengths)
        self._kept_alive: list[Any] = [caches, places]  # the native call reads them by address
        heads, middle = shape.heads * shape.head, network.layers[0].linear["down"].into
        layers = (_Layer * shape.layers)()
        rank = 0
        for number, layer in enumerate(network.layers):
            native_layer = layers[number]
            native_layer.attention_norm = layer.attention_norm.data_ptr()
            native_layer.mlp_norm = layer.mlp_norm.data_ptr()
            native_layer.keys, native_layer.values = (cache[number].data_ptr() for cache in caches)
            for group, product in layer.linear.items():
                rank = max(rank, self._fill(getattr(native_layer, group), product, factors((number, group))))
        sizes = (shape.width, shape.width, shape.width, sum(network.parts("qkv")), heads, heads, 2 * middle, middle)
        buffers = [torch.empty(tokens, size, dtype=network.dtype) for size in (*sizes, rank)]
        self._x, self._added = buffers[:2]
        buffers.append(torch.empty(tokens, 1))
        native_groups = (_Group * len(groups))(*(self._group(*group) for group in groups))
        self._call = _Pass(tokens, shape.width, shape.layers, len(groups), torch.get_num_threads())
        self._call.epsilon, self._call.offset = shape.epsilon, shape.norm_offset
        self._call.scale = shape.attention_scale
        self._call.layer, self._call.group = ctypes.addressof(layers), ctypes.addressof(native_groups)
        places.native.stride = caches[0][0].stride(0)
        self._call.pages = ctypes.addressof(places.native)
        for name, tensor in zip(_BUFFERS.split(), buffers, strict=True):
            setattr(self._call, name, tensor.data_ptr())
        self._kept_alive += [layers, native_groups, buffers]

    def run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [T, M] before the final norm, of ids [T] at positions [T], as network.forward computes them."""
        ((cos, sin),) = angles(self._network, positions)
        self._x.copy_(embedded(self._network, ids))
        self._call.cosine, self._call.sine = cos.data_ptr(), sin.data_ptr()
        kernels.library().decoding_pass(ctypes.byref(self._call))
        return self._x + self._added

    def _fill(self, native: _Product, product: PackedLinear, adapted: MaskedFactors | None) -> int:
        """Describe a product to the native call; returns the rank of its factors, 0 where there are none."""
        assert product.tiles is not None
        native.packed, native.out, native.into = product.tiles.data_ptr(), product.out, product.into
        if product.wide_bias is not None:
            native.bias = product.wide_bias.data_ptr()
        if adapted is None:
            return 0
        factors, masked = adapted
        native.a_for_low, native.c_for_output = factors.a_for_low.data_ptr(), factors.c_for_output.data_ptr()
        native.rank = len(factors.a)
        if masked is not None:
            native.masked = masked.data_ptr()
        self._kept_alive.append(adapted)
        return len(factors.a)

    def _group(self, prefix: Sequence[PrefixPages] | None, rows: slice, prompt: bool) -> _Group:
        group = _Group(rows.start, rows.stop - rows.start, 0, prompt)
        if prefix is not None:
            pages = (ctypes.c_void_p * (2 * len(prefix)))(
                *(layer.keys.data_ptr() for layer in prefix), *(layer.values.data_ptr() for layer in prefix)
            )
            group.prefix, group.shared = prefix[0].length, ctypes.addressof(pages)
            self._kept_alive += [prefix, pages]
        return group

"""A decoding pass through all layers in one native call, for networks that native/pass.cpp computes.

What network.forward does in Python, kernel by kernel, costs some ten microseconds a kernel: a good tenth of a small
model's pass. Shapes: T tokens, M width, H query heads, K key/value heads, D head size, F the MLP's middle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.adapters.adapter import Place
from tunesmith.engines.native.network.network import GROUPS, Network, angles, embedded
from tunesmith.engines.native.network.ops import Early, Places
from tunesmith.engines.native.network.products import LowRankFactors, PackedLinear

# What an adapted place has: a pair, and [T, R] which low values are not a row's own (None: all are); None: not adapted.
Pairs = Callable[[Place], "tuple[LowRankFactors, Tensor | None] | None"]


class _Product(ctypes.Structure):
    """pass.cpp's Product."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "down", "up", "bias", "others")),
        *((name, ctypes.c_int64) for name in ("out", "into", "rank")),
    )


class _Layer(ctypes.Structure):
    """pass.cpp's PassLayer."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "keys", "values")),
        *((group, _Product) for group in GROUPS),
    )


class _Group(ctypes.Structure):
    """pass.cpp's Group."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("first", "count", "prefix")), ("early", ctypes.c_void_p))


_ROOM = ("x", "added", "normed", "qkv", "q", "mixed", "gate_up", "middle", "low", "norms")


class _Pass(ctypes.Structure):
    """pass.cpp's Pass."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "layers", "groups", "threads")),
        *((name, ctypes.c_float) for name in ("epsilon", "offset", "scale")),
        *((name, ctypes.c_void_p) for name in ("layer", "group", "pages", "cosine", "sine", *_ROOM)),
    )


def fits(network: Network) -> bool:
    """Whether pass.cpp computes a network: one of Llama's own kind, in bf16, on a processor with tiles."""
    shape, library = network.shape, native.library()
    if library is None or library.tiles() != 1:
        return False
    if shape.gelu or shape.score_cap is not None or len(network.rotary) > 1:
        return False
    plain = all(
        each.window is None
        and all(more is None for more in (each.q_norm, each.k_norm, each.after_attention, each.after_mlp))
        and all(isinstance(product, PackedLinear) and product.tiles is not None for product in each.linear.values())
        for each in network.layers
    )
    return plain and network.dtype == torch.bfloat16


class Pass:
    """The same pass again and again: T tokens at places, behind the same prefixes, under the same adapters."""

    def __init__(
        self,
        network: Network,
        pairs: Pairs,
        places: Places,
        groups: Sequence[tuple[Sequence[Early] | None, slice]],
        caches: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        """groups: the keys and values of a prefix by layer, and its tokens. caches: keys and values by layer."""
        self._network, self._places, shape, tokens = network, places, network.shape, len(places.lengths)
        self._held: list[Any] = [caches]  # what the call reads by address
        heads, middle = shape.heads * shape.head, network.layers[0].linear["down"].into
        layers = (_Layer * shape.layers)()
        rank = 0
        for number, layer in enumerate(network.layers):
            own = layers[number]
            own.attention_norm, own.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
            own.keys, own.values = (cache[number].data_ptr() for cache in caches)
            for group, product in layer.linear.items():
                rank = max(rank, self._fill(getattr(own, group), product, pairs((number, group))))
        sizes = (shape.width, shape.width, shape.width, sum(network.parts("qkv")), heads, heads, 2 * middle, middle)
        room = [torch.empty(tokens, size, dtype=network.dtype) for size in (*sizes, rank)]
        self._x, self._added = room[:2]
        room.append(torch.empty(tokens, 1))
        behind = (_Group * len(groups))(*(self._group(early, rows, shape.layers) for early, rows in groups))
        self._call = _Pass(tokens, shape.width, shape.layers, len(groups), torch.get_num_threads())
        self._call.epsilon, self._call.offset = shape.epsilon, shape.norm_offset
        self._call.scale = shape.attention_scale
        self._call.layer, self._call.group = ctypes.addressof(layers), ctypes.addressof(behind)
        places.native.apart = caches[0][0].stride(0)
        self._call.pages = ctypes.addressof(places.native)
        for name, tensor in zip(_ROOM, room, strict=True):
            setattr(self._call, name, tensor.data_ptr())
        self._held += [layers, behind, room]

    def run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [T, M] before the final norm, of ids [T] at positions [T], as network.forward gives them."""
        ((cos, sin),) = angles(self._network, positions)
        self._x.copy_(embedded(self._network, ids))
        self._call.cosine, self._call.sine = cos.data_ptr(), sin.data_ptr()
        native.library().decoding_pass(ctypes.byref(self._call))
        return self._x + self._added

    def _fill(self, told: _Product, product: PackedLinear, adapted: tuple[LowRankFactors, Tensor | None] | None) -> int:
        """Describe a product; returns the rank on top."""
        assert product.tiles is not None
        told.packed, told.out, told.into = product.tiles.data_ptr(), product.out, product.into
        if product.wide_bias is not None:
            told.bias = product.wide_bias.data_ptr()
        if adapted is None:
            return 0
        pair, others = adapted
        told.down, told.up, told.rank = pair.down.data_ptr(), pair.up.data_ptr(), len(pair.a)
        if others is not None:
            told.others = others.data_ptr()
        self._held.append(adapted)
        return len(pair.a)

    def _group(self, early: Sequence[Early] | None, rows: slice, layers: int) -> _Group:
        told = _Group(rows.start, rows.stop - rows.start)
        if early is not None:
            each = (ctypes.c_void_p * (2 * layers))(
                *(one.keys.data_ptr() for one in early), *(one.values.data_ptr() for one in early)
            )
            told.prefix, told.early = early[0].length, ctypes.addressof(each)
            self._held += [early, each]
        return told

"""LoRA adapters: low-rank changes of linear layers, in PEFT's layout on disk and packed by group in memory.

Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native.network.network import GROUPS, Linear, Network
from tunesmith.engines.native.network.products import TILE, LowRankFactors
from tunesmith.models.base import Base
from tunesmith.models.weight_files import AdapterConfig, read_adapter_file

Place = tuple[int, str]  # (layer, group)
LAYERS = "base_model.model.model.layers"  # PEFT's name of them


def blocks(network: Network, group: str, config: AdapterConfig) -> list[tuple[str, slice, slice]]:
    """For each adapted layer of a group: its name, its rows of b, and its columns of b, which are its rows of a."""
    adapted: list[tuple[str, slice, slice]] = []
    row = 0
    for part, size in zip(GROUPS[group], network.parts(group), strict=True):
        if part.rsplit(".", 1)[-1] in config.targets:
            column = len(adapted) * config.rank
            adapted.append((part, slice(row, row + size), slice(column, column + config.rank)))
        row += size
    return adapted


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter laid out for products, scaled and in the network's dtype. row_scales: those of DoRA (Liu et al. 2024)
    [out], by place; 1 for rows that are not adapted."""

    factors: dict[Place, LowRankFactors]
    row_scales: dict[Place, Tensor]

    @property
    def plain_factors(self) -> Callable[[Place], tuple[LowRankFactors, None] | None] | None:
        """Each place's low-rank factors, which apply to every row; None where an adapter has row scales too."""
        if self.row_scales:
            return None
        return lambda place: (self.factors[place], None) if place in self.factors else None


def adapted_linear(network: Network, packed: PackedAdapter) -> Linear:
    """The base's linear layers with the adapter on top, for use without gradients."""

    def apply(number: int, group: str, x: Tensor) -> Tensor:
        product, factors = network.layers[number].linear[group], packed.factors.get((number, group))
        if factors is None:
            return product(x)
        y = product(x, factors.low(x), factors)
        scales = packed.row_scales.get((number, group))
        return y if scales is None else scale_rows(y, scales, product.bias)

    return apply


def scale_rows(y: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """DoRA's last step: the output y [T, out] without its bias, times scales [out], plus the bias."""
    return y * scales if bias is None else (y - bias) * scales + bias


def read_adapter(folder: Path, network: Network, base: Base) -> PackedAdapter:
    """The adapter of a base in a PEFT folder, laid out for products. Raises Refused where it does not fit the base.

    The n adapted layers of a place share one product: their A are concatenated by rows, and their B are on the diagonal
    of another matrix.
    """
    where = str(folder)
    file = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint)
    config, tensors = file.config, {name: torch.from_numpy(tensor) for name, tensor in file.tensors.items()}
    packed = PackedAdapter({}, {})
    adapted = range(network.shape.layers) if config.layers is None else config.layers
    for number, layer in enumerate(network.layers):
        for group, product in layer.linear.items():
            places = blocks(network, group, config)
            if not places or number not in adapted:
                continue
            every = len(places) * config.rank
            a, b = torch.zeros(every, product.into), torch.zeros(product.out, every)
            magnitudes: list[tuple[slice, Tensor]] = []
            for part, rows, columns in places:
                prefix = f"{LAYERS}.{number}.{part}"
                try:
                    a[columns] = tensors.pop(f"{prefix}.lora_A.weight")
                    b[rows, columns] = tensors.pop(f"{prefix}.lora_B.weight")
                    if config.dora:
                        magnitudes.append((rows, tensors.pop(f"{prefix}.lora_magnitude_vector")))
                except (KeyError, RuntimeError) as error:
                    raise Refused(f"the adapter does not fit {prefix}: {error}", where=where) from error
            missing = -every % TILE  # rows of zeros up to a multiple of TILE
            scaled = F.pad((b * config.scale).t(), (0, 0, 0, missing)).contiguous()
            packed.factors[number, group] = LowRankFactors(
                F.pad(a, (0, 0, 0, missing)).to(network.dtype), scaled.to(network.dtype)
            )
            if magnitudes:  # what gives each adapted row of W + scale B A its magnitude
                lengths = torch.linalg.vector_norm(product.weight.float() + b @ a * config.scale, dim=1)
                scales = torch.ones(product.out)
                for rows, magnitude in magnitudes:
                    scales[rows] = magnitude / lengths[rows]
                packed.row_scales[number, group] = scales.to(network.dtype)
    if tensors:
        raise Refused(f"the adapter holds tensors no layer takes, such as {sorted(tensors)[0]}", where=where)
    return packed

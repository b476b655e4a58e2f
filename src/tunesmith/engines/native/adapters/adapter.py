"""LoRA adapters: low-rank changes of linear layers, in PEFT's layout on disk and packed by group in memory.

Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native.network.network import GROUPS, Linear, Network
from tunesmith.engines.native.network.products import TILE, LowRankFactors
from tunesmith.models.base import Base
from tunesmith.models.weight_files import AdapterConfig, read_adapter_file, save_adapter_file

Place = tuple[int, str]  # (layer, group)


@dataclass(frozen=True)
class Adapter:
    """An adapter by place. The n adapted layers of a group share one product.

    a: [n r, in], the A of these layers concatenated by rows. b: [out, n r], their B on its diagonal. m: with DoRA (Liu
    et al. 2024) the magnitude of each row of the group [out], otherwise empty.
    """

    config: AdapterConfig
    a: Mapping[Place, Tensor]
    b: Mapping[Place, Tensor]
    m: Mapping[Place, Tensor]


def blocks(network: Network, group: str, config: AdapterConfig) -> list[tuple[str, slice, slice]]:
    """For each adapted layer of a group: its name, its rows of b, and its columns of b, which are its rows of a."""
    found: list[tuple[str, slice, slice]] = []
    row = 0
    for part, size in zip(GROUPS[group], network.parts(group), strict=True):
        if part.rsplit(".", 1)[-1] in config.targets:
            column = len(found) * config.rank
            found.append((part, slice(row, row + size), slice(column, column + config.rank)))
        row += size
    return found


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter laid out for products, scaled and in the network's dtype. row_scales: DoRA's [out], by place."""

    factors: Mapping[Place, LowRankFactors]
    row_scales: Mapping[Place, Tensor]

    @property
    def plain_factors(self) -> Callable[[Place], tuple[LowRankFactors, None] | None] | None:
        """Each place's low-rank factors, which apply to every row; None where an adapter has row scales too."""
        if self.row_scales:
            return None
        return lambda place: (self.factors[place], None) if place in self.factors else None


def pack(network: Network, adapter: Adapter) -> PackedAdapter:
    """The adapter laid out for products without gradients."""
    return PackedAdapter(
        {
            place: _factors(adapter.a[place], adapter.b[place] * adapter.config.scale, network.dtype)
            for place in adapter.a
        },
        {place: _row_scales(network, adapter, place).to(network.dtype) for place in adapter.m},
    )


def adapted_linear(network: Network, adapter: Adapter | PackedAdapter) -> Linear:
    """The base's linear layers with the adapter on top, for use without gradients."""
    packed = adapter if isinstance(adapter, PackedAdapter) else pack(network, adapter)

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


def _row_scales(network: Network, adapter: Adapter, place: Place) -> Tensor:
    """The factors [out] that give each row of W + scale B A the norm m; 1 for rows that are not adapted."""
    number, group = place
    weight = network.layers[number].linear[group].weight.float()
    changed = adapter.b[place].float() @ adapter.a[place].float() * adapter.config.scale
    factor = adapter.m[place] / torch.linalg.vector_norm(weight + changed, dim=1)
    adapted = torch.zeros(len(factor), dtype=torch.bool)
    for _, rows, _ in blocks(network, group, adapter.config):
        adapted[rows] = True
    return torch.where(adapted, factor, 1.0)


def _factors(a: Tensor, b: Tensor, dtype: torch.dtype) -> LowRankFactors:
    """Low-rank factors of a [r, in] and b [out, r], with rows of zeros up to a multiple of TILE."""
    missing = -len(a) % TILE
    return LowRankFactors(
        F.pad(a, (0, 0, 0, missing)).to(dtype), F.pad(b.t(), (0, 0, 0, missing)).contiguous().to(dtype)
    )


def save_adapter(adapter: Adapter, network: Network, base: Base, folder: Path) -> None:
    """Write the adapter of a base's network into an existing folder, in PEFT's layout and fp32."""
    tensors: dict[str, Tensor] = {}
    for (number, group), a in adapter.a.items():
        b = adapter.b[number, group]
        for part, rows, columns in blocks(network, group, adapter.config):
            prefix = f"base_model.model.model.layers.{number}.{part}"
            tensors[f"{prefix}.lora_A.weight"] = a[columns].float().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = b[rows, columns].float().contiguous()
            if adapter.m:
                tensors[f"{prefix}.lora_magnitude_vector"] = adapter.m[number, group][rows].float().contiguous()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    save_adapter_file(folder, adapter.config, arrays, base=base.digest, fingerprint=base.fingerprint)


def read_adapter(folder: Path, network: Network, base: Base) -> Adapter:
    """The adapter of a base in a PEFT folder. Raises Refused where it does not fit the base."""
    where = str(folder)
    file = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in file.tensors.items()}
    config = file.config
    a: dict[Place, Tensor] = {}
    b: dict[Place, Tensor] = {}
    m: dict[Place, Tensor] = {}
    adapted = range(network.shape.layers) if config.layers is None else config.layers
    for number, layer in enumerate(network.layers):
        for group in GROUPS:
            found = blocks(network, group, config)
            if not found or number not in adapted:
                continue
            out, into = layer.linear[group].out, layer.linear[group].into
            a[number, group] = torch.zeros(len(found) * config.rank, into)
            b[number, group] = torch.zeros(out, len(found) * config.rank)
            if config.dora:
                m[number, group] = torch.ones(out)
            for part, rows, columns in found:
                prefix = f"base_model.model.model.layers.{number}.{part}"
                try:
                    if config.dora:
                        m[number, group][rows] = tensors.pop(f"{prefix}.lora_magnitude_vector")
                    a[number, group][columns] = tensors.pop(f"{prefix}.lora_A.weight")
                    b[number, group][rows, columns] = tensors.pop(f"{prefix}.lora_B.weight")
                except (KeyError, RuntimeError) as error:
                    raise Refused(f"the adapter does not fit {prefix}: {error}", where=where) from error
    if tensors:
        raise Refused(f"the adapter holds tensors no layer takes, such as {sorted(tensors)[0]}", where=where)
    return Adapter(config, a, b, m)

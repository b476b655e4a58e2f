"""Rows of several adapters in one product: the frozen weight is multiplied once, and each row gets its own adapter.

The low-rank factors of all adapters are concatenated. A row's low-rank values are set to zero where they belong to
another adapter, so the row gets the same result as with its own adapter alone. Punica (Chen et al. 2023) gathers rows
instead. On a CPU, one dense product of a few dozen rows costs less than a call for each adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tunesmith.engines.native.adapters.adapter import PackedAdapter, scale_rows
from tunesmith.engines.native.network import ops
from tunesmith.engines.native.network.network import Linear, Network
from tunesmith.engines.native.network.products import LowRankFactors


class AdapterBatch:
    """Several adapters of one network, for one forward pass over rows of all of them."""

    def __init__(self, network: Network, adapters: Sequence[PackedAdapter]) -> None:
        self._network = network
        self._places = {
            place: _concatenated([adapter.factors.get(place) for adapter in adapters])
            for place in sorted({place for adapter in adapters for place in adapter.factors})
        }
        self._row_scales = {
            place: [(number, one.row_scales[place]) for number, one in enumerate(adapters) if place in one.row_scales]
            for place in self._places
        }

    def linear(self, owners: Tensor) -> Linear:
        """The linear layers for rows whose adapters are owners [T]."""
        rows = {number: (owners == number).nonzero()[:, 0] for each in self._row_scales.values() for number, _ in each}

        @cache
        def others(widths: tuple[int, ...]) -> Tensor:
            """Which low-rank values [T, R] belong to other adapters than a row's, by each adapter's number of them."""
            return owners[:, None] != torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product, found = self._network.layers[number].linear[group], self._places.get((number, group))
            if found is None:
                return product(x)
            factors, widths = found
            low = factors.low(x)
            ops.mask_(low, others(widths))
            y = product(x, low, factors)
            for owner, scales in self._row_scales[number, group]:
                own = rows[owner]
                y[own] = scale_rows(y[own], scales, product.bias)
            return y

        return apply


def _concatenated(factors: Sequence[LowRankFactors | None]) -> tuple[LowRankFactors, tuple[int, ...]]:
    """The factors of all adapters as one, and how many of its columns belong to each adapter."""
    present = [each for each in factors if each is not None]
    together = LowRankFactors(torch.cat([each.a for each in present]), torch.cat([each.c for each in present]))
    return together, tuple(0 if each is None else len(each.a) for each in factors)

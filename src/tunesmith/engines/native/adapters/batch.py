"""Rows of several adapters in one product: the frozen weight is multiplied once, and each row gets its own adapter.

The low-rank factors of all adapters are concatenated. A row's low-rank values are set to zero where they belong to
another adapter, so the row gets the same result as with its own adapter alone. Punica (Chen et al. 2023) gathers rows
instead. On a CPU, one dense product of a few dozen rows costs less than a call for each adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from tunesmith.engines.native.adapters.adapter import PackedAdapter, Place, scale_rows
from tunesmith.engines.native.network.network import Linear, Network
from tunesmith.engines.native.network.passes import FactorsAt, MaskedFactors
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

    def factors(self, owners: Tensor) -> FactorsAt | None:
        """The low-rank factors of each place, with a mask of the low-rank values that belong to other adapters.

        owners: [T], the number of each row's adapter; -1 for the base alone. None where an adapter has row scales.
        """
        if any(self._row_scales.values()):
            return None
        others = _others(owners)

        def at(place: Place) -> MaskedFactors | None:
            packed = self._places.get(place)
            return None if packed is None else (packed[0], others(packed[1]))

        return at

    def linear(self, owners: Tensor) -> Linear:
        """The linear layers for rows whose adapters are owners [T]."""
        others = _others(owners)
        rows = {number: (owners == number).nonzero()[:, 0] for each in self._row_scales.values() for number, _ in each}

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product, packed = self._network.layers[number].linear[group], self._places.get((number, group))
            if packed is None:
                return product(x)
            factors, widths = packed
            y = product(x, factors.low(x).masked_fill_(others(widths), 0.0), factors)
            for owner, scales in self._row_scales[number, group]:
                own = rows[owner]
                y[own] = scale_rows(y[own], scales, product.bias)
            return y

        return apply


def _others(owners: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    """Which low-rank values [T, R] belong to other adapters than a row's, by each adapter's number of them."""
    return cache(lambda widths: owners[:, None] != torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)))


def _concatenated(factors: Sequence[LowRankFactors | None]) -> tuple[LowRankFactors, tuple[int, ...]]:
    """The factors of all adapters as one, and how many of its columns belong to each adapter."""
    present = [each for each in factors if each is not None]
    together = LowRankFactors(torch.cat([each.a for each in present]), torch.cat([each.c for each in present]))
    return together, tuple(0 if each is None else len(each.a) for each in factors)

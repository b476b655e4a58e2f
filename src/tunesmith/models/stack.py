"""Rows of several adapters in one product: the frozen weight is multiplied once, each row gets its own adapter's part.

The adapters' factors stand side by side in one pair, and a row's low values are zeroed where they are not its own
adapter's, so that what it gets is the sum it would get alone: the rest adds zeros. (Punica, Chen et al. 2023, gathers
instead; on a CPU the dense product of some dozens of rows costs less than a call for each adapter.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.models.adapter import Fused, lengthened
from tunesmith.models.network import Linear, Network
from tunesmith.models.products import Pair


class Stack:
    """Adapters of one network side by side."""

    def __init__(self, network: Network, adapters: Sequence[Fused]) -> None:
        self._network = network
        self._places = {
            place: _stacked([adapter.pairs.get(place) for adapter in adapters])
            for place in sorted({place for adapter in adapters for place in adapter.pairs})
        }
        self._factors = {
            place: [(number, one.factors[place]) for number, one in enumerate(adapters) if place in one.factors]
            for place in self._places
        }

    def linear(self, owners: Tensor) -> Linear:
        """Linear layers for rows [T] of these adapters, by their number in the stack; -1: the base alone."""
        others: dict[tuple[int, ...], Tensor] = {}  # for each division of columns: which are not a row's own [T, R]
        on = self._network.device
        rows = {number: (owners == number).nonzero()[:, 0] for each in self._factors.values() for number, _ in each}
        owners, rows = owners.to(on), {number: own.to(on) for number, own in rows.items()}

        def apply(number: int, group: str, x: Tensor) -> Tensor:
            product, found = self._network.layers[number].linear[group], self._places.get((number, group))
            if found is None:
                return product(x)
            pair, widths = found
            if widths not in others:
                columns = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
                others[widths] = owners[:, None] != columns.to(on)
            y = product(x, pair.low(x).masked_fill_(others[widths], 0.0), pair)
            for owner, factor in self._factors[number, group]:
                own = rows[owner]
                y[own] = lengthened(y[own], factor, product.bias)
            return y

        return apply


def _stacked(pairs: Sequence[Pair | None]) -> tuple[Pair, tuple[int, ...]]:
    """One pair of all that are there, and how many of its columns are each one's."""
    there = [pair for pair in pairs if pair is not None]
    both = Pair(torch.cat([pair.a for pair in there]), torch.cat([pair.c for pair in there]))
    return both, tuple(0 if pair is None else len(pair.a) for pair in pairs)

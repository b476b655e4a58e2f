"""Memory for keys and values, in pages that rows are lent for as long as they are decoded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tunesmith.models.network import Network
from tunesmith.models.ops import page_shapes
from tunesmith.models.runtime import LargePages

PAGE = 32  # places
_AT_FIRST = 64  # pages


class PageCache:
    """Keys and values of every layer, in pages that lie as ops.page_shapes says. It starts small and doubles, up to its
    bound.

    A row that needs more than the bound is lent it while no other holds a page, and the memory is let go afterwards.
    """

    def __init__(self, network: Network, most_bytes: int) -> None:
        self._network = network
        shape = network.shape
        self.page_bytes = 2 * shape.layers * shape.kv_heads * PAGE * shape.head * network.embedding.element_size()
        self._most = max(1, most_bytes // self.page_bytes)
        self.clear()

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self.keys[0])

    @property
    def lent(self) -> int:
        """How many of them rows hold."""
        return self.pages - len(self._free)

    def expect(self, each: Iterable[int]) -> None:
        """Rows of so many places each are lent pages next: memory for them is had at once, as far as the bound goes."""
        wanted = self.lent + sum(-(-places // PAGE) for places in each)
        if self.pages < min(wanted, self._most):
            self._grow(min(wanted, self._most))

    def lend(self, places: int) -> list[int] | None:
        """Pages for so many places, or None where that many are not to be had now."""
        wanted = -(-places // PAGE)
        if wanted > len(self._free):
            most = max(self._most, wanted) if not self.lent else self._most
            least = self.lent + wanted
            if least > most:
                return None
            self._grow(min(most, max(least, 2 * self.pages, _AT_FIRST)))
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Rows may be lent these again."""
        self._free.extend(pages)
        if not self.lent and self.pages > self._most:
            self.clear()

    def clear(self) -> None:
        """Forget every page."""
        shape, like = self._network.shape, self._network.embedding
        # Zeros, here and below: what no row has written is weighted with nought, which a NaN would survive.
        self.keys, self.values = (
            [like.new_zeros(0, *one) for _ in range(shape.layers)]
            for one in page_shapes(shape.kv_heads, PAGE, shape.head, like.dtype)
        )
        self._free: list[int] = []

    def _grow(self, pages: int) -> None:
        self._free = [*range(pages - 1, self.pages - 1, -1), *self._free]
        memory = LargePages()
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                caches[layer] = _longer(cache, pages, memory)


def _longer(cache: Tensor, pages: int, memory: LargePages) -> Tensor:
    grown = memory.empty((pages, *cache.shape[1:]), cache.dtype)
    grown[: len(cache)] = cache
    grown[len(cache) :] = 0
    return grown

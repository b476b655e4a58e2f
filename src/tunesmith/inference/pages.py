"""Memory for keys and values, in pages that rows are lent for as long as they are decoded."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tunesmith.models.network import Network
from tunesmith.models.ops import page_shapes
from tunesmith.models.runtime import LargePages

PAGE = 32  # places


class PageCache:
    """Keys and values of every layer. What a page holds of all layers lies together, and the pages lent first are the
    first ones: of all that is reserved the machine gives what rows have used at once.

    keys, values: for each layer its pages, as ops.page_shapes says. A row that needs more than the bound is lent it
    while no other holds a page, and the memory is let go afterwards.
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

    def lend(self, places: int) -> list[int] | None:
        """Pages for so many places, or None where that many are not to be had now."""
        wanted = -(-places // PAGE)
        if wanted > len(self._free):
            if self.lent or wanted <= self.pages:
                return None
            self._reserve(wanted)
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Rows may be lent these again."""
        self._free.extend(pages)
        if not self.lent and self.pages > self._most:
            self.clear()

    def clear(self) -> None:
        """Forget every page."""
        self._reserve(self._most)

    def _reserve(self, pages: int) -> None:
        shape, like = self._network.shape, self._network.embedding
        shapes = page_shapes(shape.kv_heads, PAGE, shape.head, like.dtype)
        sizes = (pages, shape.layers, 2, math.prod(shapes[0]))
        # Zeros: what no row has written is weighted with nought, which a NaN would survive.
        memory = LargePages().zeros(sizes, like.dtype) if like.device.type == "cpu" else like.new_zeros(sizes)
        self.keys, self.values = (
            [memory[:, layer, part].unflatten(-1, one) for layer in range(shape.layers)]
            for part, one in enumerate(shapes)
        )
        self._free = list(range(pages - 1, -1, -1))

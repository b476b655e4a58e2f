"""Memory for keys and values, in pages that rows are lent for as long as they are decoded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.ops import page_shapes
from tunesmith.engines.native.runtime import LargePages

PAGE = 32  # places


class PageCache:
    """Keys and values of every layer, reserved when pages are lent first. What a page holds of all layers lies
    together, and the pages lent first are the first ones: on a processor the machine gives what rows have used at once,
    of all that is reserved.

    keys, values: for each layer its pages, as ops.page_shapes says. A row that needs more than the bound is lent it
    while no other holds a page, and the memory is let go afterwards.
    """

    def __init__(self, network: Network, most_bytes: int) -> None:
        self._network = network
        shape = network.shape
        self.page_bytes = 2 * shape.layers * shape.kv_heads * PAGE * shape.head * network.embedding.element_size()
        self._most = max(1, most_bytes // self.page_bytes)
        self._let_go()

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return len(self._memory)

    @property
    def lent(self) -> int:
        """How many of them rows hold."""
        return self.pages - len(self._free)

    def lend(self, places: int) -> list[int] | None:
        """Pages for so many places, or None where that many are not to be had now. Raises Refused where the machine
        does not give the memory."""
        wanted = -(-places // PAGE)
        if wanted > len(self._free):
            if self.lent or wanted <= self.pages:
                return None
            self._reserve(max(wanted, self._most), wanted)
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Rows may be lent these again."""
        self._free.extend(pages)
        if not self.lent and self.pages > self._most:
            self._let_go()

    @torch.inference_mode()
    def clear(self) -> None:
        """Take every page back and forget what is in them, which may be anything after an error."""
        held = sorted(set(range(self.pages)) - set(self._free))
        if self.pages > self._most:
            self._let_go()
            return
        self._memory[held] = 0
        self._free += held[::-1]

    def _let_go(self) -> None:
        self._hold(self._network.embedding.new_zeros(0, *self._sizes()))

    def _reserve(self, pages: int, least: int) -> None:
        """So many, or what the machine gives of them."""
        like = self._network.embedding
        self._let_go()  # first: both may not have room
        while True:
            sizes = (pages, *self._sizes())
            try:
                # Zeros: what no row has written is weighted with nought, which a NaN would survive.
                self._hold(LargePages().zeros(sizes, like.dtype))
                return
            except (OSError, RuntimeError) as error:  # of mmap
                if pages == least:
                    raise Refused(
                        f"there is no memory for {least * PAGE} places of keys and values, "
                        f"{least * self.page_bytes / 1e6:.0f} MB",
                        fix="ask for a shorter answer, or give the process more memory (see `ulimit -v`)",
                    ) from error
                pages = max(least, pages // 2)

    def _sizes(self) -> tuple[int, int, int]:
        shape = self._network.shape
        return shape.layers, 2, shape.kv_heads * PAGE * shape.head

    def _hold(self, memory: Tensor) -> None:
        shape = self._network.shape
        self._memory = memory
        self.keys, self.values = (
            [memory[:, layer, part].unflatten(-1, one) for layer in range(shape.layers)]
            for part, one in enumerate(page_shapes(shape.kv_heads, PAGE, shape.head, memory.dtype))
        )
        self._free = list(range(len(memory) - 1, -1, -1))

"""Memory for keys and values, in pages that a row holds while it is decoded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.ops import PrefixPages, page_shapes
from tunesmith.engines.native.runtime import LargePages

PAGE = 32  # places


class PageCache:
    """Keys and values of every layer, reserved when pages are allocated first.

    keys, values: for each layer its pages, in the layout of ops.page_shapes. A page's keys and values of all layers lie
    next to each other, and the first pages are allocated first. So of all that is reserved, the operating system maps
    only what rows have used. A row that needs more than most_bytes gets it while no other row holds a page; the memory
    is released afterwards.
    """

    def __init__(self, network: Network, most_bytes: int) -> None:
        self._network = network
        shape = network.shape
        self.page_bytes = 2 * shape.layers * shape.kv_heads * PAGE * shape.head * network.embedding.element_size()
        self._most = max(1, most_bytes // self.page_bytes)
        self._release()

    @property
    def pages(self) -> int:
        """Number of reserved pages."""
        return len(self._memory)

    @property
    def allocated(self) -> int:
        """Number of pages that rows hold."""
        return self.pages - len(self._free)

    def allocate(self, places: int) -> list[int] | None:
        """Pages for so many places; None if too few are free now. Raises Refused if there is no memory for them."""
        wanted = -(-places // PAGE)
        if wanted > len(self._free):
            if self.allocated or wanted <= self.pages:
                return None
            self._reserve(max(wanted, self._most), wanted)
        return [self._free.pop() for _ in range(wanted)]

    def free(self, pages: Iterable[int]) -> None:
        """Take a row's pages back."""
        self._free.extend(pages)
        if not self.allocated and self.pages > self._most:
            self._release()

    @torch.inference_mode()
    def clear(self) -> None:
        """Take all pages back and write zeros to them: after an error they may hold anything."""
        held = sorted(set(range(self.pages)) - set(self._free))
        if self.pages > self._most:
            self._release()
            return
        self._memory[held] = 0
        self._free += held[::-1]

    def _release(self) -> None:
        self._use(self._network.embedding.new_zeros(0, *self._page_sizes()))

    def _reserve(self, pages: int, least: int) -> None:
        """Reserve so many pages, or as many as there is memory for, but at least `least`."""
        self._release()  # before reserving: there may be no room for both
        while True:
            try:
                # Zeros, since attention multiplies unwritten places by zero, and a NaN would survive that.
                self._use(LargePages().zeros((pages, *self._page_sizes()), self._network.dtype))
                return
            except (OSError, RuntimeError) as error:  # of mmap
                if pages == least:
                    raise Refused(
                        f"there is no memory for {least * PAGE} places of keys and values, "
                        f"{least * self.page_bytes / 1e6:.0f} MB",
                        fix="ask for a shorter answer, or give the process more memory (see `ulimit -v`)",
                    ) from error
                pages = max(least, pages // 2)

    def _page_sizes(self) -> tuple[int, int, int]:
        shape = self._network.shape
        return shape.layers, 2, shape.kv_heads * PAGE * shape.head

    def _use(self, memory: Tensor) -> None:
        shape = self._network.shape
        self._memory = memory
        self.keys, self.values = (
            [memory[:, layer, part].unflatten(-1, page) for layer in range(shape.layers)]
            for part, page in enumerate(page_shapes(shape.kv_heads, PAGE, shape.head, memory.dtype))
        )
        self._free = list(range(len(memory) - 1, -1, -1))


def prefix_pages(network: Network, length: int) -> list[PrefixPages]:
    """Pages for the keys and values of a prefix of so many tokens, in every layer."""
    shape, dtype, pages = network.shape, network.dtype, -(-length // PAGE)
    keys, values = page_shapes(shape.kv_heads, PAGE, shape.head, dtype)
    # Zeros, as in PageCache.
    return [
        PrefixPages(torch.zeros(pages, *keys, dtype=dtype), torch.zeros(pages, *values, dtype=dtype), length)
        for _ in range(shape.layers)
    ]

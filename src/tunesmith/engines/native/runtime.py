"""Threads and memory of the native engine: idle threads, large pages, and a description of the machine."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.engines.native import kernels

_LARGE_PAGE, _BLOCK = 2 << 20, 32 << 20  # bytes


def release_threads() -> None:
    """Stop this thread's OpenMP workers, so that another thread can use the cores.

    Each thread that computes has workers. If there are more workers than cores, OpenMP lets idle ones sleep, and waking
    one takes longer than most kernels of a decoding step: steps took up to four times as long.
    """
    library = kernels.library()
    if library is not None:
        library.release_threads()


class _Block:
    """Memory that is allocated from front to back, and released when the last tensor in it is gone."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # not every operating system has them
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._next = -torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
        self._end = self._next + size

    def allocate(self, size: int) -> Tensor | None:
        """A tensor of so many bytes, aligned to a cache line; None if the block is full."""
        if self._next + size > self._end:
            return None
        start, self._next = self._next, self._next + -(-size // 64) * 64
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start)


class LargePages:
    """Allocates tensors on pages of 2 MB, where Linux offers them, for what every step reads.

    The processor prefetches only within a page, and its TLB holds the addresses of few pages.
    """

    def __init__(self) -> None:
        self._block: _Block | None = None

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros. The operating system maps its memory only when it is written first."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.zeros(shape, dtype=dtype)
        memory = None if self._block is None else self._block.allocate(size)
        if memory is None:
            self._block = _Block(max(_BLOCK, -(-size // _LARGE_PAGE) * _LARGE_PAGE))
            memory = self._block.allocate(size)
            assert memory is not None
        return memory.view(dtype).view(shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and dtype."""
        return self.zeros(tensor.shape, tensor.dtype)


def describe() -> str:
    """One line about the machine: cores, vector instructions, whether bf16 is native, whether kernels were compiled."""
    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    native = "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated: training will be slow"
    compiled = "kernels compiled for it" if kernels.library() else "portable kernels: install a C++ compiler"
    return f"{cores} cores, {capability}, bf16 {native}, {compiled}"

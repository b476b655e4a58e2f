"""Threads and memory of this process: how many threads compute, large pages, peak and available memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import platform
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tunesmith.core.threads import wanted_threads
from tunesmith.engines.native import kernels

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_PAGE, _BLOCK = 2 << 20, 32 << 20  # bytes


@cache
def prepare() -> int:
    """Set the number of threads and the memory options of this process, once; returns the number of threads.

    That number is $TUNESMITH_THREADS, else the cores that this process may use, divided by torchrun's processes here.
    On glibc, freed pages are kept: a training step allocates and frees the same large buffers every time, and the
    operating system would zero them each time. oneDNN keeps the programs of 64 products instead of 1,024. A program
    takes 0.3 MB, and a step needs fewer than 64 (see engines/batch.py).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's
    threads = wanted_threads() or max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    return threads


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
        found = None if self._block is None else self._block.allocate(size)
        if found is None:
            self._block = _Block(max(_BLOCK, -(-size // _LARGE_PAGE) * _LARGE_PAGE))
            found = self._block.allocate(size)
            assert found is not None
        return found.view(dtype).view(shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and dtype."""
        return self.zeros(tensor.shape, tensor.dtype)


def describe() -> str:
    """One line about the machine: cores, vector instructions, whether bf16 is native, whether kernels were compiled."""
    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    native = "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated: training will be slow"
    compiled = (
        "kernels compiled for it" if kernels.library() is not None else "portable kernels: install a C++ compiler"
    )
    return f"{cores} cores, {capability}, bf16 {native}, {compiled}"

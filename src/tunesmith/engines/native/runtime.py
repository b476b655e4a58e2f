"""Threads and memory of this process: how many threads compute, large pages, peak and available memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import platform
import resource
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from tunesmith.core.threads import wanted_threads
from tunesmith.engines.native import kernels

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_PAGE, _BLOCK = 2 << 20, 32 << 20  # bytes


@cache
def prepare() -> int:
    """Set the thread count once per process ($TUNESMITH_THREADS, else all cores this process may use, shared with
    those that torchrun started beside it); returns it.

    On glibc, freed pages are kept too: a training step allocates and frees the same large buffers every time, and
    having the kernel zero them again costs time in every one of them. oneDNN keeps the programs of 64 products, enough
    for a step, instead of 1,024: each takes 0.3 MB (engines/batch.py sees to it that there are few).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    beside = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's
    threads = wanted_threads() or max(1, len(os.sched_getaffinity(0)) // beside)
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    return threads


def release_threads() -> None:
    """Say that the calling thread leaves arithmetic to another one now.

    Each thread that computes has helpers of its own. Where all of them are more than the cores, OpenMP no longer lets
    helpers wait awake, and waking one costs more than most pieces of a decoding step: four times their time was seen.
    """
    library = kernels.library()
    if library is not None:
        library.release_threads()


class _Block:
    """Memory that is handed out from front to back; given back when the last tensor on it is gone."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a kernel without them: usual pages serve
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._next = -torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
        self._end = self._next + size

    def hand_out(self, size: int) -> Tensor | None:
        """So many bytes, on a line of the cache; None where they are no more there."""
        if self._next + size > self._end:
            return None
        start, self._next = self._next, self._next + -(-size // 64) * 64
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start)


class LargePages:
    """Tensors on pages of 2 MB, where Linux has them, for what is read in every step: the processor reads ahead within
    a page alone, and forgets the places of small ones."""

    def __init__(self) -> None:
        self._block: _Block | None = None

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros: memory is fresh from the kernel, which has not even taken it before it is written."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.zeros(shape, dtype=dtype)
        found = None if self._block is None else self._block.hand_out(size)
        if found is None:
            self._block = _Block(max(_BLOCK, -(-size // _LARGE_PAGE) * _LARGE_PAGE))
            found = self._block.hand_out(size)
            assert found is not None
        return found.view(dtype).view(shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """One of the same shape and type, to be filled."""
        return self.zeros(tensor.shape, tensor.dtype)


def reset_peak_memory() -> None:
    """Start measuring peak_memory afresh, where the kernel offers it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest number of bytes resident since reset_peak_memory, else since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Bytes that this process can still allocate: the machine's free memory, or less where a container has a limit."""
    return min(int(psutil.virtual_memory().available), *_granted())


def _granted(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group that this process is in may still take, in bytes, where it has a limit: a container's
    is not seen in the machine's free memory. Pages of files that it would give back first count as free."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                names = _GROUP_FILES[kinds]
                root = mount / kinds
                place = root / path.lstrip("/")
                # A container may be shown the path it has outside, and its own group at the root.
                for folder in [place, *place.parents] if place.is_dir() else [root]:
                    if folder.is_relative_to(root):
                        found += _left(folder, *names)
    return found


_GROUP_FILES = {  # by controllers as /proc names them: version 2 and version 1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _left(folder: Path, limit: str, usage: str, idle: str) -> list[int]:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit is "max"; the machine's own group has none of the files
        return []
    return [max(0, most - used + int(told.get(idle, 0)))]


def describe() -> str:
    """One line about the machine: cores, vector instructions, whether bf16 is native, whether kernels were compiled."""
    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    native = "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated: training will be slow"
    compiled = (
        "kernels compiled for it" if kernels.library() is not None else "portable kernels: install a C++ compiler"
    )
    return f"{cores} cores, {capability}, bf16 {native}, {compiled}"

"""What the process asks of the machine: the device that computes, threads, memory that is kept once it was mapped."""

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

from tunesmith.core.errors import UsageError
from tunesmith.core.threads import wanted_threads
from tunesmith.engines.native import kernels

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_PAGE, _BLOCK = 2 << 20, 32 << 20  # bytes


CPU = torch.device("cpu")


def device() -> torch.device:
    """Where a network's weights are put, and with them all that is computed: $TUNESMITH_DEVICE, which is cpu, cuda or
    cuda:N; else the processor: what was never run on a GPU is used there by choice alone.

    Raises UsageError for a name that is none, and for a GPU that is not there.
    """
    wanted = os.environ.get("TUNESMITH_DEVICE") or "cpu"
    if wanted == "cpu":
        return CPU
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or (":" in wanted and not number.isdecimal()):
        raise _wrong_device(f"there is no device {wanted!r}", "set cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise _wrong_device(
            f"PyTorch {torch.__version__} finds no GPU that it can use, so {wanted} is not there",
            "set it to cpu; or install a driver and a build of PyTorch for CUDA",
        )
    place, count = int(number) if number else torch.cuda.current_device(), torch.cuda.device_count()
    if place >= count:
        raise _wrong_device(f"there is no device {wanted}: PyTorch finds {count}", f"set cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", place)


def _wrong_device(what: str, fix: str) -> UsageError:
    return UsageError(what, where="TUNESMITH_DEVICE", fix=fix)


def name_of(on: torch.device) -> str:
    """A GPU's kind and what drives it, as part of what a training's bytes depend on; of another device its type."""
    return f"{torch.cuda.get_device_name(on)}, CUDA {torch.version.cuda}" if on.type == "cuda" else on.type


def wait(on: torch.device) -> None:
    """Until the device has done what it was given: a GPU's work goes on after the call that began it."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


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


def reset_peak_memory(on: torch.device = CPU) -> None:
    """Start measuring a device's peak memory afresh; the processor's where the kernel offers it (Linux)."""
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(on: torch.device = CPU) -> int:
    """Most bytes resident since reset_peak_memory, else since the process began; on a GPU most bytes of tensors."""
    if on.type == "cuda":
        return int(torch.cuda.max_memory_allocated(on))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory(on: torch.device = CPU) -> int:
    """Bytes this process could still take: on a GPU what is free there, and what it has of it and does not use."""
    if on.type == "cuda":
        idle = torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on)
        return int(torch.cuda.mem_get_info(on)[0]) + idle
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
    """The processor's cores, what it computes bf16 with, whether kernels were compiled for it; and the GPU, if any."""
    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    native = "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated: training will be slow"
    compiled = (
        "kernels compiled for it" if kernels.library() is not None else "portable kernels: install a C++ compiler"
    )
    on = device()
    beside = "" if on.type == "cpu" else f"; trains and answers on {on} ({name_of(on)})"
    return f"{cores} cores, {capability}, bf16 {native}, {compiled}{beside}"

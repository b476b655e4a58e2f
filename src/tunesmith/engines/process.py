"""Sets up this process for computing: the number of threads, and how memory is kept. And what a device reaches and has
free."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from tunesmith.core.system import machine as memory
from tunesmith.core.system.machine import started_by_torchrun, wanted_threads

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def prepare_process() -> int:
    """Set the number of threads and the memory options of this process, once; returns the number of threads.

    That number is $TUNESMITH_THREADS, else the cores that this process may use, divided among torchrun's ranks.
    On glibc, freed pages are kept: a training step allocates and frees the same large buffers every time, and the
    operating system would zero them each time. oneDNN keeps the programs of 64 products instead of 1,024. A program
    takes 0.3 MB, and a step needs fewer than 64 (see engines/batch.py).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1
    threads = wanted_threads() or max(1, len(os.sched_getaffinity(0)) // ranks)
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    return threads


MEASURED_ROWS = 1024  # rows of activations at most; more rows are no faster
_SECONDS = 0.1


def measured_flops(multiply: Callable[[], object], operations: float) -> float:
    """Floating-point operations a second of the fastest call of multiply within a tenth of a second.

    operations: floating-point operations of one call. The first call is not counted, since it may set things up.
    """
    multiply()
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < until or best == math.inf:
        multiply()
        best = min(best, time.perf_counter() - began)
    return operations / best


@cache
def product_flops(rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a device reaches on a product of torch. Measured once for each size."""
    weight, x = (torch.full((size, inputs), 0.01, device=device, dtype=dtype) for size in (outputs, rows))

    def multiply() -> None:
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it computes while this thread goes on

    return measured_flops(multiply, 2.0 * rows * inputs * outputs)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a model computes in: a GPU's, or this machine's."""

    device: torch.device

    def available(self, sharing: int = 1) -> int:
        """Bytes that this process can still allocate. sharing: how many processes share the machine's memory; a GPU
        has one."""
        if self.device.type == "cpu":
            return memory.available_memory() // sharing
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused

    def reset_peak(self) -> None:
        """Start measuring peak() afresh."""
        if self.device.type == "cpu":
            memory.reset_peak_memory()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes in use since reset_peak(): of the process on a CPU, of tensors on a GPU."""
        return memory.peak_memory() if self.device.type == "cpu" else torch.cuda.max_memory_allocated(self.device)

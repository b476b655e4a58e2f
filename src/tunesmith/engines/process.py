"""Sets up this process for computing: the number of threads, and how memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

import torch

from tunesmith.core.system.threads import started_by_torchrun, wanted_threads

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

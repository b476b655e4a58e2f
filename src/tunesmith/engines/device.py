"""Whether this machine has a GPU that torch can use. Imports torch only where a GPU's driver is installed."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path


@cache
def gpu_present() -> bool:
    """Whether torch can compute on a GPU here, NVIDIA's or AMD's."""
    if not Path("/dev/kfd").exists():  # AMD's driver
        try:
            ctypes.CDLL("libcuda.so.1")  # NVIDIA's, which torch loads under this name
        except OSError:
            return False
    import torch

    return torch.cuda.is_available()

"""The device that the hf engine computes on. Imports torch only where it is needed."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.errors import UsageError
from tunesmith.core.system.machine import local_rank

if TYPE_CHECKING:
    import torch

# What NVIDIA's and AMD's drivers say of themselves.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
# Dense bf16 peak with fp32 sums, in TFLOPS, by words of the card's name; of the makers' data sheets. The first match
# counts.
_PEAKS = (
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
)


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


def gpu_names() -> tuple[str, ...]:
    """The GPUs that torch sees here, each as CUDA_VISIBLE_DEVICES names it. Starts nothing on them."""
    if not gpu_present():
        return ()
    import torch

    told, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = map(str, range(count)) if told is None else (name.strip() for name in told.split(","))
    return tuple(names)[:count]


@cache
def computing_device() -> torch.device:
    """The device that the hf engine computes on in this process: a GPU, one for each rank on a machine, else the CPU.
    The GPU becomes torch's current one, which collective operations use.

    Raises UsageError where more ranks were started on this machine than it has GPUs.
    """
    import torch

    if not gpu_present():
        return torch.device("cpu")
    number, there = local_rank(), torch.cuda.device_count()
    if number >= there:
        raise UsageError(
            f"process {number + 1} on this machine has no GPU: torch sees {there}",
            where="torchrun --nproc-per-node",
            fix=f"start {there} on a machine, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def backends() -> str:
    """What torch's process group sends tensors with: NCCL between GPUs, gloo between CPUs and for messages."""
    return "cpu:gloo,cuda:nccl" if gpu_present() else "gloo"


def device_name(device: torch.device) -> str:
    """The device's name for people and records, with what its results may depend on."""
    import torch

    if device.type == "cpu":
        return "CPU"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda or torch.version.hip}"


def describe_gpus() -> tuple[str, str | None]:
    """The GPUs here with their memory, the driver and NCCL; and what is wrong, None where nothing is."""
    import torch

    drivers = [path.read_text().splitlines()[0] for path in _DRIVERS if path.is_file()]
    if not gpu_present():
        if not drivers:
            return "none: the CPU computes", None
        return f"torch {torch.__version__} sees none, but a driver is here ({drivers[0]})", (
            "install a build of PyTorch for it, as pytorch.org says, and see that CUDA_VISIBLE_DEVICES is not empty"
        )
    every = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    cards = "; ".join(f"{each.name}, {each.total_memory / (1 << 30):.0f} GiB" for each in every)
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda or torch.version.hip}"
    there = torch.distributed.is_nccl_available()
    nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if there else "no NCCL"
    return f"{cards}; {'; '.join([*drivers, built, nccl])}", None


def stated_peak(card: str) -> float | None:
    """Floating-point operations a second that a card's maker states for bf16, by its name; None for an unknown card, a
    part of one (MIG) and slower variants of the same name."""
    words = f" {card.replace('-', ' ')} "
    if any(variant in words for variant in (" MIG ", " Laptop ", " D ")):
        return None
    return next((peak * 1e12 for name, peak in _PEAKS if f" {name} " in words), None)

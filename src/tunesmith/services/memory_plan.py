"""Says before a training which ways of training a base fit the memory of a device."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

from tunesmith.core.view import View
from tunesmith.models.base import config_folder


class Way(View):
    """A way of training an adapter, and its bytes on each device. quantize: the base's, as the setting. base: frozen
    weights. trained: the adapter with its gradients and the optimiser. activations: of one batch, with its logits.
    fits: whether the device has as much."""

    quantize: Literal["4bit"] | None
    recompute: bool
    base: int
    trained: int
    activations: int
    total: int
    fits: bool


class MemoryPlan(View):
    """What trainings on a base take. device: its bytes. numbers: of the base. tokens: of a batch. cache_per_token:
    bytes of a token's keys and values while answers are generated."""

    base: str
    numbers: int
    device: int
    ranks: int
    precision: Literal["fp32", "bf16"]
    rank: int
    tokens: int
    cache_per_token: int
    ways: list[Way]


def memory_plan(
    spec: str,
    root: Path,
    *,
    rank: int = 16,
    tokens: int = 2048,
    ranks: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    device: int | None = None,
) -> MemoryPlan:
    """What each way of training an adapter takes, from the base's configuration. A base in 4 bits is not sharded.

    spec: the base, as in a project file; root: the folder that a relative path starts from. rank: of the adapter.
    tokens: of one batch. ranks: devices that the weights are sharded over. device: bytes of one device; by default what
    is free on this machine's GPU, or in its memory. Raises UsageError, Refused or TunesmithError for a base whose
    configuration cannot be read.
    """
    from tunesmith.engines.device import DeviceMemory, computing_device
    from tunesmith.engines.hf.memory import cache_bytes, read_shapes, training_memory

    shapes = read_shapes(config_folder(spec, root))
    room = device if device is not None else DeviceMemory(computing_device()).available()
    ways = []
    for quantized, recompute in itertools.product((False, True) if ranks == 1 else (False,), (False, True)):
        needs = training_memory(
            shapes,
            quantized=quantized,
            precision=precision,
            rank=rank,
            tokens=tokens,
            recompute=recompute,
            shards=ranks,
        )
        ways.append(
            Way(
                quantize="4bit" if quantized else None,
                recompute=recompute,
                base=needs.base,
                trained=needs.trained,
                activations=needs.activations,
                total=needs.total,
                fits=needs.total <= room,
            )
        )
    return MemoryPlan(
        base=spec,
        numbers=shapes.linear + shapes.rest,
        device=room,
        ranks=ranks,
        precision=precision,
        rank=rank,
        tokens=tokens,
        cache_per_token=cache_bytes(shapes, precision, 1),
        ways=ways,
    )

"""What each way of training a base takes, in memory and time, from its configuration: which ways fit a device."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tunesmith.core.errors import UsageError
from tunesmith.core.values import View
from tunesmith.engines.device import computing_device, device_name, gpu_present, stated_peak
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.costs import DTYPES, Shapes, activation_bytes, cache_bytes, training_flops
from tunesmith.engines.hf.engine import MOST_ROWS
from tunesmith.engines.hf.loading import cannot_run, first_line
from tunesmith.engines.process import MEASURED_ROWS, DeviceMemory, product_flops
from tunesmith.models.base import config_folder


class Way(View):
    """A way of training, and its bytes on each device. quantize: the base's, as the setting. base: weights that are
    computed with. trained: the adapter, or the base's fp32 weights, with gradients and the optimiser. activations: of
    one batch, with its logits. fits: whether the device has as much. seconds: of a pass over 1,000 rows; None without a
    rate."""

    quantize: Literal["4bit"] | None
    recompute: bool
    base: int
    trained: int
    activations: int
    total: int
    fits: bool
    seconds: float | None


class MemoryPlan(View):
    """What trainings on a base take. device: its bytes. numbers: of the base. tokens: of a batch. cache_per_token:
    bytes of a token's keys and values while answers are generated; cache_tokens: how many of them one device holds
    beside the whole base; cache_rows: bytes of the cache of the rows that are answered together, of `tokens`
    tokens each. row_tokens: of each of the 1,000 rows. rate: floating-point operations a second that are assumed for
    each device, None where there is nothing to go by; basis: where the rate comes from."""

    base: str
    numbers: int
    device: int
    ranks: int
    method: Literal["lora", "full"]
    precision: Literal["fp32", "bf16"]
    rank: int
    tokens: int
    cache_per_token: int
    cache_tokens: int
    cache_rows: int
    row_tokens: int
    rate: float | None
    basis: str
    ways: list[Way]


def memory_plan(
    spec: str,
    root: Path,
    *,
    method: Literal["lora", "full"] = "lora",
    rank: int = 16,
    tokens: int = 2048,
    ranks: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    device: int | None = None,
    row_tokens: int = 512,
    tflops: float | None = None,
    utilisation: float = 0.4,
) -> MemoryPlan:
    """What each way of training takes, from the base's configuration. A base in 4 bits is neither sharded nor trained.

    The time is an estimate: the operations of the matrix products over a rate. Attention, what 4 bits take to be
    restored, and what ranks send each other are left out.

    spec: the base, as in a project file; root: the folder that a relative path starts from. method: an adapter of all
    linear layers, or the base itself. rank: of the adapter. tokens: of one batch. ranks: devices that the weights are
    sharded over. device: bytes of one device; by default what is free on this machine's GPU, or in its memory.
    row_tokens: of a row that time is estimated for. tflops: a device's peak; by default the maker's figure for this
    machine's GPU, or what this machine reaches on the widest product. utilisation: the share of it that a training
    reaches. Raises UsageError, Refused or TunesmithError for a base whose configuration cannot be read.
    """
    shapes = read_shapes(config_folder(spec, root))
    room = device if device is not None else DeviceMemory(computing_device()).available()
    peak, basis = _peak(shapes, precision, tflops, elsewhere=device is not None)
    rate = None if peak is None else peak * utilisation
    full = method == "full"
    adapter = None if full else rank
    trains = partial(training_memory, shapes, precision=precision, rank=adapter, tokens=tokens, shards=ranks)
    rows, ways = 1000 * row_tokens, []
    for quantized, recompute in itertools.product((False,) if ranks > 1 or full else (False, True), (False, True)):
        needs, trained = trains(quantized=quantized, recompute=recompute), 0 if full else rank * shapes.adapted
        operations = training_flops(shapes, tokens=rows, scored=rows, trained=trained, recompute=recompute)
        operations += 2.0 * rows * (shapes.computed + shapes.head) if full else 0.0
        quantize: Literal["4bit"] | None = "4bit" if quantized else None
        seconds = None if rate is None else operations / rate / ranks
        fits = needs.total <= room
        ways.append(Way.of(needs, quantize=quantize, recompute=recompute, fits=fits, seconds=seconds))
    numbers, each = shapes.linear + shapes.rest, cache_bytes(shapes, DTYPES[precision], 1)
    beside = room - numbers * (2 if precision == "bf16" else 4)
    return MemoryPlan(
        base=spec,
        numbers=numbers,
        device=room,
        ranks=ranks,
        method=method,
        precision=precision,
        rank=rank,
        tokens=tokens,
        cache_per_token=each,
        cache_tokens=max(0, beside // each) if each else 0,
        cache_rows=MOST_ROWS * cache_bytes(shapes, DTYPES[precision], tokens),
        row_tokens=row_tokens,
        rate=rate,
        basis=basis if rate is None else f"{utilisation:.0%} of {basis}",
        ways=ways,
    )


def _peak(shapes: Shapes, precision: str, tflops: float | None, *, elsewhere: bool) -> tuple[float | None, str]:
    """Operations a second that a device can reach, and where that comes from. elsewhere: it is not this machine's."""
    if tflops is not None:
        return tflops * 1e12, f"a peak of {tflops:g} TFLOPS, as stated"
    if elsewhere:
        return None, "no time: the peak of the device in TFLOPS is not stated"
    name = device_name(computing_device())
    card = name.split(", CUDA")[0]
    if gpu_present() and precision == "bf16" and (stated := stated_peak(card)) is not None:
        return stated, f"{stated / 1e12:g} TFLOPS, the bf16 peak that its maker states for {card}"
    reached = product_flops(MEASURED_ROWS, *shapes.widest, computing_device(), DTYPES[precision])
    return reached, f"{reached / 1e12:.2g} TFLOPS, which {name} reached just now on the widest product in {precision}"


# NF4 in blocks of 64 with one scale of 8 bits each, and one scale of 32 bits for 256 scales (Dettmers et al. 2023).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_TRAINED = 4 * 5  # bytes of a trained number: itself, its gradient, AdamW's two moments, its best value; all fp32


class Memory(NamedTuple):
    """Bytes on each device. base: weights that are not trained, and the layer that is brought together where they are
    sharded. trained: weights in training with gradients, optimiser and the best ones. activations: of one batch, with
    its logits."""

    base: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.activations


def read_shapes(folder: Path) -> Shapes:
    """The shapes of the model whose config.json a folder holds.

    Raises UsageError where there is none, Refused for a configuration that transformers does not know.
    """
    transformers = libraries.transformers()
    if not (folder / "config.json").is_file():
        raise UsageError("there is no config.json", where=str(folder), fix="name the folder of a base model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # which holds shapes only
            module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # every architecture has its own way to refuse a configuration
        raise cannot_run(folder, first_line(error)) from error
    return Shapes(module)


def training_memory(
    shapes: Shapes,
    *,
    quantized: bool,
    precision: str,
    rank: int | None,
    tokens: int,
    recompute: bool,
    shards: int = 1,
) -> Memory:
    """Bytes on each device to train an adapter of all linear layers, on batches of so many tokens.

    rank: of the adapter; None where the base itself is trained (method: full). quantized: the base is in 4 bits.
    precision: fp32 or bf16, of the frozen base and of what is computed. recompute: the decoder's layers keep only what
    they read. shards: devices that the weights are spread over.
    """
    size, numbers = float(DTYPES[precision].itemsize), shapes.linear + shapes.rest
    if quantized:
        # bitsandbytes restores the weight of one product at a time.
        base, whole = _NF4 * shapes.linear + size * shapes.rest, size * math.prod(shapes.widest)
    else:
        base = size * numbers / shards
        whole = size * (shapes.layer + shapes.rest) if shards > 1 else 0.0  # brought together while they compute
    if rank is not None:
        trained = _TRAINED * rank * shapes.adapted / shards
    elif precision == "fp32":  # the base's weights are those that the optimiser moves
        base, trained = 0.0, _TRAINED * numbers / shards
    else:  # their gradients are in bf16 until they are added to those of the fp32 weights
        trained = (_TRAINED + size) * numbers / shards
    activations = activation_bytes(shapes, precision, tokens=tokens, scored=tokens, recompute=recompute)
    return Memory(round(base + whole), round(trained), activations)

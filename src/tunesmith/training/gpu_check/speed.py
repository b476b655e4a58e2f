"""Speed and memory of training on this machine's device with random bases, beside TRL's on the same rows."""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.engines.device import DeviceMemory, computing_device, stated_peak
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.models.base import INDEX, Base
from tunesmith.models.random_llama import SHAPES, random_base, write_weights
from tunesmith.models.rendering import Rendered
from tunesmith.training.batches.batch_plan import lay_out_step
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.estimates.prediction import Memory, read_shapes, training_memory
from tunesmith.training.gpu_check.found import Found, LeftOut, random_rows
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainer import Trainer

GIB = 1 << 30
_LONGEST = 2048  # tokens of a row
_STEPS = 6  # of which the first does not count
_OVER = 1.25  # times the predicted memory


def speed(work: Path, shape: str, quantize: Literal["4bit"] | None, *, mixed: bool = False) -> Found:
    """Unpadded tokens a second, share of the card's peak and peak memory of some steps, and of TRL on the same rows.

    mixed: rows of 16 to 512 tokens, and the same rows padded too; otherwise all have 2,048 (of the tiny base 128).
    """
    device = computing_device()
    if device.type == "cpu" and shape != "tiny":
        raise LeftOut("no GPU is here, and on a CPU it would take hours")
    if quantize and find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed: pip install 'tunesmith[qlora]'")
    base = random_base(work / shape, shape)
    longest = 128 if shape == "tiny" else _LONGEST
    draw = random.Random(0)
    lengths = [draw.randint(16, 512) for _ in range(_STEPS * 32)] if mixed else [longest] * _STEPS * 4
    rows, each = random_rows(lengths, SHAPES[shape]["vocab_size"]), len(lengths) // _STEPS
    steps = [rows[first : first + each] for first in range(0, len(rows), each)]
    precision: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    needs, recompute = _needs(base, device, quantize, precision, longest)
    write_weights(base, device)
    weights = {"quantize": quantize, "recompute": recompute, "precision": precision}
    ours = _our_speed(base, steps, longest, work, weights)
    padded = _our_speed(base, steps, longest, work, weights, padded=True) if mixed else None
    figures, trl = {**ours, "predicted_bytes": needs.total}, "TRL is not installed"
    if find_spec("trl") is not None:
        try:
            theirs = _trl_speed(base, steps, 8 if mixed else 1, quantize, recompute)
            trl = f"TRL {theirs['tokens_per_second']:,.0f} tokens/s, {theirs['peak_bytes'] / GIB:.1f} GiB"
            figures |= {f"trl_{name}": value for name, value in theirs.items()}
        except Exception as error:  # noqa: BLE001 - what it cannot do is no fault of ours
            trl = f"TRL failed: {' '.join(str(error).split())[:100]}"
    detail = f"{ours['tokens_per_second']:,.0f} tokens/s, {_share(ours, recompute)}"
    if device.type == "cuda":
        detail += f"{ours['peak_bytes'] / GIB:.1f} GiB (predicted {needs.total / GIB:.1f})"
        if ours["peak_bytes"] > _OVER * needs.total:
            raise TunesmithError(f"{detail}: more than {_OVER:g} times the prediction")
    if padded is not None:
        figures["padded_tokens_per_second"] = padded["tokens_per_second"]
        ratio = ours["tokens_per_second"] / padded["tokens_per_second"]
        detail = f"{detail.rstrip(', ')}; {ratio:.2f} times the speed of padded rows"
    return Found(f"{detail.rstrip(', ')}; {trl}", figures)


def _needs(base: Base, device: torch.device, quantize: str | None, precision: str, tokens: int) -> tuple[Memory, bool]:
    """The predicted memory of a way that fits, and whether that way computes layers again. Raises LeftOut."""
    shapes, free = read_shapes(base.folder), DeviceMemory(device).available()
    numbers = 2 * (shapes.linear + shapes.rest)
    if not (base.folder / INDEX).is_file() and numbers > shutil.disk_usage(base.folder).free - GIB:
        raise LeftOut(f"random weights take {numbers / GIB:.0f} GiB of disk under TUNESMITH_CACHE")
    for recompute in (False, True) if quantize is None else (True,):
        needs = training_memory(
            shapes, quantized=quantize is not None, precision=precision, rank=16, tokens=tokens, recompute=recompute
        )
        if needs.total < free:
            return needs, recompute
    raise LeftOut(f"it takes {needs.total / GIB:.1f} GiB, and {free / GIB:.1f} are free")


def _our_speed(
    base: Base,
    steps: Sequence[Sequence[Rendered]],
    tokens: int,
    work: Path,
    weights: Mapping[str, Any],
    *,
    padded: bool = False,
) -> dict[str, float]:
    settings = TrainSettings(
        rank=16, learning_rate=1e-4, schedule="constant", keep="last", tokens=tokens, checkpoint_seconds=1e6, **weights
    )
    gc.collect()
    model = LoadedHFModel(base).trainable(settings, seed=0, state_bytes=12)
    if padded:
        model.pad_rows()
    memory = DeviceMemory(model.device)
    plan = [lay_out_step(step, settings.tokens, share=model.shares_prefix) for step in steps]
    memory.reset_peak()
    state = Trainer(model, plan, settings, Checkpoints(work / f"{base.folder.name}-{len(os.listdir(work))}", {})).run()
    seconds = [point["seconds"] for point in state.curve]
    found = _figures(steps, seconds, memory)
    operations = statistics.median(
        sum(map(model.flops, step)) / each for step, each in zip(plan[1:], seconds[1:], strict=True)
    )
    return {**found, "flops_per_second": operations, "loss": state.curve[-1]["loss"]}


def _trl_speed(
    base: Base, steps: Sequence[Sequence[Rendered]], at_once: int, quantize: str | None, recompute: bool
) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from tunesmith.engines.hf.four_bits import quantization
    from tunesmith.training.gpu_check.trl_steps import trl_steps

    gc.collect()
    device = computing_device()
    memory, gpu = DeviceMemory(device), device.type == "cuda"
    how = {} if quantize is None else {"quantization_config": quantization(torch.bfloat16)}
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.bfloat16 if gpu else torch.float32, device_map={"": str(device)}, **how
    )
    memory.reset_peak()
    told = {"bf16": gpu, "use_cpu": not gpu, "gradient_checkpointing": recompute, "dataloader_pin_memory": gpu}
    seconds = trl_steps(model, base.folder, steps, rank=16, rate=1e-4, at_once=at_once, **told).seconds
    return _figures(steps, seconds, memory)


def _figures(steps: Sequence[Sequence[Rendered]], seconds: Sequence[float], memory: DeviceMemory) -> dict[str, float]:
    """Without the first step, which sets things up."""
    tokens = [sum(len(row.ids) for row in step) for step in steps]
    each = statistics.median(count / one for count, one in zip(tokens[1:], seconds[1:], strict=True))
    return {"tokens_per_second": each, "peak_bytes": memory.peak()}


def _share(ours: Mapping[str, float], recompute: bool) -> str:
    """The share of the card's stated peak, in words that end in a comma. Attention is left out of the operations."""
    device = computing_device()
    if device.type == "cpu":
        return ""
    card = torch.cuda.get_device_name(device)
    if (peak := stated_peak(card)) is None:
        return f"no MFU (the peak of {card} is not known), "
    name = "of peak with what is computed again" if recompute else "MFU"
    return f"{ours['flops_per_second'] / peak:.0%} {name}, "

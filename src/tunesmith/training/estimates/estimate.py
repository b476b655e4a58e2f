"""Predicts a training's time, memory and disk space from its batch plan and a few measured steps."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.ranks import ALONE, Ranks, held
from tunesmith.engines.settings import HF, WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base, weight_files
from tunesmith.records.training import Estimate
from tunesmith.training.batches.batch_plan import Step, step_tokens
from tunesmith.training.checkpoints import KEPT
from tunesmith.training.objectives import Objective
from tunesmith.training.settings import LEAST_TOKENS, TrainSettings
from tunesmith.training.steps import gradients, parameters

_TIMED_STEPS = 2
_FP32 = 4  # bytes of a number


def too_few_numbers(rank: int, trained_numbers: int, labels: int) -> str | None:
    """A warning where an adapter has fewer numbers than the rows have labels; None where it has enough.

    The rule is from "LoRA Without Regret" (Schulman et al. 2025), as the authors' LoRA primer words it: LoRA learns
    like full fine-tuning as long as it has at least as many parameters as there are tokens to learn.
    """
    if trained_numbers >= labels:
        return None
    enough = math.ceil(rank * labels / trained_numbers)
    return (
        f"rank {rank} trains {trained_numbers:,} numbers for {labels:,} tokens to learn. LoRA keeps up with full "
        f'fine-tuning while it has one number for each token ("LoRA Without Regret"): that needs at least rank {enough}'
    )


def state_bytes(settings: TrainSettings) -> int:
    """Bytes that the trainer holds for each trained number besides the number itself: its gradient, AdamW's two
    moments and, with `keep: best`, its value at the best validation."""
    return _FP32 * (4 if settings.keep == "best" else 3)


class MemoryNeeds(NamedTuple):
    """What a training needs. memory: that it computes in. batch: bytes to compute a batch, by its shape. later: bytes
    that are allocated after the first steps, for the optimiser's state and the best weights. checkpoint: bytes on the
    disk. advice: what to set to lower `later`. may_recompute: whether `recompute: true` would lower `batch`. copies:
    bytes of the copies of the model that a scored validation makes, while no batch is computed."""

    memory: DeviceMemory
    batch: Callable[[Batch], int]
    later: int
    checkpoint: int
    advice: str
    may_recompute: bool = False
    copies: int = 0


def memory_needs(model: TrainableModel, settings: TrainSettings, *, validates: bool, copies: int = 0) -> MemoryNeeds:
    """What a training of model needs. validates: whether there are validation rows, without which no best is kept.
    copies: see MemoryNeeds."""
    best = 1 if settings.keep == "best" and validates else 0
    here, everywhere = (
        sum(each.nbytes for each in tensors)
        for tensors in ([held(parameter) for parameter in parameters(model)], parameters(model))
    )
    return MemoryNeeds(
        DeviceMemory(model.device),
        model.memory_estimate,
        later=(2 + best) * here,
        checkpoint=(3 + best) * everywhere,
        advice="train.layers" + ("" if settings.keep == "last" else ", or train.keep to last")
        + (", or train.method to lora" if settings.method == "full" else ", or train.rank lower")
        + (", or train.validate_by to loss" if copies else ""),
        may_recompute=model.engine_name == HF and not settings.recompute,
        copies=copies,
    )  # fmt: skip


def copied_bytes(model: TrainableModel, settings: WeightSettings, base: Base) -> int:
    """Bytes of the copies that an engine in this process makes of a model that is trained in full, to answer with it.

    One is read; on a CPU it is first compared with the base's weights, then laid out for the network. Adapters are
    small.
    """
    if settings.method != "full":
        return 0
    size = sum(path.stat().st_size for path in weight_files(base.folder))
    return 2 * size if model.device.type == "cpu" else size


def trial_step(model: TrainableModel, objective: Objective, ranks: Ranks = ALONE) -> Callable[[Step], None]:
    """A function that computes a step and drops its gradients, so that nothing changes."""

    def run(step: Step) -> None:
        gradients(model, objective, step, ranks)
        for parameter in parameters(model):
            parameter.grad = None

    return run


def check_memory(plan: Iterable[Step], needs: MemoryNeeds, *, local: int = 1) -> Batch:
    """The batch that needs the most memory. local: how many ranks share this machine's memory.

    Raises Refused where the batch, or what is allocated later, cannot fit.

    Where the kernel promises more memory than there is, it kills a process that uses too much instead of refusing. So
    the needs are compared with what is free before anything is tried.
    """
    batches = [batch for step in plan for batch in step]
    needed = [needs.batch(batch) for batch in batches]
    largest = batches[needed.index(max(needed))]
    free = needs.memory.available(local)
    if max(needed) > free:
        fitting = [batch.tokens for batch, bytes_ in zip(batches, needed, strict=True) if bytes_ <= free]
        raise _batch_too_large(largest, free, needs, max(fitting, default=None))
    at_once = max(*needed, needs.copies)
    if at_once + needs.later > free:
        raise _state_too_large(needs, free - at_once)
    return largest


def check_disk(folder: Path, needs: MemoryNeeds) -> None:
    """Raises Refused where the disk lacks room for the checkpoints that are kept and the next one."""
    existing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    needed = (KEPT + 1) * needs.checkpoint
    if needed > free + existing:
        raise Refused(
            f"{KEPT} checkpoints and the next one take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of the disk "
            "are free",
            where=str(folder),
            fix=f"free disk space, or set {needs.advice}",
        )


def estimate(
    plan: Sequence[Step],
    validation_tokens: int,
    validations: int,
    trial: Callable[[Step], None],
    needs: MemoryNeeds,
    *,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Measure the largest batch's memory and the time of two middling steps, and predict the whole training from them.

    trial: computes a step and changes nothing. validation_tokens: of one validation, whose forward passes take a third
    of a step's time. ranks: the memory is that of the rank that takes most. clock: as the trainer's.
    Raises Refused as check_memory does.
    """
    by_size = sorted(plan, key=step_tokens)
    needs.memory.reset_peak()
    largest, free = check_memory(plan, needs, local=ranks.local), needs.memory.available(ranks.local)
    try:
        trial([largest])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise _batch_too_large(largest, free, needs, None) from error
    copied = max(0, needs.copies - needs.batch(largest))  # they take the room of the batch first
    peak = ranks.most(needs.memory.peak() + needs.later + copied)
    if needs.later > (left := needs.memory.available(ranks.local)):
        raise _state_too_large(needs, left)
    timed = by_size[len(by_size) // 2 :][:_TIMED_STEPS]
    began = clock()
    for step in timed:
        trial(step)
    each = (clock() - began) / sum(step_tokens(step) for step in timed)
    trained = each * sum(step_tokens(step) for step in plan)
    return Estimate(
        seconds=trained + each * validations * validation_tokens / 3,
        step_seconds=trained / len(plan),
        peak_memory_bytes=peak,
        checkpoint_bytes=needs.checkpoint,
    )


def _batch_too_large(largest: Batch, free: int, needs: MemoryNeeds, fitting: int | None) -> Refused:
    """fitting: tokens of the largest batch that would fit; None where none is known."""
    lower = "tokens and max_length lower, or train fewer layers"
    if fitting is not None and fitting >= LEAST_TOKENS:
        lower = f"tokens to {fitting}, and max_length no higher"
    return Refused(
        f"the largest part of a step ({largest.tokens} tokens) takes about {needs.batch(largest) / 1e9:.1f} GB of "
        f"memory, but only {free / 1e9:.1f} GB are free",
        where="train.tokens",
        fix=f"set recompute: true, or {lower}" if needs.may_recompute else f"set {lower}",
    )


def _state_too_large(needs: MemoryNeeds, free: int) -> Refused:
    besides = "a step's memory"
    if needs.copies:
        besides += f", or of the {needs.copies / 1e9:.1f} GB of the copies that a scored validation makes"
    return Refused(
        f"the optimiser's state takes {needs.later / 1e9:.1f} GB on top of {besides}, but only "
        f"{max(0, free) / 1e9:.1f} GB are free",
        where="train",
        fix=f"set {needs.advice}",
    )

"""What a training will take, from a few measured steps and the batch plan; and afterwards how far off that was."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.lora import Lora
from tunesmith.engines.native.adapters.loss import LOGIT_ROWS
from tunesmith.engines.native.network.attention import KEPT_WEIGHTS, SHARES, fits_tiles
from tunesmith.engines.native.network.network import Network
from tunesmith.training.checkpoints import KEPT
from tunesmith.training.settings import LEAST_TOKENS, TrainSettings
from tunesmith.training.trainable import Trained
from tunesmith.training.trainer import Step, step_tokens

_TIMED = 2


def too_few_numbers(rank: int, parameters: int, labels: int) -> str | None:
    """What to say where an adapter has fewer trained numbers than the rows have labels in one pass; None where not.

    The rule is that of the authors of "LoRA Without Regret" (Schulman et al. 2025), as their LoRA primer words it: a
    LoRA learns like full fine-tuning as long as its parameters are no fewer than the tokens learned.
    """
    if parameters >= labels:
        return None
    enough = math.ceil(rank * labels / parameters)
    return (
        f"rank {rank} trains {parameters:,} numbers for {labels:,} tokens to learn: LoRA keeps up with full "
        f'fine-tuning while it has one for each ("LoRA Without Regret"), which is from rank {enough} on'
    )


def step_bytes(network: Network | HFModel, trained: Trained, settings: TrainSettings, part: Batch) -> int:
    """Bytes that computing a part of a step takes on top of what is there already: what its backward pass keeps, a
    chunk of logits, the gradients, and an adapter's copies where there are none yet.

    Kept of every token by a layer of width M, with Q numbers of queries, keys and values, A of mixed values and F in
    the gated middle: 2 M + Q + A + 2 F (two sums, the heads, both halves of the gate); where weights learn, what those
    are multiplied with too: 2 M (the norms of the sums) + F (the gated middle). An adapter has that made again.
    Layers below the first that is trained keep nothing. Attention weights of many tokens are made a layer at a time.
    """
    masters = sum(each.nbytes for each in trained.masters)
    if isinstance(network, HFModel):
        return network.kept_bytes(part) + masters
    shape, layer = network.shape, network.layers[0].linear
    kept = 2 * shape.width + layer["qkv"].out + layer["o"].into + layer["gate_up"].out
    if settings.method == "full":
        kept += 2 * shape.width + layer["down"].into
    layers = min(settings.layers or shape.layers, shape.layers)
    longest, rows = max(part.lengths), len(part.lengths)
    weights = shape.heads * (part.prefix**2 + rows * longest * (part.prefix + longest))
    sums = 0
    if fits_tiles(shape, network.layers[0].window, part.prefix + longest, network.embedding):
        weights = 0  # they never leave the caches; the prefix's gradients are summed in parts
        sums = 4 * (min(rows, SHARES) + 1) * shape.kv_heads * 2 * part.prefix * shape.head
    weights *= 1 + (layers if weights <= KEPT_WEIGHTS else 1)  # and their gradients, a layer's at a time
    logits = min(LOGIT_ROWS, part.labels.numel()) * shape.vocabulary
    size = network.embedding.element_size()
    copies = trained.missing_bytes if isinstance(trained, Lora) else 0
    return size * (layers * kept * part.tokens + weights + logits) + sums + masters + copies


class Estimate(BaseModel):
    """seconds of the whole training, most bytes of memory it needs at once, bytes of a checkpoint."""

    seconds: float
    peak_memory_bytes: int
    checkpoint_bytes: int


class Needs(NamedTuple):
    """What a run takes of memory. part: what computing a part of a step takes, by its shapes. later: what there is
    beside that, the optimiser's state and the best weights. checkpoint: bytes on the disk. less: what to set for less
    of later."""

    part: Callable[[Batch], int]
    later: int
    checkpoint: int
    less: str


def needs_of(trained: Trained, settings: TrainSettings, *, validates: bool) -> Needs:
    """What a training takes."""
    masters = sum(master.nbytes for master in trained.masters)
    best = masters if settings.keep == "best" and validates else 0
    return Needs(
        lambda part: step_bytes(trained.network, trained, settings, part),
        later=2 * masters + best,
        checkpoint=3 * masters + best,
        less="train.layers" + ("" if settings.keep == "last" else ", or train.keep to last")
        + (", or train.method to lora" if settings.method == "full" else ", or train.rank lower"),
    )  # fmt: skip


def check_room(plan: Iterable[Step], needs: Needs) -> Batch:
    """The part of a step that takes the most memory.

    Where the kernel gives out more memory than there is, a step too large is not refused but killed: so what its shapes
    say is held against what is free before anything is tried. Raises Refused where it, or what there is beside it,
    cannot fit.
    """
    parts = [part for step in plan for part in step]
    taken = [needs.part(part) for part in parts]
    largest = parts[taken.index(max(taken))]
    free = runtime.available_memory()
    if max(taken) > free:
        fitting = [part.tokens for part, bytes_ in zip(parts, taken, strict=True) if bytes_ <= free]
        raise _too_large(largest, free, max(taken), max(fitting, default=None))
    if max(taken) + needs.later > free:
        raise _no_room_for_state(needs, free - max(taken))
    return largest


def check_disk(folder: Path, needs: Needs) -> None:
    """Raises Refused where the disk has no room for a run's checkpoints: the newest two, and the next while it is
    written."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    taken = (KEPT + 1) * needs.checkpoint
    if taken > free + there:
        raise Refused(
            f"{KEPT} checkpoints and the next one take {taken / 1e9:.1f} GB, {free / 1e9:.1f} GB of the disk are free",
            where=str(folder),
            fix=f"make room, or set {needs.less}",
        )


def estimate(
    plan: Sequence[Step], validation_tokens: int, validations: int, trial: Callable[[Step], None], needs: Needs
) -> Estimate:
    """Trainer trial, a step that changes nothing, on the largest (memory) and on two of middling size (time).

    validation_tokens: tokens of one validation pass, of which a forward pass takes a third of a step's time. Raises
    Refused as check_room does.
    """
    by_size = sorted(plan, key=step_tokens)
    runtime.reset_peak_memory()
    largest, free = check_room(plan, needs), runtime.available_memory()
    try:
        trial([largest])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise _too_large(largest, free, needs.part(largest), None) from error
    peak = runtime.peak_memory() + needs.later
    if needs.later > (left := runtime.available_memory()):
        raise _no_room_for_state(needs, left)
    timed = by_size[len(by_size) // 2 :][:_TIMED]
    began = time.perf_counter()
    for step in timed:
        trial(step)
    each = (time.perf_counter() - began) / sum(step_tokens(step) for step in timed)
    tokens = sum(step_tokens(step) for step in plan) + validations * validation_tokens / 3
    return Estimate(seconds=each * tokens, peak_memory_bytes=peak, checkpoint_bytes=needs.checkpoint)


def _too_large(largest: Batch, free: int, needed: int, fitting: int | None) -> Refused:
    """fitting: the most tokens of a part that would fit; None where none is known."""
    return Refused(
        f"the largest part of a step ({largest.tokens} tokens) takes about {needed / 1e9:.1f} GB of memory, "
        f"{free / 1e9:.1f} GB are free",
        where="train.tokens",
        fix=f"set tokens to {fitting}, and max_length no higher"
        if fitting is not None and fitting >= LEAST_TOKENS
        else "set tokens and max_length lower, or train fewer layers",
    )


def _no_room_for_state(needs: Needs, free: int) -> Refused:
    return Refused(
        f"the optimiser's state takes {needs.later / 1e9:.1f} GB beside a step's memory, "
        f"{max(0, free) / 1e9:.1f} GB are free",
        where="train",
        fix=f"set {needs.less}",
    )

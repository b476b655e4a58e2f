"""What a training will take, from a few measured steps and the batch plan; and afterwards how far off that was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel

from tunesmith.core.errors import Refused
from tunesmith.models import runtime
from tunesmith.models.attention import KEPT_WEIGHTS, fits_tiles
from tunesmith.models.batch import Batch
from tunesmith.models.foreign import Foreign
from tunesmith.models.four_bit import FourBit
from tunesmith.models.network import Network
from tunesmith.training.loop import Step, step_tokens
from tunesmith.training.lora import Lora
from tunesmith.training.loss import LOGIT_ROWS
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainable import Trained

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


def step_bytes(network: Network | Foreign, trained: Trained, settings: TrainSettings, part: Batch) -> int:
    """Bytes that computing a part of a step takes on top of what is there already: what its backward pass keeps, a
    chunk of logits, the gradients, and an adapter's copies where there are none yet.

    Kept of every token by a layer of width M, with Q numbers of queries, keys and values, A of mixed values and F in
    the gated middle: 2 M + Q + A + 2 F (two sums, the heads, both halves of the gate); where weights learn, what those
    are multiplied with too: 2 M (the norms of the sums) + F (the gated middle). An adapter has that made again.
    Layers below the first that is trained keep nothing. Attention weights of many tokens are made a layer at a time. Of
    a weight in 4 bits there are its parts and the whole while it is multiplied.
    """
    masters = sum(each.nbytes for each in trained.masters)
    if isinstance(network, Foreign):
        return network.kept_bytes(part) + masters
    shape, layer = network.shape, network.layers[0].linear
    kept = 2 * shape.width + layer["qkv"].out + layer["o"].into + layer["gate_up"].out
    if settings.method == "full":
        kept += 2 * shape.width + layer["down"].into
    layers = min(settings.layers or shape.layers, shape.layers)
    longest, rows = max(part.lengths), len(part.lengths)
    weights = shape.heads * (part.prefix**2 + rows * longest * (part.prefix + longest))
    if fits_tiles(shape, network.layers[0].window, part.prefix + longest, network.embedding):
        weights = 0  # they never leave the caches
    weights *= 1 + (layers if weights <= KEPT_WEIGHTS else 1)  # and their gradients, a layer's at a time
    logits = min(LOGIT_ROWS, part.labels.numel()) * shape.vocabulary
    unpacked = 2 * max((each.numel() for each in layer.values() if isinstance(each, FourBit)), default=0)
    size = network.embedding.element_size()
    copies = trained.missing_bytes if isinstance(trained, Lora) else 0
    return size * (layers * kept * part.tokens + weights + logits + unpacked) + masters + copies


class Estimate(BaseModel):
    """seconds of the whole training, most bytes of memory it needs at once."""

    seconds: float
    peak_memory_bytes: int


def estimate(
    plan: Sequence[Step],
    validation_tokens: int,
    validations: int,
    trial: Callable[[Step], None],
    later: int,
    predicted: Callable[[Batch], int],
    on: torch.device = runtime.CPU,
) -> Estimate:
    """Run trial, a step that changes nothing, on the largest (memory) and on two of middling size (time).

    Where the kernel gives out more memory than there is, a step too large is not refused but killed: predicted says
    from shapes what a part will take, and is held against what is free before anything is tried.

    validation_tokens: tokens of one validation pass, of which a forward pass takes a third of a step's time. later:
    bytes that a run takes beside a step's: the optimiser's state, the best weights. on: the device whose memory it
    takes. Raises Refused where the largest part of a step, or that beside it, cannot fit.
    """
    largest = max((part for step in plan for part in step), key=lambda part: part.tokens)
    by_size = sorted(plan, key=step_tokens)
    runtime.reset_peak_memory(on)
    free, needed = runtime.available_memory(on), predicted(largest)
    if needed > free:
        raise _too_large(largest, free, needed)
    if needed + later > free:
        raise _no_room_for_state(later, free - needed)
    try:
        trial([largest])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise _too_large(largest, free, needed) from error
    peak = runtime.peak_memory(on) + later
    if later > (left := runtime.available_memory(on)):
        raise _no_room_for_state(later, left)
    timed = by_size[len(by_size) // 2 :][:_TIMED]
    began = time.perf_counter()
    for step in timed:
        trial(step)
    each = (time.perf_counter() - began) / sum(step_tokens(step) for step in timed)
    tokens = sum(step_tokens(step) for step in plan) + validations * validation_tokens / 3
    return Estimate(seconds=each * tokens, peak_memory_bytes=peak)


def _too_large(largest: Batch, free: int, needed: int) -> Refused:
    return Refused(
        f"the largest part of a step ({largest.tokens} tokens) takes about {needed / 1e9:.1f} GB of memory, "
        f"{free / 1e9:.1f} GB are free",
        where="train.tokens",
        fix=f"set tokens to {max(64, largest.tokens // 2)}, or max_length lower",
    )


def _no_room_for_state(later: int, free: int) -> Refused:
    return Refused(
        f"the optimiser's state takes {later / 1e9:.1f} GB beside a step's memory, "
        f"{max(0, free) / 1e9:.1f} GB are free",
        where="train",
        fix="set train.layers, or train.method to lora",
    )

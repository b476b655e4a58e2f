"""What a training will take, from a few measured steps and the batch plan; and afterwards how far off that was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from tunesmith.core.errors import Refused
from tunesmith.models import runtime
from tunesmith.training.loop import Step, step_tokens

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


class Estimate(BaseModel):
    """seconds of the whole training, most bytes of memory it needs at once."""

    seconds: float
    peak_memory_bytes: int


def estimate(
    plan: Sequence[Step], validation_tokens: int, validations: int, trial: Callable[[Step], None], later: int
) -> Estimate:
    """Run trial, a step that changes nothing, on the largest (memory) and on two of middling size (time).

    validation_tokens: tokens of one validation pass, of which a forward pass takes a third of a step's time. later:
    bytes that a run takes beside a step's: the optimiser's state, the best weights. Raises Refused where the largest
    part of a step, or that beside it, cannot fit.
    """
    largest = max((part for step in plan for part in step), key=lambda part: part.tokens)
    by_size = sorted(plan, key=step_tokens)
    runtime.reset_peak_memory()
    before = runtime.available_memory()
    try:
        trial([largest])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise Refused(
            f"the largest part of a step ({largest.tokens} tokens) does not fit into the {before / 1e9:.1f} GB of "
            "memory that are free",
            where="train.tokens",
            fix=f"set tokens to {max(64, largest.tokens // 2)}, or max_length lower",
        ) from error
    peak = runtime.peak_memory() + later
    if later > (free := runtime.available_memory()):
        raise Refused(
            f"the optimiser's state takes {later / 1e9:.1f} GB beside a step's memory, {free / 1e9:.1f} GB are free",
            where="train",
            fix="set train.layers, or train.method to lora",
        )
    timed = by_size[len(by_size) // 2 :][:_TIMED]
    began = time.perf_counter()
    for step in timed:
        trial(step)
    each = (time.perf_counter() - began) / sum(step_tokens(step) for step in timed)
    tokens = sum(step_tokens(step) for step in plan) + validations * validation_tokens / 3
    return Estimate(seconds=each * tokens, peak_memory_bytes=peak)

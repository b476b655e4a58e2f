"""What a training will take, from a few measured steps and the batch plan; and afterwards how far off that was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from tunesmith.core.errors import Refused
from tunesmith.models import runtime
from tunesmith.models.batch import Batch

_TIMED = 2


class Estimate(BaseModel):
    """seconds of the whole training, most bytes of memory it needs at once."""

    seconds: float
    peak_memory_bytes: int


def estimate(
    batches: Sequence[Batch], validation_tokens: int, validations: int, trial: Callable[[Batch], None]
) -> Estimate:
    """Run trial, a step that changes nothing, on the largest batch (memory) and on two of middling size (time).

    validation_tokens: tokens of one validation pass, of which a forward pass takes a third of a step's time. Raises
    Refused where the largest batch cannot fit.
    """
    by_size = sorted(batches, key=lambda batch: batch.tokens)
    runtime.reset_peak_memory()
    before = runtime.available_memory()
    try:
        trial(by_size[-1])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise Refused(
            f"the largest batch ({by_size[-1].tokens} tokens) does not fit into the {before / 1e9:.1f} GB of memory "
            "that are free",
            where="train.batch",
            fix=f"set batch to {max(1, len(by_size[-1].lengths) // 2)}, or max_length lower",
        ) from error
    peak = runtime.peak_memory()
    timed = by_size[len(by_size) // 2 :][:_TIMED]
    began = time.perf_counter()
    for batch in timed:
        trial(batch)
    each = (time.perf_counter() - began) / sum(batch.tokens for batch in timed)
    tokens = sum(batch.tokens for batch in batches) + validations * validation_tokens / 3
    return Estimate(seconds=each * tokens, peak_memory_bytes=peak)

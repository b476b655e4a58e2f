"""Measures how many floating-point operations a second this machine reaches on one matrix product."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch

MEASURED_ROWS = 1024  # rows of activations at most; more rows are no faster
_SECONDS = 0.1


def measured_flops(multiply: Callable[[], object], operations: float) -> float:
    """Floating-point operations a second of the fastest call of multiply within a tenth of a second.

    operations: floating-point operations of one call. The first call is not counted, since it may set things up.
    """
    multiply()
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < until or best == math.inf:
        multiply()
        best = min(best, time.perf_counter() - began)
    return operations / best


@cache
def product_flops(rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a device reaches on a product of torch. Measured once for each size."""
    weight, x = (torch.full((size, inputs), 0.01, device=device, dtype=dtype) for size in (outputs, rows))

    def multiply() -> None:
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it computes while this thread goes on

    return measured_flops(multiply, 2.0 * rows * inputs * outputs)

"""Measures how many floating-point operations a second this machine reaches on one matrix product."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

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

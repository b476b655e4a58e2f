"""Products with frozen weights laid out for this machine, beside the tensor library's own: GFLOP/s.

    python benchmarks/products.py [--rows 64 928]

The shapes are those of the 135M base's layers and of its head; the library's weights are laid out beforehand too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.engines.native import kernels as native
from tunesmith.engines.native import runtime
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.process import prepare_process

FORMATS = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))  # out, in
ROUNDS = 7


def main() -> None:
    """Measure, print a line for each number of rows and each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 928], help="rows of activations")
    told = parser.parse_args()
    threads = prepare_process()
    print(f"{runtime.describe()} ({native.identity()}), {threads} threads, torch {torch.__version__}")
    print("  rows  weight         ours  ours, gradient  the library's")
    for rows in told.rows:
        for out, into in FORMATS:
            weight, x, gradient = (torch.randn(*size).bfloat16() for size in ((out, into), (rows, into), (rows, out)))
            ours, laid_out = PackedLinear(weight), torch.ops.mkldnn._reorder_linear_weight(weight, rows)

            def library(x: Tensor = x, laid_out: Tensor = laid_out) -> Tensor:
                found: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")
                return found

            def forward(x: Tensor = x, ours: PackedLinear = ours) -> Tensor:
                return ours(x)

            def backward(gradient: Tensor = gradient, ours: PackedLinear = ours) -> Tensor:
                return ours.input_gradient(gradient)

            work = 2 * rows * out * into / 1e9
            speeds = [work / _seconds(each, work) for each in (forward, backward, library)]
            print(f"{rows:6}  {out:5} x {into:4}  {speeds[0]:7.0f}  {speeds[1]:14.0f}  {speeds[2]:13.0f}", flush=True)


def _seconds(made: Callable[[], Tensor], work: float) -> float:
    """Of one product, the median; small ones are repeated, so that a round takes some ten billion operations."""
    again = max(1, round(10 / work))
    made()
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(again):
            made()
        rounds.append((time.perf_counter() - began) / again)
    return statistics.median(rounds)


if __name__ == "__main__":
    main()

"""How much of the machine a training uses: a step's products beside what one product alone reaches."""

from __future__ import annotations

import math
import time
from functools import cache

import torch

from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.training.settings import TrainSettings

_ROWS = 1024
_SECONDS = 0.1


def step_flops(network: Network | HFModel, parameters: int, settings: TrainSettings, tokens: int, labels: int) -> float:
    """Floating-point operations of a step's matrix products. parameters: how many numbers are trained.

    A token's, where the linear layers have N numbers, B of them from the first trained layer on: 2 N forward and 2 B
    back to the inputs; for gradients of weights 2 B in full, and with LoRA none: its P numbers take 6 P of their own.
    (That is the usual 6 N, less the frozen weights' third.) A label's: 4 times the head's numbers, 6 where the head
    learns. Attention, element-wise work and what is computed twice are left out.
    """
    if isinstance(network, HFModel):  # which computes logits of every token, and back through all of it
        return float(tokens * (4 * network.multiplied + 6 * parameters))
    sizes = [sum(product.numel() for product in layer.linear.values()) for layer in network.layers]
    first = 0 if settings.layers is None else max(0, len(sizes) - settings.layers)
    forward, back = sum(sizes), sum(sizes[first:])
    full = settings.method == "full"
    token = 2 * forward + (4 * back if full else 2 * back + 6 * parameters)
    label = (6 if full and settings.layers is None else 4) * network.head.numel()
    return float(token * tokens + label * labels)


def matrix_limit(network: Network | HFModel, tokens: int) -> float:
    """FLOP/s of the machine's product at the shape of the network's widest one, for tokens of activations."""
    if isinstance(network, HFModel):
        out, into = network.widest
        return _limit(min(tokens, _ROWS), into, out, torch.float32)
    widest = max(network.layers[0].linear.values(), key=lambda product: product.out)
    return _limit(min(tokens, _ROWS), widest.into, widest.out, network.dtype)


@cache
def _limit(rows: int, into: int, out: int, dtype: torch.dtype) -> float:
    """Measured once a process: the best within a tenth of a second, the first one left out."""
    weight, x = (torch.full((size, into), 0.01, dtype=dtype) for size in (out, rows))
    product = PackedLinear(weight)
    product(x)
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < until or best == math.inf:
        product(x)
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * into * out / best

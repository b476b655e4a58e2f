"""Predicts from a base's configuration alone how much memory a training takes on a device. No weights are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.core.errors import UsageError
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.costs import DTYPES, Shapes, activation_bytes, shapes_of
from tunesmith.engines.hf.loading import cannot_run, first_line
from tunesmith.engines.process import MEASURED_ROWS, product_flops

# NF4 in blocks of 64 with one scale of 8 bits each, and one scale of 32 bits for 256 scales (Dettmers et al. 2023).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_TRAINED = 4 * 5  # bytes of a trained number: itself, its gradient, AdamW's two moments, its best value; all fp32


class Memory(NamedTuple):
    """Bytes on each device. base: weights that are not trained, and the layer that is brought together where they are
    sharded. trained: weights in training with gradients, optimiser and the best ones. activations: of one batch, with
    its logits."""

    base: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.activations


def read_shapes(folder: Path) -> Shapes:
    """The shapes of the model whose config.json a folder holds.

    Raises UsageError where there is none, Refused for a configuration that transformers does not know.
    """
    transformers = libraries.transformers()
    if not (folder / "config.json").is_file():
        raise UsageError("there is no config.json", where=str(folder), fix="name the folder of a base model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # which holds shapes only
            module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # every architecture has its own way to refuse a configuration
        raise cannot_run(folder, first_line(error)) from error
    return shapes_of(module)


def training_memory(
    shapes: Shapes,
    *,
    quantized: bool,
    precision: str,
    rank: int | None,
    tokens: int,
    recompute: bool,
    shards: int = 1,
) -> Memory:
    """Bytes on each device to train an adapter of all linear layers, on batches of so many tokens.

    rank: of the adapter; None where the base itself is trained (method: full). quantized: the base is in 4 bits.
    precision: fp32 or bf16, of the frozen base and of what is computed. recompute: the decoder's layers keep only what
    they read. shards: devices that the weights are spread over.
    """
    size, numbers = float(DTYPES[precision].itemsize), shapes.linear + shapes.rest
    if quantized:
        # bitsandbytes restores the weight of one product at a time.
        base, whole = _NF4 * shapes.linear + size * shapes.rest, size * math.prod(shapes.widest)
    else:
        base = size * numbers / shards
        whole = size * (shapes.layer + shapes.rest) if shards > 1 else 0.0  # brought together while they compute
    if rank is not None:
        trained = _TRAINED * rank * shapes.adapted / shards
    elif precision == "fp32":  # the base's weights are those that the optimiser moves
        base, trained = 0.0, _TRAINED * numbers / shards
    else:  # their gradients are in bf16 until they are added to those of the fp32 weights
        trained = (_TRAINED + size) * numbers / shards
    activations = activation_bytes(shapes, precision, tokens=tokens, scored=tokens, recompute=recompute)
    return Memory(round(base + whole), round(trained), activations)


def measured_peak(shapes: Shapes, precision: str) -> float:
    """Floating-point operations a second that this process's device reaches on the widest product."""
    return product_flops(MEASURED_ROWS, *shapes.widest, computing_device(), DTYPES[precision])

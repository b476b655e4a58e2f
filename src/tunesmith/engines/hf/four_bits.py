"""A base in 4 bits while an adapter is trained (QLoRA), by bitsandbytes.

Method: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs": NF4 with one scale for each block of 64
numbers; the scales are quantised to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import Refused
from tunesmith.engines.hf import libraries

_BLOCK = 64


def quantization(computed: torch.dtype) -> Any:
    """transformers' configuration for a base in 4 bits. computed: what it computes in."""
    libraries.bitsandbytes()
    return libraries.transformers().BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )


def prepare(linears: Mapping[str, nn.Module], device: torch.device) -> None:
    """Make 4-bit layers ready for training. Raises Refused for layers that bitsandbytes does not restore from 4 bits on
    a CPU (seen in 0.50.2): those whose rows do not consist of whole blocks."""
    for name, module in linears.items():
        if device.type == "cpu" and module.in_features % _BLOCK:  # type: ignore[operator]
            raise Refused(
                f"{name} has {module.in_features} inputs, and bitsandbytes computes 4-bit layers on a CPU correctly "
                f"only for multiples of {_BLOCK}",
                where="train.quantize",
                fix="leave quantize out",
            )
        # In eval mode, bitsandbytes packs a layer for its bf16 inference kernel, which has no gradients.
        module.train()


def description() -> str:
    """How the base is quantised, for the record of the training and to refuse a resume with another version."""
    return f"nf4, blocks of {_BLOCK}, double quantisation, bitsandbytes {version('bitsandbytes')}"

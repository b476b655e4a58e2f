"""Predicts from a base's configuration alone how much memory a training on a device needs. No weights are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.core.errors import UsageError
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.loading import cannot_run, first_line
from tunesmith.engines.hf.model import is_linear, sizes
from tunesmith.engines.hf.sharding import layers

_BYTES = {"fp32": 4.0, "bf16": 2.0}
# Bytes that are kept of each number that a linear layer reads or gives: measured with Llama and Qwen3 on a CPU. With
# bf16 they include the fp32 copies that norms and adapters make.
_KEPT = {"fp32": 4.2, "bf16": 3.9}
# NF4 in blocks of 64 with one scale of 8 bits each, and one scale of 32 bits for 256 scales (Dettmers et al. 2023).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_TRAINED = 4 * 5  # bytes of a trained number: itself, its gradient, AdamW's two moments, its best value; all fp32


class Shapes(NamedTuple):
    """What memory depends on. linear: numbers of the decoder's linear layers; rest: of embeddings, norms and head;
    layer: of the largest decoder layer. layers: how many there are. width: of a hidden state. kept: inputs and outputs
    of all linear layers for one token; kept_layer: of the largest decoder layer. vocabulary: logits of a step. cache:
    keys and values of one token.
    """

    linear: int
    rest: int
    layer: int
    layers: int
    width: int
    kept: int
    kept_layer: int
    vocabulary: int
    cache: int


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
    module = _without_weights(folder)
    head = module.get_output_embeddings()
    linears = {name: each for name, each in module.named_modules() if is_linear(each) and each is not head}
    each_layer = layers(module)
    numbers = sum(math.prod(sizes(each)) for each in linears.values())
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        linear=numbers,
        rest=sum(each.numel() for each in module.parameters()) - numbers,
        layer=max(sum(each.numel() for each in layer.parameters()) for layer in each_layer),
        layers=len(each_layer),
        width=config.hidden_size,
        kept=sum(sum(sizes(each)) for each in linears.values()),
        kept_layer=max(sum(sum(sizes(each)) for each in layer.modules() if is_linear(each)) for layer in each_layer),
        vocabulary=config.vocab_size,
        cache=2 * len(each_layer) * heads * head_width,
    )


def training_memory(
    shapes: Shapes,
    *,
    quantized: bool,
    precision: str,
    rank: int,
    tokens: int,
    recompute: bool,
    shards: int = 1,
) -> Memory:
    """Bytes on each device to train an adapter of all linear layers, on batches of so many tokens.

    quantized: the base is in 4 bits. precision: fp32 or bf16, of the frozen base and of what is computed. recompute:
    the decoder's layers keep only what they read. shards: devices that the weights are spread over.
    """
    size, numbers = _BYTES[precision], shapes.linear + shapes.rest
    if quantized:
        base, whole = _NF4 * shapes.linear + size * shapes.rest, size * shapes.layer  # restored while it computes
    else:
        base = size * numbers / shards
        whole = size * (shapes.layer + shapes.rest) if shards > 1 else 0.0  # brought together while they compute
    trained = _TRAINED * rank * shapes.kept / shards
    # What each layer and the last norm read, and all of the layer that is computed again; or all layers.
    states = (size * shapes.layers + _BYTES["fp32"]) * shapes.width + _KEPT[precision] * shapes.kept_layer
    kept = states if recompute else _KEPT[precision] * shapes.kept
    # The logits, their log-probabilities and their gradient are fp32.
    activations = tokens * (kept + _BYTES["fp32"] * 3 * shapes.vocabulary)
    return Memory(round(base + whole), round(trained), round(activations))


def cache_bytes(shapes: Shapes, precision: str, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens while answers are generated."""
    return round(_BYTES[precision] * shapes.cache * tokens)


def _without_weights(folder: Path) -> Any:
    """The module on torch's meta device, which holds shapes only."""
    transformers = libraries.transformers()
    if not (folder / "config.json").is_file():
        raise UsageError("there is no config.json", where=str(folder), fix="name the folder of a base model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # every architecture has its own way to refuse a configuration
        raise cannot_run(folder, first_line(error)) from error

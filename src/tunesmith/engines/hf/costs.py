"""The memory and the operations of a training on a device: they depend on the base's configuration alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tunesmith.core.errors import UsageError
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.loading import cannot_run, first_line
from tunesmith.engines.hf.sharding import layers
from tunesmith.engines.peak import MEASURED_ROWS, product_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BYTES = {"fp32": 4.0, "bf16": 2.0}
# Bytes that are kept of each number that a linear layer reads or gives: measured with Llama and Qwen3 on a CPU. With
# bf16 they include the fp32 copies that norms and adapters make.
_KEPT = {"fp32": 4.2, "bf16": 3.9}
# NF4 in blocks of 64 with one scale of 8 bits each, and one scale of 32 bits for 256 scales (Dettmers et al. 2023).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_TRAINED = 4 * 5  # bytes of a trained number: itself, its gradient, AdamW's two moments, its best value; all fp32


class Shapes(NamedTuple):
    """What memory and time depend on. A product is of one token with a linear layer, or with an expert's weight for
    each expert that the token is sent to; the head's is apart.

    linear: numbers of the linear layers; rest: of embeddings, norms, head and experts; layer: of the largest decoder
    layer. layers: how many there are. width: of a hidden state. adapted: inputs and outputs of all linear layers. kept:
    of all products; kept_layer: of those of the largest layer. computed: numbers of the weights of all products; head:
    of the head's. widest: (outputs, inputs) of the widest product. vocabulary: logits of a step. cache: keys and values
    of one token.
    """

    linear: int
    rest: int
    layer: int
    layers: int
    width: int
    adapted: int
    kept: int
    kept_layer: int
    computed: int
    head: int
    widest: tuple[int, int]
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
    return shapes_of(_without_weights(folder))


def shapes_of(module: Any) -> Shapes:
    """The shapes of transformers' module without adapters. In 4 bits, rest and layer are not those of the base."""
    head, config = module.get_output_embeddings(), module.config.get_text_config()
    linears = [sizes(each) for each in module.modules() if is_linear(each) and each is not head]
    products, each_layer = _products(module, config, head), layers(module, whole=True)
    heads = getattr(config, "num_attention_heads", 0)  # a running state has none
    cached_heads = getattr(config, "num_key_value_heads", None) or heads
    width = int(config.hidden_size)
    return Shapes(
        linear=sum(map(math.prod, linears)),
        rest=sum(each.numel() for each in module.parameters()) - sum(map(math.prod, linears)),
        layer=max(sum(each.numel() for each in layer.parameters()) for layer in each_layer),
        layers=len(each_layer),
        width=width,
        adapted=sum(map(sum, linears)),
        kept=sum(map(sum, products)),
        kept_layer=max(sum(map(sum, _products(layer, config, head))) for layer in each_layer),
        computed=sum(map(math.prod, products)),
        head=0 if head is None else math.prod(sizes(head)),
        widest=max(products, key=max),
        vocabulary=config.vocab_size,
        cache=2 * len(each_layer) * cached_heads * (getattr(config, "head_dim", None) or width // max(1, heads)),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, as torch or GPT-2 has them."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds several experts' weights in one parameter."""
    return "Experts" in type(module).__name__ and bool(list(module.parameters(recurse=False)))


def sizes(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inputs, outputs = module.get_parameter("weight").shape  # transformers' Conv1D
    return outputs, inputs


def _products(module: nn.Module, config: Any, head: nn.Module | None) -> list[tuple[int, int]]:
    """(outputs, inputs) of the products that a token goes through in a module."""
    experts = [one for each in module.modules() if is_experts(each) for one in each.parameters(recurse=False)]
    each_expert = [(one.shape[1], one.shape[2]) for one in experts if one.dim() == 3]
    found = [sizes(each) for each in module.modules() if is_linear(each) and each is not head]
    return found + each_expert * getattr(config, "num_experts_per_tok", 1)


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
    trained = _TRAINED * rank * shapes.adapted / shards
    activations = activation_bytes(shapes, precision, tokens=tokens, scored=tokens, recompute=recompute)
    return Memory(round(base + whole), round(trained), activations)


def activation_bytes(shapes: Shapes, precision: str, *, tokens: int, scored: int, recompute: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, with its logits. scored: tokens that get logits."""
    # What each layer and the last norm read, and all of the layer that is computed again; or all layers.
    states = (_BYTES[precision] * shapes.layers + _BYTES["fp32"]) * shapes.width
    kept = states + _KEPT[precision] * shapes.kept_layer if recompute else _KEPT[precision] * shapes.kept
    # The logits, their log-probabilities and their gradient are fp32.
    return round(tokens * kept + scored * _BYTES["fp32"] * 3 * shapes.vocabulary)


def training_flops(shapes: Shapes, *, tokens: int, scored: int, trained: int, recompute: bool) -> float:
    """Floating-point operations of a batch's matrix products, forward and backward. Attention is left out.

    4 for each frozen number (2 forward, 2 backward to the inputs), 6 for each trained one, for every token; the head's
    only for the scored tokens, which get logits. Recompute adds 2 for each.
    """
    again = 2 if recompute else 0
    return float(tokens * ((4 + again) * shapes.computed + (6 + again) * trained) + scored * 4 * shapes.head)


def measured_peak(shapes: Shapes, precision: str) -> float:
    """Floating-point operations a second that this process's device reaches on the widest product."""
    return product_flops(MEASURED_ROWS, *shapes.widest, computing_device(), DTYPES[precision])


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

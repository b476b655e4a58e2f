"""The sizes of a model's products, and the memory and operations of a batch that follow from them."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.sharding import layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FP32 = 4.0  # bytes
# Bytes that are kept of each number that a linear layer reads or gives: measured with Llama and Qwen3 on a CPU. With
# bf16 they include the fp32 copies that norms and adapters make.
_KEPT = {"fp32": 4.2, "bf16": 3.9}
# Labels whose logits over the whole vocabulary are in memory at once, where the loss can be computed in parts.
LOGITS_AT_ONCE = 512
# Settings by which a family caps or scales its head's logits, and what stands for neither.
_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_UNCHANGED = (None, 1)
_ENDLESS = 1 << 40  # tokens


class Shapes:
    """What memory and time depend on. A product is of one token with a linear layer, or with an expert's weight for
    each expert that the token is sent to; the head's is apart.

    linear: numbers of the linear layers; rest: of embeddings, norms, head and experts; layer: of the largest decoder
    layer. layers: how many there are. width: of a hidden state. adapted: inputs and outputs of all linear layers. kept:
    of all products; kept_layer: of those of the largest layer. computed: numbers of the weights of all products; head:
    of the head's. plain_head: whether the logits are what it gives, as far as the configuration tells. widest:
    (outputs, inputs) of the widest product. vocabulary: logits of a step. cache: numbers of one token's keys and
    values in each layer, and how many tokens it keeps at most.
    """

    def __init__(self, module: Any) -> None:
        """module: transformers' own, without adapters. In 4 bits, rest and layer are not those of the base."""
        head, config = module.get_output_embeddings(), module.config.get_text_config()
        linears = [sizes(each) for each in module.modules() if is_linear(each) and each is not head]
        products, each_layer = _products(module, config, head), layers(module, whole=True)
        self.linear = sum(map(math.prod, linears))
        self.rest = sum(each.numel() for each in module.parameters()) - self.linear
        self.layer = max(sum(each.numel() for each in layer.parameters()) for layer in each_layer)
        self.layers, self.width, self.vocabulary = len(each_layer), int(config.hidden_size), int(config.vocab_size)
        self.adapted = sum(map(sum, linears))
        self.kept, self.computed = sum(map(sum, products)), sum(map(math.prod, products))
        self.kept_layer = max(sum(map(sum, _products(layer, config, head))) for layer in each_layer)
        self.head = 0 if head is None else math.prod(sizes(head))
        changed = [each for each in _CHANGED_LOGITS if getattr(config, each, None) not in _UNCHANGED]
        self.plain_head = head is not None and not changed
        self.widest = max(products, key=max)
        self.cache = _cache(config)


def _cache(config: Any) -> tuple[tuple[int, int], ...]:
    """Shapes.cache. transformers' static cache says what is kept of each layer; unused, it takes no memory."""
    heads = getattr(config, "num_attention_heads", 0)  # a running state has none
    cached_heads = getattr(config, "num_key_value_heads", None) or heads
    numbers = 2 * cached_heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    kept = [_ENDLESS] * config.num_hidden_layers
    with suppress(KeyError):  # kinds of layers that it does not know
        layers = libraries.transformers().StaticCache(config=config, max_cache_len=_ENDLESS).layers
        kept = [getattr(layer, "max_cache_len", 0) for layer in layers]
    return tuple((numbers, most) for most in kept)


def cache_bytes(shapes: Shapes, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of one row of so many tokens while answers are generated."""
    return dtype.itemsize * sum(numbers * min(tokens, most) for numbers, most in shapes.cache)


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
    linear = [sizes(each) for each in module.modules() if is_linear(each) and each is not head]
    return linear + each_expert * getattr(config, "num_experts_per_tok", 1)


def activation_bytes(shapes: Shapes, precision: str, *, tokens: int, scored: int, recompute: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, with its logits. scored: tokens that get logits; with a
    plain head, not all at once."""
    # What each layer and the last norm read, and all of the layer that is computed again; or all layers.
    states = (DTYPES[precision].itemsize * shapes.layers + _FP32) * shapes.width
    kept = states + _KEPT[precision] * shapes.kept_layer if recompute else _KEPT[precision] * shapes.kept
    # The logits, their log-probabilities and their gradient are fp32.
    at_once = min(scored, LOGITS_AT_ONCE) if shapes.plain_head else scored
    return round(tokens * kept + at_once * _FP32 * 3 * shapes.vocabulary)


def training_flops(shapes: Shapes, *, tokens: int, scored: int, trained: int, recompute: bool) -> float:
    """Floating-point operations of a batch's matrix products, forward and backward. Attention is left out.

    4 for each frozen number (2 forward, 2 backward to the inputs), 6 for each trained one, for every token; the head's
    only for the scored tokens, which get logits; what is computed of it again is left out. Recompute adds 2 for each.
    """
    again = 2 if recompute else 0
    return float(tokens * ((4 + again) * shapes.computed + (6 + again) * trained) + scored * 4 * shapes.head)

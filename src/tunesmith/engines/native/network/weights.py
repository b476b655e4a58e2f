"""Reads a base's safetensors into a Network, for the families that network.py computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.engines.native.network.network import GROUPS, Layer, Network, Rotary, Shape
from tunesmith.engines.native.network.products import PackedLinear
from tunesmith.engines.settings import GEMMAS, NATIVE_FAMILIES, is_native
from tunesmith.engines.weights import read_weights
from tunesmith.models.weight_files import ROTARY_TABLE

# Rotary variants whose angles do not depend on the text's length.
_ROPES = ("default", "linear", "llama3", "yarn")


def load_network(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    weights: Mapping[str, Tensor] | None = None,
) -> Network:
    """The network of a base's folder, ready to run in dtype.

    weights: tensors by the base's names and in its shapes, to use instead of the stored ones. Raises Refused for a
    family or variant that is not supported.
    """
    config = _configuration(folder)
    every = (read_weights(folder) if weights is None else weights).items()
    tensors = {name: tensor.to(dtype) for name, tensor in every if not name.endswith(ROTARY_TABLE)}
    del every  # with the mapped files
    rotation_of = [_rotation_name(config, number) for number in range(config.num_hidden_layers)]
    rotations = list(dict.fromkeys(rotation_of))
    embedding = _copy(tensors, "model.embed_tokens.weight", folder)
    network = Network(
        shape=_shape(config),
        embedding=embedding,
        head=PackedLinear(embedding if config.tie_word_embeddings else _copy(tensors, "lm_head.weight", folder)),
        tied=bool(config.tie_word_embeddings),
        final_norm=_copy(tensors, "model.norm.weight", folder),
        layers=tuple(
            _layer(tensors, number, folder, config, rotations.index(name)) for number, name in enumerate(rotation_of)
        ),
        rotary=tuple(_rotary(config, name) for name in rotations),
    )
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if tensors:
        raise Refused(
            f"the base holds {len(tensors)} tensors that its family {config.model_type} has no place for, "
            f"such as {sorted(tensors)[0]}",
            where=str(folder),
            fix="use an unmodified model of a supported family",
        )
    return network


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    family = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if not is_native(str(family)):
        raise Refused(
            f"models of family {family!r} run in transformers' own modules, which this is not offered for",
            where=str(folder / "config.json"),
            fix=_supported(),
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    wrong = _unsupported(config)
    if wrong is not None:
        raise Refused(f"{wrong} not supported", where=str(folder), fix=_supported())
    return config


def _unsupported(config: Any) -> str | None:
    """What network.py does not compute of a configuration; None if it computes everything."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != ("gelu_pytorch_tanh" if config.model_type in GEMMAS else "silu"):
        return f"activation {activation!r} is"
    if unknown := set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        return f"attention of type {sorted(unknown)[0]!r} is"
    if getattr(config, "mlp_bias", False):
        return "biases in the MLP are"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention to later tokens is"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping:  # transformers ignores it
        return "capped attention scores in this family are"
    return None


def _supported() -> str:
    return f"use a model of one of {', '.join(NATIVE_FAMILIES)}, with its family's own activation and no MLP bias"


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _shape(config: Any) -> Shape:
    gemma = config.model_type in GEMMAS
    capped = config.model_type == "gemma2"
    heads = int(config.num_attention_heads)
    return Shape(
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads),
        head=_head_size(config),
        vocabulary=int(config.vocab_size),
        epsilon=float(config.rms_norm_eps),
        attention_scale=int(getattr(config, "query_pre_attn_scalar", None) or _head_size(config)) ** -0.5,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=config.hidden_size**0.5 if gemma else None,
        gelu=gemma,
        score_cap=config.attn_logit_softcapping if capped else None,
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _rotation_name(config: Any, number: int) -> str:
    """The name of a layer's rotation."""
    if config.model_type == "gemma3_text":
        return str(config.layer_types[number])
    return "none" if config.model_type == "smollm3" and not config.no_rope_layers[number] else "all"


def _rotary(config: Any, name: str) -> Rotary:
    """The rotation of this name."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if name == "none":  # angles of zero, which are exact: x * 1 - y * 0
        return Rotary(torch.zeros(_head_size(config) // 2), 1.0)
    of = {} if name == "all" else {"layer_type": name}
    parameters = config.rope_parameters[name] if of else config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in _ROPES:
        raise Refused(f"rotary positions of type {kind!r} are not supported", where="config.json", fix=_supported())
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **of)
        return Rotary(frequencies, float(scale))
    size = _head_size(config)
    steps = torch.arange(0, size, 2, dtype=torch.float) / size
    return Rotary(1.0 / (float(parameters["rope_theta"]) ** steps), 1.0)


def _window(config: Any, number: int) -> int | None:
    """Number of places that a layer's tokens see; None if they see the whole context."""
    kinds = getattr(config, "layer_types", None)
    slides = config.model_type == "mistral" if kinds is None else kinds[number] == "sliding_attention"
    size = getattr(config, "sliding_window", None) if slides else None
    return None if size is None or size >= config.max_position_embeddings else int(size)


def _take(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise Refused(f"the base has no tensor {name}", where=str(folder), fix="use a complete model")
    return tensors.pop(name)


def _copy(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    """A copy of a tensor. A tensor that was read is part of the mapped file, which stays in memory while any is used.

    The layers' matrices need no copy here, since PackedLinear copies them.
    """
    return _take(tensors, name, folder).clone()


def norm_names(*, after: bool) -> dict[str, str]:
    """Field of a Layer -> the name of its tensor. Only some models have norms of each head's query and key.

    after: whether the family has norms of the sub-layers' outputs. Such a family uses `post_attention_layernorm` for
    the attention's output; others use that name for the norm of the MLP's input.
    """
    heads = {f"{each}_norm": f"self_attn.{each}_norm.weight" for each in ("q", "k")}
    attention = {"attention_norm": "input_layernorm.weight"}
    if not after:
        return attention | {"mlp_norm": "post_attention_layernorm.weight"} | heads
    return attention | {
        "after_attention": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "after_mlp": "post_feedforward_layernorm.weight",
        **heads,
    }


def _layer(tensors: dict[str, Tensor], number: int, folder: Path, config: Any, rotary: int) -> Layer:
    prefix = f"model.layers.{number}."
    linear: dict[str, PackedLinear] = {}
    for group, parts in GROUPS.items():
        weights = [_take(tensors, f"{prefix}{part}.weight", folder) for part in parts]
        biased = all(f"{prefix}{part}.bias" in tensors for part in parts)
        bias = torch.cat([_take(tensors, f"{prefix}{part}.bias", folder) for part in parts]) if biased else None
        linear[group] = PackedLinear(torch.cat(weights), bias)
    names = norm_names(after=config.model_type in ("gemma2", "gemma3_text"))
    norms = {
        field: _copy(tensors, prefix + name, folder)
        for field, name in names.items()
        if field not in ("q_norm", "k_norm") or prefix + name in tensors
    }
    return Layer(linear=linear, **norms, rotary=rotary, window=_window(config, number))

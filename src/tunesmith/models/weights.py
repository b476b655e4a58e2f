"""Reading a base's safetensors into a Network, for the families whose arithmetic network.py knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.models.network import GROUPS, Layer, Network, Shape
from tunesmith.models.products import Frozen

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary variants whose angles do not depend on the length of the text.
_ROPES = ("default", "linear", "llama3", "yarn")


def load_network(
    folder: Path, dtype: torch.dtype = torch.bfloat16, weights: Mapping[str, Tensor] | None = None
) -> Network:
    """The frozen weights of a base's folder, or others by the same names in its shape. Raises Refused for a family or
    variant that is not supported."""
    config = _configuration(folder)
    tensors = read_weights(folder, dtype) if weights is None else {name: w.to(dtype) for name, w in weights.items()}
    heads = int(config.num_attention_heads)
    shape = Shape(
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads),
        head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=int(config.vocab_size),
        epsilon=float(config.rms_norm_eps),
        attention_scale=int(getattr(config, "head_dim", None) or config.hidden_size // heads) ** -0.5,
    )
    frequencies, scale = _rope(config)
    embedding = _take(tensors, "model.embed_tokens.weight", folder)
    network = Network(
        shape=shape,
        embedding=embedding,
        head=Frozen(embedding if config.tie_word_embeddings else _take(tensors, "lm_head.weight", folder)),
        tied=bool(config.tie_word_embeddings),
        final_norm=_take(tensors, "model.norm.weight", folder),
        layers=tuple(_layer(tensors, number, folder) for number in range(shape.layers)),
        inverse_frequencies=frequencies,
        rope_scale=scale,
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
    if family not in FAMILIES:
        raise Refused(
            f"models of family {family!r} are not supported", where=str(folder / "config.json"), fix=_supported()
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.hidden_act != "silu":
        raise Refused(f"activation {config.hidden_act!r} is not supported", where=str(folder), fix=_supported())
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if windows or (config.model_type == "mistral" and config.sliding_window):
        raise Refused("sliding-window attention is not supported", where=str(folder), fix=_supported())
    if getattr(config, "mlp_bias", False):
        raise Refused("biases in the MLP are not supported", where=str(folder), fix=_supported())
    return config


def _supported() -> str:
    return f"use a model of one of {', '.join(FAMILIES)}, with silu, full attention and no MLP bias"


def _rope(config: Any) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in _ROPES:
        raise Refused(f"rotary positions of type {kind!r} are not supported", where="config.json", fix=_supported())
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies, float(scale)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    steps = torch.arange(0, size, 2, dtype=torch.float) / size
    return 1.0 / (float(parameters["rope_theta"]) ** steps), 1.0


def read_weights(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a base's folder by name, in dtype or as it is stored."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = shard.get_tensor(name).to(dtype)
    return tensors


def _take(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise Refused(f"the base has no tensor {name}", where=str(folder), fix="use a complete model")
    return tensors.pop(name)


def _layer(tensors: dict[str, Tensor], number: int, folder: Path) -> Layer:
    prefix = f"model.layers.{number}."
    linear = {}
    for group, parts in GROUPS.items():
        weight = torch.cat([_take(tensors, f"{prefix}{part}.weight", folder) for part in parts])
        biased = all(f"{prefix}{part}.bias" in tensors for part in parts)
        bias = torch.cat([_take(tensors, f"{prefix}{part}.bias", folder) for part in parts]) if biased else None
        linear[group] = Frozen(weight, bias)
    return Layer(
        linear=linear,
        attention_norm=_take(tensors, f"{prefix}input_layernorm.weight", folder),
        mlp_norm=_take(tensors, f"{prefix}post_attention_layernorm.weight", folder),
        q_norm=tensors.pop(f"{prefix}self_attn.q_norm.weight", None),
        k_norm=tensors.pop(f"{prefix}self_attn.k_norm.weight", None),
    )

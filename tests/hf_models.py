"""Tiny random models of families that the hf engine runs, with the tests' tokenizer and template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import TEMPLATE, write_model, write_random
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.models.base import Base, resolve_base
from tunesmith.store.store import Store

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
# With the families' own dropout, which training and answering must switch off.
FAMILIES: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "gpt2": lambda **k: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **k),
    "gpt_neox": lambda **k: transformers.GPTNeoXConfig(hidden_dropout=0.1, attention_dropout=0.1, **_SIZES, **k),
    "opt": lambda **k: transformers.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=16,  # with projections around the layers
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        **k,
    ),
    "falcon": lambda **k: transformers.FalconConfig(**_SIZES, alibi=True, **k),
    "phi3": lambda **k: transformers.Phi3Config(**_SIZES, **k),
    "stablelm": lambda **k: transformers.StableLmConfig(num_key_value_heads=2, **_SIZES, **k),
    "olmo2": lambda **k: transformers.Olmo2Config(**_SIZES, **k),
    "granite": lambda **k: transformers.GraniteConfig(**_SIZES, logits_scaling=3.0, **k),
    "cohere": lambda **k: transformers.CohereConfig(**_SIZES, logit_scale=0.3, **k),
    "mamba": lambda **k: transformers.MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=2, max_position_embeddings=256, **k
    ),
    # Families of 2026 (LFM2.5 has LFM2's class, Granite 4 the third): layers with a running state or a window.
    "qwen3_5_text": lambda **k: transformers.Qwen3_5TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **_SIZES,
        **k,
    ),
    "lfm2": lambda **k: transformers.Lfm2Config(
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, **_SIZES, **k
    ),
    "granitemoehybrid": lambda **k: transformers.GraniteMoeHybridConfig(
        num_key_value_heads=2,
        num_local_experts=0,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        logits_scaling=3.0,
        **_SIZES,
        **k,
    ),
    "gemma4_text": lambda **k: transformers.Gemma4TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=k["vocab_size"],
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        **_SIZES,
        **k,
    ),
    # Mixtures of experts, which transformers keeps in fused parameters.
    "mixtral": lambda **k: transformers.MixtralConfig(
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8, **_SIZES, **k
    ),
    "qwen3_moe": lambda **k: transformers.Qwen3MoeConfig(
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        head_dim=8,
        mlp_only_layers=[0],
        **_SIZES,
        **k,
    ),
    "bert": lambda **k: transformers.BertConfig(**_SIZES, **k),  # its tokens see later ones
}


OF_2026 = ("qwen3_5_text", "lfm2", "granitemoehybrid", "gemma4_text")


def write_hf_model(folder: Path, family: str = "gpt2", seed: int = 0, template: str = TEMPLATE) -> Path:
    """A folder with random fp32 weights, tokenizer and template; returns it."""
    return write_random(folder, FAMILIES[family], seed, template)


def base_of_family(folder: Path, family: str, **options: Any) -> Base:
    """A base of one of these families, or of those of tiny.py, in a folder of its name; the store is beside it."""
    write = write_hf_model if family in FAMILIES else write_model
    return resolve_base(Store(folder / "store"), str(write(folder / family, family, **options)), folder)


@torch.no_grad()
def change_adapter(trainable: HFTrainable, *, seed: int = 0, std: float = 0.1) -> None:
    """Give an adapter random B, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in trainable.parameter_groups()[1].tensors:
        tensor.normal_(std=std, generator=generator)

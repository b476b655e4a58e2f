"""Writes a Llama with random weights, a byte tokenizer and a chat template: a base for checks that download nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.digests import digest_of
from tunesmith.models.base import INDEX, Base

if TYPE_CHECKING:
    import torch

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
# Sizes of configurations. 1B and 8B are those of Llama 3.2 1B and Llama 3.1 8B. Every engine computes the heads and the
# vocabulary of tiny; its weights are so large that its answers depend on what it reads.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 320, "max_position_embeddings": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    },
    "1B": {
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def random_base(folder: Path, shape: str) -> Base:
    """A base of one of SHAPES in a folder, with all of its files but the weights, which write_weights adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    vocabulary = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), (*_SPECIAL, _SPECIAL[1]), strict=True))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return Base(
        digest=digest_of({"random": dict(SHAPES[shape])}),  # of gigabytes of random numbers it would say no more
        folder=folder,
        spec=f"random Llama, {shape}",
        family="llama",
        context_length=config.max_position_embeddings,
        fingerprint=digest_of(_TEMPLATE),
    )


def write_weights(base: Base, device: torch.device) -> None:
    """Add random bf16 weights to a folder of random_base, a file for each layer, unless they are there. device: draws
    the numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if (base.folder / INDEX).is_file():
        return
    config = LlamaConfig.from_pretrained(base.folder)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    generator = torch.Generator(device).manual_seed(0)
    groups: dict[str, list[str]] = {}
    for name in parameters:
        groups.setdefault(name.split(".layers.")[-1].split(".")[0] if ".layers." in name else "rest", []).append(name)
    places: dict[str, str] = {}
    for group, names in groups.items():
        tensors, file = {}, f"model-{group}.safetensors"
        for name in names:
            tensor = torch.ones(parameters[name].shape, dtype=torch.bfloat16, device=device)
            if tensor.dim() > 1:  # norms stay at one
                tensor.normal_(std=config.initializer_range, generator=generator)
            tensors[name] = tensor.cpu()
        save_file(tensors, base.folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(2 * each.numel() for each in parameters.values())
    (base.folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))

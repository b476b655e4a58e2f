"""Writes a small Llama with random weights, a byte tokenizer and a chat template: a base for checks that download
nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.core.digests import digest_of
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.models.base import Base

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")
# Every engine computes these heads and this vocabulary; the weights are so large that answers depend on what is read.
_SHAPE: JsonObject = {
    "vocab_size": 320, "max_position_embeddings": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
    "tie_word_embeddings": False, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def random_llama(folder: Path) -> Base:
    """Write the base into an existing folder. Its weights are the same every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_SHAPE)).save_pretrained(folder)
    return Base(
        digest=digest_of({"random": _SHAPE}),
        folder=folder,
        spec="random Llama",
        family="llama",
        context_length=_SHAPE["max_position_embeddings"],
        fingerprint=digest_of(_TEMPLATE),
    )

"""Writes a merged model as one GGUF file for llama.cpp, with tokenizer and chat template.

Keys and tensor names come from llama.cpp's `gguf` package. Each family's layout follows llama.cpp's
convert_hf_to_gguf.py. Error messages for unsupported models refer to that script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.models.base import Base, read_json
from tunesmith.models.export.merging import DTYPES, merged_shards
from tunesmith.models.weight_files import ROTARY_TABLE
from tunesmith.records.version import Dtype

FILE = "model.gguf"
# A family's architecture in GGUF. Mistral's is Llama's.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ELSEWHERE = "export it as merged and run llama.cpp's convert_hf_to_gguf.py on that folder, which knows more models"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level tokenizer splits text before merging -> llama.cpp's name for it.
_CUTS: Mapping[str, str] = {
    "ByteLevel": "gpt-2",
    "Digits,ByteLevel": "smollm",
    rf"{_WORDS}\p{{N}}{_REST},bytes": "qwen2",
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST},bytes": "llama-bpe",
}


def write_gguf(base: Base, adapter: Path, target: Path, dtype: Dtype, name: str, *, template: bool = True) -> None:
    """Write model.gguf into target: the base with the adapter merged. The same inputs give the same bytes.

    dtype: of matrices; norms and biases are fp32. name: the model's name in the file. template: whether the file
    holds the chat template. Raises Refused for a family, rotary variant or tokenizer that is not supported.
    """
    import gguf

    config: JsonObject = read_json(base.folder / "config.json")
    architecture = check_supported(base.folder)
    writer = gguf.GGUFWriter(target / FILE, architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.ALL_F32)
        _add_sizes(writer, config)
        _add_tokenizer(writer, base.folder, int(config["vocab_size"]), template)
        for key, tensor in _tensors(base, adapter, config, architecture):
            kind = torch.float32 if tensor.ndim == 1 else DTYPES[dtype]
            raw = None if kind == torch.float32 else gguf.GGMLQuantizationType.BF16
            rounded = tensor if raw is None else tensor.to(kind).view(torch.uint8)
            writer.add_tensor(key, rounded.numpy(), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_supported(base: Path) -> str:
    """GGUF's name for the base's architecture. Raises Refused if write_gguf does not support the base."""
    config = read_json(base / "config.json")
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        raise _refusal(base, f"models of family {family!r} are not written as GGUF")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    positions = scaling.get("rope_type", scaling.get("type", "default"))  # older configurations say type
    if positions != "default":
        raise _refusal(base, f"rotary positions of type {positions!r} are not written as GGUF")
    slides = family == "mistral" or config.get("use_sliding_window")
    if (
        slides
        and (config.get("sliding_window") or config["max_position_embeddings"]) < config["max_position_embeddings"]
    ):
        raise _refusal(base, "sliding windows shorter than the context are not written as GGUF")
    _cut(base)
    return _ARCHITECTURES[family]


def _add_sizes(writer: Any, config: Fields) -> None:
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))


def _add_tokenizer(writer: Any, base: Path, vocabulary: int, with_template: bool) -> None:
    import gguf

    tokenizer = read_json(base / "tokenizer.json")
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(base))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(base, load_merges=True, n_vocab=vocabulary)
    # The template writes every control token. A BOS token that a runtime adds before it would break the prompt.
    special.add_special_token = {"bos": False, "eos": False}
    if with_template and (template := base / "chat_template.jinja").is_file():
        special.chat_template = template.read_text(encoding="utf-8")
    special.add_to_gguf(writer, quiet=True)


def _cut(base: Path) -> str:
    """llama.cpp's name for how the tokenizer splits text. Raises Refused for one that is not known to match."""
    tokenizer = read_json(base / "tokenizer.json")
    model, steps = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refusal(base, "only byte-level BPE tokenizers are written as GGUF, not this one")
    steps = steps.get("pretokenizers", [steps])
    name = _CUTS.get(",".join(_step(step) for step in steps))
    if name is None:
        raise _refusal(base, "llama.cpp's name for how this tokenizer splits text is not known here")
    return name


def _step(step: Fields) -> str:
    match step.get("type"):
        case "ByteLevel":
            return "ByteLevel" if step.get("use_regex", True) else "bytes"
        case "Digits" if step.get("individual_digits"):
            return "Digits"
        case "Split":
            return str(step["pattern"].get("Regex"))
        case other:
            return f"unknown {other}"


def _tensors(base: Base, adapter: Path, config: Fields, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors. The head of a tied model and the rotary tables of old checkpoints are left out."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"])
    groups = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
    for _, tensors in merged_shards(base, adapter):
        for name, tensor in sorted(tensors.items()):
            if name.endswith(ROTARY_TABLE) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            key = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if key is None:
                raise _refusal(base.folder, f"there is no GGUF tensor for {name}")
            part = name.split(".")[-2]
            if architecture == "llama" and part in groups:
                tensor = _interleaved(tensor, groups[part])
            yield key, tensor.contiguous()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] in the order of llama.cpp's rotation for this architecture.

    It rotates neighbouring numbers, as the original Llama does; transformers rotates the two halves of a head.
    """
    interleaved: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return interleaved


def _refusal(base: Path, what: str) -> Refused:
    return Refused(what, where=str(base), fix=_ELSEWHERE)

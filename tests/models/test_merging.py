"""Folding an adapter in, against PEFT's merge_and_unload and transformers' forward, family by family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tests.tiny import FAMILIES, write_model
from tests.trained import base_of
from tunesmith.core.errors import Refused
from tunesmith.models.export.gguf import FILE, check_supported, write_gguf
from tunesmith.models.export.merging import write_merged
from tunesmith.models.weight_files import AdapterConfig, save_adapter_file

IDS = torch.randint(0, 290, (2, 19), generator=torch.Generator().manual_seed(0))
NOT_AS_GGUF = {
    "llama-rope3": "rotary",
    "mistral-window": "sliding windows",
    "qwen2-window": "sliding windows",
    "smollm3": "family 'smollm3'",
    "gemma": "family 'gemma'",
    "gemma2": "family 'gemma2'",
    "gemma3": "family 'gemma3_text'",
}
KINDS = {"llama": {"use_dora": True}, "qwen2": {"use_dora": True}, "gemma2": {"use_rslora": True}}  # else plain LoRA


def _adapter(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """A random adapter written by PEFT; returns the logits [2, 19, V] of PEFT's own merge."""
    torch.manual_seed(1)
    kind = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(r=4, lora_alpha=12, **kind)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # at its start it is the rows' own length, and DoRA changes nothing
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    _bind(base, folder)
    with torch.no_grad():
        return model.merge_and_unload().eval()(IDS).logits


def _bind(base: Path, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write PEFT's adapter again as training does, bound to the base. tensors: in place of its own."""
    stated, of = json.loads((folder / "adapter_config.json").read_text()), base_of(base)
    tensors = load_file(folder / "adapter_model.safetensors") if tensors is None else tensors
    names = {"rank": "r", "alpha": "lora_alpha", "root": "use_rslora", "dora": "use_dora", "targets": "target_modules"}
    config = {name: stated[theirs] for name, theirs in names.items()}
    config["targets"] = frozenset(config["targets"])
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    save_adapter_file(folder, AdapterConfig(**config), arrays, base=of.digest, fingerprint=of.fingerprint)


def _merged(base: Path, adapter: Path, name: str, dtype: str = "fp32") -> Path:
    """A folder beside the adapter's, with the merged model."""
    folder = adapter.with_name(name)
    folder.mkdir(exist_ok=True)
    write_merged(base_of(base), adapter, folder, dtype)  # type: ignore[arg-type]
    return folder


def _logits(folder: Path, **how: object) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()(IDS).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merged_weights_equal_those_of_peft(family: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "b", family)
    expected = _adapter(base, tmp_path / "a", **KINDS.get(family, {}))
    assert torch.allclose(_logits(_merged(base, tmp_path / "a", "m")), expected, atol=1e-5)
    assert not torch.allclose(_logits(base), expected, atol=1e-2), "an adapter that changes nothing shows nothing"
    if family in NOT_AS_GGUF:
        with pytest.raises(Refused, match=rf"{NOT_AS_GGUF[family]}(.|\n)*convert_hf_to_gguf.py"):
            write_gguf(base_of(base), tmp_path / "a", tmp_path / "g", "fp32", "n")


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_a_merged_folder_is_complete(family: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "b", family)
    _adapter(base, tmp_path / "a")
    merged, again = (_merged(base, tmp_path / "a", name, "bf16") for name in ("m", "again"))
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()}
    for path in merged.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) is not tied
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.embed_tokens.weight.bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, rounded), "embeddings are never adapted"


def test_a_sharded_base_stays_sharded(tmp_path: Path) -> None:
    base = write_model(tmp_path / "b")
    expected = _adapter(base, tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="40KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, base / "consolidated.safetensors")
    tool_use = base / "additional_chat_templates" / "tool_use.jinja"
    tool_use.parent.mkdir()
    tool_use.write_text("{{ tools }}")
    _bind(base, tmp_path / "a")  # these files are another base
    merged = _merged(base, tmp_path / "a", "m")
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    assert (merged / "additional_chat_templates" / "tool_use.jinja").read_bytes() == tool_use.read_bytes()
    assert torch.allclose(_logits(merged), expected, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "b")
    _adapter(base, tmp_path / "a")
    whole = load_file(tmp_path / "a" / "adapter_model.safetensors")
    first = sorted(whole)[0]
    for tensors, said in (
        (
            {key: value for key, value in whole.items() if key != first},
            r"has lora_B.weight, expected lora_A.weight, lor",
        ),
        ({key.replace("layers.2.", "layers.3."): value for key, value in whole.items()}, "has no weight"),
        ({key: value[:, :-1].contiguous() if "lora_A" in key else value for key, value in whole.items()}, "not fit"),
        ({**whole, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "not a LoRA tensor"),
    ):
        _bind(base, tmp_path / "a", tensors)
        with pytest.raises(Refused, match=said):
            _merged(base, tmp_path / "a", "m")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "fp32") for family in sorted(FAMILIES.keys() - NOT_AS_GGUF.keys())), ("llama-untied", "bf16")],
)
def test_a_gguf_can_be_read_by_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "b", family)
    whole = load_file(base / "model.safetensors")
    if dtype == "bf16":  # rotary tables of old checkpoints are left out
        tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
        save_file({**whole, **tables}, base / "model.safetensors", metadata={"format": "pt"})
    expected = _adapter(base, tmp_path / "a")
    for name in ("g", "again"):
        (tmp_path / name).mkdir()
        write_gguf(base_of(base), tmp_path / "a", tmp_path / name, dtype, "n")  # type: ignore[arg-type]
    assert (tmp_path / "g" / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()
    assert len(GGUFReader(tmp_path / "g" / FILE).tensors) == len(whole)
    config = AutoConfig.from_pretrained(tmp_path / "g", gguf_file=FILE)
    config.head_dim = 8  # transformers does not read it for every architecture
    how = {"gguf_file": FILE, "config": config, "quantization_config": GgufConfig(gguf_file=FILE, dequantize=True)}
    found = _logits(tmp_path / "g", **how)
    if dtype == "fp32":
        assert torch.allclose(found, expected, atol=1e-5)
    else:
        merged = _logits(_merged(base, tmp_path / "a", "m", "bf16"))
        assert (found - expected).abs().max() < 2 * (merged - expected).abs().max(), "rounding, no more"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "g", gguf_file=FILE)
    ours = AutoTokenizer.from_pretrained(base)
    assert theirs.get_vocab().items() >= ours.get_vocab().items()  # transformers may add an unknown token of its own
    assert theirs.chat_template == ours.chat_template
    text = "<|im_start|>user\nturn on 12 kitchen lights, é!<|im_end|>\n"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "type 'yarn'"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, "splits text"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "byte-level BPE"),
    ],
)
def test_what_gguf_does_not_support(file: str, change: dict[str, object], match: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "b")
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **change}))
    with pytest.raises(Refused, match=match):
        check_supported(base)

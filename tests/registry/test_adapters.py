"""What an adapter must not be, whoever made it."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.fabricate import FINGERPRINT, RANK, WIDTH, adapter_config, adapter_tensors, encode
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, AdapterFile, read_adapter_file

BASE = digest_bytes(b"base")
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def write(folder: Path, config: object | None = None, weights: bytes | None = None) -> Path:
    (folder / CONFIG_FILE).write_text(json.dumps(adapter_config(BASE) if config is None else config))
    (folder / ADAPTER_FILE).write_bytes(encode(adapter_tensors(), BASE) if weights is None else weights)
    return folder


def check(folder: Path) -> AdapterFile:
    return read_adapter_file(folder, base=BASE, fingerprint=FINGERPRINT)


def test_what_training_writes_is_taken(tmp_path: Path) -> None:
    found = check(write(tmp_path))
    config = found.config
    assert (config.rank, config.targets, config.layers) == (RANK, {"q_proj", "v_proj"}, None)
    assert found.tensors.keys() == adapter_tensors().keys()
    assert found.parameters == 6 * RANK * WIDTH


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
        {"base_model_name_or_path": None},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"peft_type": "PREFIX_TUNING"},
        {"task_type": "SEQ_CLS"},
        {"use_dora": True},
        {"use_rslora": "yes"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 9], "layers_pattern": "layers"},
        {"layers_to_transform": ["0"], "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        {"r": 0},
        {"r": float(RANK)},
        {"r": True},
        {"lora_alpha": 0},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
    ],
    ids=str,
)
def test_a_configuration_that_says_anything_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        check(write(tmp_path, adapter_config(BASE, **change)))


@pytest.mark.parametrize("key", adapter_config(BASE))
def test_a_configuration_without_one_of_its_keys_is_refused(tmp_path: Path, key: str) -> None:
    config = adapter_config(BASE)
    del config[key]
    with pytest.raises(Refused, match=key):
        check(write(tmp_path, config))


@pytest.mark.parametrize("raw", [b"[]", b"{", b"[" * 100_000, b" " * 70_000, b'{"r": 4, "r": 8}'])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(raw)
    with pytest.raises(Refused):
        check(tmp_path)


def header(tensors: dict[str, Any], data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file out of a header of our choosing."""
    encoded = json.dumps(tensors).encode()
    return struct.pack("<Q", len(encoded) if size is None else size) + encoded + data


F32 = {"dtype": "F32", "shape": [1, 1]}
META = {"__metadata__": {"tunesmith": json.dumps({"base": BASE, "fingerprint": FINGERPRINT})}}


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        pickle.dumps({"lora_A": [1.0]}),
        b"PK\x03\x04 a zip, as torch.save writes",
        header({}, size=2**63),
        header({}, size=10**9),
        header({"a": {**F32, "data_offsets": [0, 4]}}, b"\0" * 3),
        header({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [2, 6]}}, b"\0" * 6),
        header({"a": {**F32, "data_offsets": [4, 0]}}, b"\0" * 4),
        header({"a": {**F32, "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {**F32, "data_offsets": [0, 4]}}, b"\0" * 9),
        header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({**META}),
    ],
)
def test_a_file_that_is_not_safetensors_or_lies_is_refused(tmp_path: Path, weights: bytes) -> None:
    with pytest.raises(Refused) as caught:
        check(write(tmp_path, weights=weights))
    assert str(caught.value.where).endswith(ADAPTER_FILE)


def change_tensors(**changes: np.ndarray | None) -> bytes:
    tensors: dict[str, Any] = {**adapter_tensors(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return encode({name: value for name, value in tensors.items() if value is not None}, BASE)


A = f"{FIRST}.lora_A.weight".replace(".", "__")
B = f"{FIRST}.lora_B.weight".replace(".", "__")
BF16 = {f"{FIRST}.lora_A.weight": {"dtype": "BF16", "shape": [RANK, WIDTH], "data_offsets": [0, 2 * RANK * WIDTH]}}


def _untrained_pissa() -> dict[str, np.ndarray]:
    """Halves as they are released before a first step: A - A0 = 0 over A0, B beside B - B0 = 0."""
    half, found = RANK // 2, {}
    for name, tensor in adapter_tensors().items():
        own = np.ones_like(tensor) / 3
        if "lora_B" in name:
            own[:, half:] = 0
        else:
            own[:half] = 0
        found[name] = own
    return found


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (change_tensors(**{A: np.full((RANK, WIDTH), np.nan, np.float32)}), "NaN"),
        (change_tensors(**{B: np.full((WIDTH, RANK), np.inf, np.float32)}), "NaN or an infinity"),
        (change_tensors(**{A: np.ones((RANK, WIDTH), np.float16)}), "F16"),
        (change_tensors(**{A: np.ones((RANK, WIDTH), np.float64)}), "F64"),
        (header({**META, **BF16}, b"\0" * (2 * RANK * WIDTH)), "BF16"),
        (change_tensors(**{A: np.ones((RANK + 1, WIDTH), np.float32)}), "rank"),
        (change_tensors(**{B: np.ones((WIDTH, RANK + 1), np.float32)}), "rank"),
        (change_tensors(**{A: np.ones((RANK,), np.float32)}), "2 dimensions"),
        (change_tensors(**{A: np.ones((RANK, 0), np.float32)}), "2 dimensions"),
        (change_tensors(**{A: None}), "expected lora_A.weight"),
        (change_tensors(lm_head__weight=np.ones((2, 2), np.float32)), "not a LoRA tensor"),
        (change_tensors(**{A.replace("q_proj", "o_proj"): np.ones((RANK, WIDTH), np.float32)}), "not a LoRA tensor"),
        (encode(_untrained_pissa(), BASE), "changes nothing"),
        (encode({n: t * 0 if "lora_B" in n else t for n, t in adapter_tensors().items()}, BASE), "changes nothing"),
        (encode(adapter_tensors(), digest_bytes(b"another base")), "another base"),
        (encode(adapter_tensors(), BASE, digest_bytes(b"another template")), "another tokenizer"),
        (save(adapter_tensors()), "does not say which base"),
        (save(adapter_tensors(), metadata={**META["__metadata__"], "auto_map": "x"}), "unknown key"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        check(write(tmp_path, weights=weights))

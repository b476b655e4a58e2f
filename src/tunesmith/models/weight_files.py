"""Reads, checks and writes the files of trained weights: an adapter in PEFT's layout, or all weights of a model.

This is the only module that reads these files. Registration, verification and every engine use it, so that each of
them refuses the same files. It needs neither torch nor PEFT. The safetensors library parses the files; it refuses
headers that state wrong sizes or offsets. Whether the shapes fit the base's layers is checked by the engines, which
know those layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import JsonObject, parse_json

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"
# Names of two tensors in MODEL_FILE. A model that uses its embedding as head as well stores only the embedding.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How the names of tensors end that old checkpoints store in each layer and no model reads: they follow from the
# configuration.
ROTARY_TABLE = "rotary_emb.inv_freq"

_MAX_CONFIG_BYTES = 64 * 1024
_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")
_ADAPTER_TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>[A-Za-z0-9_.]{1,200})\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector)"
)
# Which of these a base has is checked by the engines, which know its files.
_MODEL_TENSOR = re.compile(r"(?!.*lora_)[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}")
# For each dtype of model weights: an unsigned integer of the same size, and the exponent's bits, which are all set in
# NaN and infinity only.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}

# Every key that adapter_config.json must have, with a check of its value. No other key is allowed: PEFT knows some that
# name Python modules to import (auto_mapping), layers to replace (modules_to_save) or another base (revision).
_CONFIG: Mapping[str, Callable[[Any], bool]] = {
    "base_model_name_or_path": lambda value: isinstance(value, str),
    "bias": lambda value: value == "none",
    "fan_in_fan_out": lambda value: value is False,
    "inference_mode": lambda value: isinstance(value, bool),
    "lora_alpha": lambda value: _is_number(value) and value > 0,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "peft_type": lambda value: value == "LORA",
    "r": lambda value: type(value) is int and 1 <= value <= 1024,
    "target_modules": lambda value: _are_modules(value),
    "task_type": lambda value: value == "CAUSAL_LM",
    "use_dora": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
}
# Both of these keys are required as well if the adapter changes only some of the base's layers.
_SOME_LAYERS: Mapping[str, Callable[[Any], bool]] = {
    "layers_to_transform": lambda value: (
        isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n < 1024 for n in value)
    ),
    "layers_pattern": lambda value: isinstance(value, str) and _MODULE.fullmatch(value) is not None,
}
# The only key of a weight file's metadata: which base the weights were trained on, as canonical JSON.
_BINDING = "tunesmith"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How an adapter changes a base. root: the scale is alpha / sqrt(rank) instead of alpha / rank (rsLoRA).

    targets: last names of the adapted layers, such as q_proj. layers: numbers of the adapted decoder layers, which lie
    in the module list called layers_pattern; None if all are adapted.
    """

    rank: int
    alpha: float
    targets: frozenset[str]
    root: bool = False
    dora: bool = False
    layers: tuple[int, ...] | None = None
    layers_pattern: str = "layers"

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    def of_twice_the_rank(self) -> AdapterConfig:
        """The configuration of an adapter of twice the rank and the same scale."""
        return replace(self, rank=2 * self.rank, alpha=self.alpha * (math.sqrt(2) if self.root else 2))


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A checked LoRA adapter. tensors: float32 arrays by PEFT's names: A [rank, in], B [out, rank] and, with DoRA, the
    magnitude [out] of each adapted layer."""

    config: AdapterConfig
    tensors: Mapping[str, np.ndarray]

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(tensor.size for tensor in self.tensors.values())


def has_whole_model(folder: Path) -> bool:
    """Whether a training's folder holds all weights of a model instead of an adapter."""
    return (folder / MODEL_FILE).is_file()


def read_adapter_file(folder: Path, *, base: str, fingerprint: str) -> AdapterFile:
    """Read and check adapter_config.json and adapter_model.safetensors in folder.

    base: digest of the base's record. fingerprint: of the base's tokenizer and chat template. Raises Refused for
    unknown keys, another base, files that are not safetensors, dtypes other than float32, NaN, infinities, ranks and
    layers that differ from the configured ones, incomplete layers, and adapters that change nothing.
    """
    config = _read_config(folder / CONFIG_FILE)
    if config["base_model_name_or_path"] != base:
        raise refusal(
            folder / CONFIG_FILE,
            f"the adapter was trained on another base: {config['base_model_name_or_path'][:80]!r}, not {base}",
        )
    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            _check_binding(path, file.metadata() or {}, base, fingerprint)
            tensors = {name: _read_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise refusal(path, f"not readable as safetensors: {error}") from error
    adapter = AdapterConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=frozenset(config["target_modules"]),
        root=config["use_rslora"],
        dora=config["use_dora"],
        layers=tuple(config["layers_to_transform"]) if "layers_to_transform" in config else None,
        layers_pattern=config.get("layers_pattern", "layers"),
    )
    _check_layers(path, adapter, tensors)
    return AdapterFile(config=adapter, tensors=tensors)


def save_adapter_file(
    folder: Path, adapter: AdapterConfig, tensors: Mapping[str, np.ndarray], *, base: str, fingerprint: str
) -> None:
    """Write both files of an adapter into an existing folder. tensors: see AdapterFile."""
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.dora,
        "use_rslora": adapter.root,
    }
    if adapter.layers is not None:
        config |= {"layers_to_transform": list(adapter.layers), "layers_pattern": adapter.layers_pattern}
    ordered = {name: tensors[name] for name in sorted(tensors)}
    save_file(ordered, folder / ADAPTER_FILE, metadata=binding(base, fingerprint))
    (folder / CONFIG_FILE).write_bytes(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def binding(base: str, fingerprint: str) -> dict[str, str]:
    """Metadata for a weight file, which binds it to the base that it was trained on.

    It has one key only: safetensors writes several keys in an order that changes from call to call, and then the bytes
    of the file would change too.
    """
    return {_BINDING: canonical({"base": base, "fingerprint": fingerprint}).decode()}


def check_model_file(folder: Path, *, base: str, fingerprint: str) -> None:
    """Check model.safetensors in folder, the weights of a model trained in full.

    Raises Refused for another base, tensors that such a model does not have, other dtypes, NaN and infinities.
    """
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="numpy") as file:  # refuses headers that state wrong sizes or offsets
            _check_binding(path, file.metadata() or {}, base, fingerprint)
            if not list(file.keys()):
                raise refusal(path, "the file holds no tensor")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name in sorted(header.keys() - {"__metadata__"}):
            _check_model_tensor(path, name, header[name], data)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise refusal(path, f"not readable as safetensors: {error}") from error


def _read_config(path: Path) -> JsonObject:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise refusal(path, f"larger than {_MAX_CONFIG_BYTES} bytes")
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise refusal(path, f"not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise refusal(path, "not a JSON object")
    expected = _CONFIG if config.keys().isdisjoint(_SOME_LAYERS) else {**_CONFIG, **_SOME_LAYERS}
    unknown, missing = sorted(config.keys() - expected.keys()), sorted(expected.keys() - config.keys())
    if unknown:
        raise refusal(path, f"an adapter may not have the key {unknown[0][:80]!r}")
    if missing:
        raise refusal(path, f"the key {missing[0]!r} is missing")
    for key, allowed in expected.items():
        if not allowed(config[key]):
            raise refusal(path, f"{key} may not be {str(config[key])[:80]!r}")
    return config


def _check_binding(path: Path, metadata: Mapping[str, str], base: str, fingerprint: str) -> None:
    unknown = sorted(metadata.keys() - {_BINDING})
    if unknown:
        raise refusal(path, f"the metadata has an unknown key {unknown[0][:80]!r}")
    try:
        bound = parse_json(metadata.get(_BINDING, ""))
    except ValueError:
        bound = None
    if not isinstance(bound, dict) or bound.keys() != {"base", "fingerprint"}:
        raise refusal(path, "the metadata does not say which base the weights were trained on")
    if bound["base"] != base:
        raise refusal(path, "the weights were trained on another base")
    if bound["fingerprint"] != fingerprint:
        raise refusal(path, "the weights were trained with another tokenizer or chat template than the base's")


def _read_tensor(path: Path, file: Any, name: str) -> np.ndarray:
    """A tensor of finite float32 numbers: a matrix, or a vector for DoRA's magnitudes."""
    # The header is read first: numpy has no bfloat16, and its error message would not name the file.
    dtype = file.get_slice(name).get_dtype()
    if dtype != "F32":
        raise refusal(path, f"{name[:120]} is {dtype}, but adapters are stored as F32")
    tensor: np.ndarray = file.get_tensor(name)
    dimensions = 1 if name.endswith("lora_magnitude_vector") else 2
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise refusal(path, f"{name[:120]} has shape {list(tensor.shape)}, not {dimensions} dimensions")
    if not np.isfinite(tensor).all():
        raise refusal(path, f"{name[:120]} holds NaN or an infinity")
    return tensor


def _check_layers(path: Path, adapter: AdapterConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Check that the tensors are exactly those that the configuration promises, and that they change something."""
    expected = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if adapter.dora else set())
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _ADAPTER_TENSOR.fullmatch(name)
        if match is None or match["layer"].rsplit(".", 1)[-1] not in adapter.targets:
            raise refusal(path, f"{name[:120]!r} is not a LoRA tensor of a target module")
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
    for layer, parts in layers.items():
        if parts.keys() != expected:
            raise refusal(path, f"{layer} has {', '.join(sorted(parts))}, expected {', '.join(sorted(expected))}")
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        if a.shape[0] != adapter.rank or b.shape[1] != adapter.rank:
            raise refusal(path, f"{layer} is not of rank {adapter.rank}: A {list(a.shape)}, B {list(b.shape)}")
        if adapter.dora and parts["lora_magnitude_vector"].shape != b.shape[:1]:
            raise refusal(path, f"{layer} has {parts['lora_magnitude_vector'].size} magnitudes for {len(b)} rows")
    missing = sorted(adapter.targets - {layer.rsplit(".", 1)[-1] for layer in layers})
    if missing:
        raise refusal(path, f"target_modules names {missing[0]}, but no tensor adapts it")
    if adapter.layers is not None:
        number = re.compile(rf"\.{adapter.layers_pattern}\.(\d+)\.")
        numbers = {int(match[1]) if (match := number.search(layer)) else -1 for layer in layers}
        if numbers != set(adapter.layers):
            raise refusal(path, f"layers {sorted(numbers)} are adapted, not those that layers_to_transform names")
    if not any(_changes(parts["lora_A.weight"], parts["lora_B.weight"]) for parts in layers.values()):
        raise refusal(path, "every B A is zero: the adapter changes nothing, and the base itself would answer")


def _changes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether B A has an entry other than zero. After a PiSSA start without a step, only the product is zero."""
    with np.errstate(all="ignore"):
        return bool(np.any(b @ a))


def _check_model_tensor(path: Path, name: str, stated: JsonObject, data: np.ndarray) -> None:
    if _MODEL_TENSOR.fullmatch(name) is None:
        raise refusal(path, f"{name[:120]!r} is not a weight of a model that can be trained in full")
    if stated["dtype"] not in _EXPONENTS:
        raise refusal(path, f"{name} is {stated['dtype']}, but weights are stored as {', '.join(_EXPONENTS)}")
    if not 1 <= len(stated["shape"]) <= 4 or not math.prod(stated["shape"]):
        raise refusal(path, f"{name} has shape {stated['shape']}")
    kind, exponent = _EXPONENTS[stated["dtype"]]
    first, last = stated["data_offsets"]
    # A copy, because the offsets need not be multiples of the number's size and numpy requires aligned data.
    numbers = np.frombuffer(data[first:last].tobytes(), dtype=kind)
    if ((numbers & exponent) == exponent).any():
        raise refusal(path, f"{name} holds NaN or an infinity")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 1e6


def _are_modules(value: Any) -> bool:
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        return False
    return all(isinstance(name, str) and _MODULE.fullmatch(name) is not None for name in value)


def refusal(path: Path, what: str) -> Refused:
    """The error for a file that training did not write like this."""
    return Refused(what, where=str(path), fix="use the file as training wrote it")

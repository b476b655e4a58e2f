"""What an adapter must be before it is signed, and again before it is served: plain numbers for the base it names.

Read through the safetensors library alone, whose parser refuses headers that lie about their size or offsets. Whether
the shapes fit the base's own layers is the engine's to check, which has them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tunesmith.core.errors import Refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 64 * 1024
_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>[A-Za-z0-9_.]{1,200})\.(?P<half>lora_[AB]\.weight|lora_magnitude_vector)"
)

# Every key an adapter_config.json may have, and must: each with what it may say. PEFT knows others that name Python
# modules to import (auto_mapping), layers to replace whole (modules_to_save) or another base (revision).
_CONFIG: Mapping[str, Callable[[Any], bool]] = {
    "base_model_name_or_path": lambda value: isinstance(value, str),
    "bias": lambda value: value == "none",
    "fan_in_fan_out": lambda value: value is False,
    "inference_mode": lambda value: isinstance(value, bool),
    "lora_alpha": lambda value: _number(value) and value > 0,
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "peft_type": lambda value: value == "LORA",
    "r": lambda value: type(value) is int and 1 <= value <= 1024,
    "target_modules": lambda value: _modules(value),
    "task_type": lambda value: value == "CAUSAL_LM",
    "use_dora": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
}
# These two it may have, together: where only some of the base's layers are adapted.
_SOME_LAYERS: Mapping[str, Callable[[Any], bool]] = {
    "layers_to_transform": lambda value: (
        isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n < 1024 for n in value)
    ),
    "layers_pattern": lambda value: value == "layers",
}
# The weights' metadata has this one key: what they were trained on, as canonical JSON.
_BOUND = "tunesmith"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What check_adapter found: the rank, the adapted layers' names, how many numbers."""

    rank: int
    targets: frozenset[str]
    layers: int
    parameters: int


def check_adapter(folder: Path, *, base: str, fingerprint: str) -> AdapterFacts:
    """Hold adapter_config.json and adapter_model.safetensors in folder against each other and the base.

    base: digest of the base record. fingerprint: of the base's rendering (tokenizer, template). Raises Refused for
    anything foreign: unknown keys, another base, pickles, dtypes other than float32, NaN, infinities, ranks or modules
    that are not the configured ones, halves without their other half, and weights that change nothing.
    """
    config = _read_config(folder / CONFIG)
    if config["base_model_name_or_path"] != base:
        raise refusal(
            folder / CONFIG,
            f"the adapter says it is of base {config['base_model_name_or_path'][:80]!r}, the candidate's is {base}",
        )
    rank, targets = config["r"], frozenset(config["target_modules"])
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
            check_metadata(path, file.metadata() or {}, base, fingerprint)
            shapes = {name: _check_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
            layers = _check_layers(path, shapes, rank, targets, config["use_dora"])
            changes = any(_changes(file, name) for name in shapes if name.endswith("lora_B.weight"))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise refusal(path, f"not readable as safetensors: {error}") from error
    numbers = {int(match[1]) for name in shapes if (match := re.search(r"\.layers\.(\d+)\.", name))}
    if numbers != set(config.get("layers_to_transform", numbers)):
        raise refusal(path, f"layers {sorted(numbers)} are adapted, not those that layers_to_transform names")
    if not changes:
        raise refusal(path, "every B A is zero: the adapter changes nothing, the base would answer in its name")
    return AdapterFacts(
        rank=rank, targets=targets, layers=layers, parameters=sum(math.prod(shape) for shape in shapes.values())
    )


def _changes(file: Any, name: str) -> bool:
    """Whether a layer's B A, of which name is B's, has an entry that is not zero. B alone does not say: with PiSSA's
    start neither half is zero before a first step, and their product is, exactly."""
    with np.errstate(all="ignore"):
        return bool(np.any(file.get_tensor(name) @ file.get_tensor(name.replace("lora_B", "lora_A"))))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise refusal(path, f"larger than {_MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(path, f"not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise refusal(path, "not a JSON object")
    expected = _CONFIG if config.keys().isdisjoint(_SOME_LAYERS) else {**_CONFIG, **_SOME_LAYERS}
    unknown, missing = sorted(config.keys() - expected.keys()), sorted(expected.keys() - config.keys())
    if unknown:
        raise refusal(path, f"the key {unknown[0][:80]!r} is not one an adapter may have")
    if missing:
        raise refusal(path, f"the key {missing[0]!r} is missing")
    for key, allowed in expected.items():
        if not allowed(config[key]):
            raise refusal(path, f"{key} may not be {str(config[key])[:80]!r}")
    return config


def check_metadata(path: Path, metadata: Mapping[str, str], base: str, fingerprint: str) -> None:
    """Raises Refused where a file's metadata binds it to anything but this base, or says more."""
    unknown = sorted(metadata.keys() - {_BOUND})
    if unknown:
        raise refusal(path, f"the header's metadata has a foreign key {unknown[0][:80]!r}")
    try:
        bound = json.loads(metadata.get(_BOUND, ""))
    except (ValueError, RecursionError):
        bound = None
    if not isinstance(bound, dict) or bound.keys() != {"base", "fingerprint"}:
        raise refusal(path, "the weights do not say what they were trained on")
    if bound["base"] != base:
        raise refusal(path, "the weights were trained on another base than the candidate's")
    if bound["fingerprint"] != fingerprint:
        raise refusal(path, "the weights were trained with another tokenizer or chat template than the base's")


def _check_tensor(path: Path, file: Any, name: str) -> tuple[int, ...]:
    """Shape of a tensor that holds finite float32 numbers: [rows, columns], a magnitude's [rows]."""
    # Asked of the header first: numpy has no bfloat16, and would fail on one with a message about itself.
    dtype = file.get_slice(name).get_dtype()
    if dtype != "F32":
        raise refusal(path, f"{name[:120]} is {dtype}, adapters are kept as F32")
    tensor = file.get_tensor(name)
    dimensions = 1 if name.endswith("lora_magnitude_vector") else 2
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise refusal(path, f"{name[:120]} has shape {list(tensor.shape)}, not {dimensions} dimensions")
    if not np.isfinite(tensor).all():
        raise refusal(path, f"{name[:120]} holds NaN or an infinity")
    return tuple(tensor.shape)


def _check_layers(
    path: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, targets: frozenset[str], dora: bool
) -> int:
    """The number of adapted layers: each an A of [rank, in] and a B of [out, rank], with DoRA also a magnitude [out],
    every target among them."""
    parts = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if dora else set())
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match["layer"].rsplit(".", 1)[-1] not in targets:
            raise refusal(path, f"{name[:120]!r} is not a LoRA tensor of a target module")
        halves.setdefault(match["layer"], {})[match["half"]] = shape
    for layer, pair in halves.items():
        if pair.keys() != parts:
            raise refusal(path, f"{layer} has {', '.join(sorted(pair))} where {', '.join(sorted(parts))} belong")
        a, b = pair["lora_A.weight"], pair["lora_B.weight"]
        if a[0] != rank or b[1] != rank:
            raise refusal(path, f"{layer} is not of rank {rank}: A {list(a)}, B {list(b)}")
        if dora and pair["lora_magnitude_vector"] != b[:1]:
            raise refusal(path, f"{layer} has {pair['lora_magnitude_vector'][0]} lengths for {b[0]} rows")
    absent = sorted(targets - {layer.rsplit(".", 1)[-1] for layer in halves})
    if absent:
        raise refusal(path, f"no tensor adapts {absent[0]}, which target_modules names")
    return len(halves)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 1e6


def _modules(value: Any) -> bool:
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        return False
    return all(isinstance(name, str) and _MODULE.fullmatch(name) is not None for name in value)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: ValueError where an object names a key twice, which readers would resolve differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def refusal(path: Path, what: str) -> Refused:
    """What to raise for a file that training did not write so."""
    return Refused(what, where=str(path), fix="use the file as training wrote it")

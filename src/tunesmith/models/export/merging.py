"""Merges an adapter into its base, W' = W + scale B A in fp32, and writes a complete Hugging Face folder.

A model that was trained in full replaces the base's weights instead. Only files are read, one tensor at a time, so
merging needs memory for one shard of the base. Methods: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rank-stabilised
scale); Liu et al. 2024 (DoRA), in PEFT's file layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.models.base import INDEX, Base, base_files, read_json, weight_files
from tunesmith.models.weight_files import EMBEDDING, HEAD, MODEL_FILE, has_whole_model, read_adapter_file
from tunesmith.records.version import Dtype

DTYPES: Mapping[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Change:
    """An adapter's change of one weight [out, in]: a [r, in], b [out, r], and with DoRA the rows' magnitudes [out]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None

    def apply(self, weight: Tensor) -> Tensor:
        """The merged weight in fp32."""
        merged = weight.float() + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            merged *= (self.magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged


def _read_changes(base: Base, adapter: Path) -> dict[str, Change]:
    """What an adapter changes, by the name of the base's weight."""
    file = read_adapter_file(adapter, base=base.digest, fingerprint=base.fingerprint)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        layer, part = name.removeprefix("base_model.model.").split(".lora_")
        parts.setdefault(f"{layer}.weight", {})[part] = torch.from_numpy(tensor)
    return {
        weight: Change(low["A.weight"], low["B.weight"], file.config.scale, low.get("magnitude_vector"))
        for weight, low in parts.items()
    }


def merged_shards(base: Base, adapter: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name of each of the base's weight files, and its tensors in fp32 with the adapter merged.

    A weight that the adapter does not name stays the base's. Raises Refused if the base has no weight with a change's
    name and shape.
    """
    if has_whole_model(adapter):
        yield from _replaced_shards(base.folder, adapter)
        return
    changes = _read_changes(base, adapter)
    for path in weight_files(base.folder):
        tensors: dict[str, Tensor] = {}
        for name, tensor in tensors_in(path):
            change = changes.pop(name, None)
            if change is not None and tuple(tensor.shape) != (change.b.shape[0], change.a.shape[1]):
                raise Refused(f"the adapter does not fit {name} {list(tensor.shape)}", where=str(adapter))
            tensors[name] = tensor.float() if change is None else change.apply(tensor)
        yield path.name, tensors
    if changes:
        raise Refused(f"the base has no weight {sorted(changes)[0]}, which the adapter changes", where=str(adapter))


def _replaced_shards(base: Path, trained: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name of each of the base's weight files, and the tensors of a full training that replace the file's."""
    weights = dict(tensors_in(trained / MODEL_FILE))
    if HEAD not in weights:  # tied: the base may store the embedding under both names
        weights[HEAD] = weights[EMBEDDING]
    for path in weight_files(base):
        tensors: dict[str, Tensor] = {}
        for name, tensor in tensors_in(path):
            if name not in weights or weights[name].shape != tensor.shape:
                raise Refused(f"the trained weights do not fit {name} {list(tensor.shape)}", where=str(trained))
            tensors[name] = weights[name].float()
        yield path.name, tensors


def write_merged(base: Base, adapter: Path, target: Path, dtype: Dtype) -> None:
    """Write a complete Hugging Face folder into target: the base's files, with the adapter merged into the weights.

    Weights are divided into files as the base's are. Tied embeddings are stored once if the base stores them once. The
    same inputs give the same bytes.
    """
    kind, size = DTYPES[dtype], 0
    for shard, tensors in merged_shards(base, adapter):
        rounded = {name: tensors[name].to(kind).contiguous() for name in sorted(tensors)}
        save_file(rounded, target / shard, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in rounded.values())
    for path in base_files(base.folder):
        if path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            copy = target / path.relative_to(base.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    config = read_json(base.folder / "config.json")
    for name in ("_name_or_path", "torch_dtype", "quantization_config"):
        config.pop(name, None)
    config["dtype"] = str(kind).removeprefix("torch.")
    _write_json(target / "config.json", config)
    if (base.folder / INDEX).is_file():
        index = read_json(base.folder / INDEX)
        _write_json(target / INDEX, {**index, "metadata": {"total_size": size}})


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name. Raises Refused for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise Refused(f"not readable as safetensors: {error}", where=str(path), fix="fetch the model again") from error

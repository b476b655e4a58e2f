"""Random adapters in PEFT's layout, for any base of a supported family, without a training."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.fabricate import adapter_config
from tunesmith.models.base import Base


def write_adapter(folder: Path, base: Base, *, rank: int = 4, strength: float = 0.1, seed: int = 0) -> Path:
    """An adapter of every linear layer whose changes are about strength times the weights; returns folder."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    names: set[str] = set()
    for path in sorted(base.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if not name.endswith("_proj.weight"):
                    continue
                weight = file.get_tensor(name).float()
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                a = torch.randn(rank, weight.shape[1], generator=draw)
                b = torch.randn(weight.shape[0], rank, generator=draw)
                tensors[f"{prefix}.lora_A.weight"] = a
                tensors[f"{prefix}.lora_B.weight"] = b * strength * weight.std() / rank**0.5
                names.add(name.split(".")[-2])
    config = adapter_config(base.digest, lora_alpha=float(rank), r=rank, target_modules=sorted(names))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    bound = json.dumps({"base": base.digest, "fingerprint": base.fingerprint})
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"tunesmith": bound})
    return folder

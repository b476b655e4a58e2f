"""Weights in files: safetensors that are written without a copy in memory, or read in parts; those of fully fine-tuned
models, which hold all tensors of the base by its names and in its dtypes and are bound to it; and modules without their
weights, of which each rank reads only its own rows once the module is sharded.

So a base that no rank has room for can be loaded. Until then its parameters are zeros that share one number each, so
that PEFT can put an adapter into the module and the module can be called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.core.digests import digest_pieces
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.ranks import Ranks, first_row, held
from tunesmith.models.base import Base, weight_files
from tunesmith.models.export.merging import tensors_in
from tunesmith.models.weight_files import MODEL_FILE, binding, check_model_file

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to a safetensors file and sync it to the disk; returns the digest of its bytes.

    Releases of the safetensors library write the same tensors as other bytes, and older ones copy all of them into
    memory once more. metadata: at most one key, so that its order is always the same. Wide numbers come first, so that
    all of them are aligned.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    with path.open("wb") as stream:
        digest = digest_pieces(_pieces(tensors, metadata), stream)
        stream.flush()
        os.fsync(stream.fileno())
    return digest


class SavedTensors:
    """Tensors in safetensors files: each in one of them, or its rows in several, in the files' order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(str(path), framework="pt") for path in paths]
        self._names = [frozenset(file.keys()) for file in self._files]

    def __contains__(self, name: str) -> bool:
        return name in self._names[0]

    @torch.no_grad()
    def like(self, name: str, other: Tensor) -> Tensor:
        """The tensor of this name on other's device, sharded over the ranks as other is, with other's shape and dtype.
        Only this rank's rows are read."""
        tensor = torch.empty_like(other, requires_grad=False)
        mine = held(tensor)
        if not mine.dim():
            return tensor.copy_(self._files[0].get_tensor(name))
        first, at = first_row(other), 0
        for file, names in zip(self._files, self._names, strict=True):
            part = file.get_slice(name) if name in names else None
            rows = 0 if part is None else part.get_shape()[0]
            low, high = max(first, at), min(first + len(mine), at + rows)
            if part is not None and low < high:
                mine[low - first : high - first] = part[low - at : high - at]
            at += rows
        return tensor


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """The header's length, the header, and each tensor's bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers after it are aligned
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_weights(folder: Path, repeated: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Every tensor of a base's folder by name. repeated: names of those that repeat another one (a tied head), to be
    left out.

    Raises Refused for a folder without safetensors weights and for damaged ones.
    """
    every = ((name, tensor) for path in weight_files(folder) for name, tensor in tensors_in(path))
    return {name: tensor for name, tensor in every if name not in repeated}


def save_model(
    trained: Iterable[tuple[str, Tensor]], base: Base, folder: Path, repeated: frozenset[str] = frozenset()
) -> None:
    """Write model.safetensors into an existing folder: the base's weights, with the trained ones in their place.

    trained: names in the base's files, and weights on any device; each is rounded to the base's dtype. repeated: see
    read_weights. Raises TunesmithError where none of them differs from the base's after that.
    """
    tensors = read_weights(base.folder, repeated=repeated)
    changed = False
    for name, weight in trained:
        rounded = weight.detach().to("cpu", tensors[name].dtype)
        changed = changed or not torch.equal(rounded, tensors[name])
        tensors[name] = rounded
    if not changed:
        raise TunesmithError(
            f"no weight changed enough to show in the dtype that {base.spec} is stored in",
            where="train.learning_rate",
            fix="raise it, or train for more steps",
        )
    ordered = {name: tensors[name] for name in sorted(tensors)}
    write_tensors(folder / MODEL_FILE, ordered, binding(base.digest, base.fingerprint))


def read_model_file(folder: Path, base: Base, repeated: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The weights in a training's folder, for the base they were trained on. repeated: see read_weights.

    Raises Refused for weights of another base, for missing or unknown tensors, other shapes or dtypes, and for weights
    equal to the base's: the base would answer under the model's name.
    """
    path = folder / MODEL_FILE
    check_model_file(folder, base=base.digest, fingerprint=base.fingerprint)
    tensors = load_file(path)
    if (wrong := _misfit(tensors, read_weights(base.folder, repeated=repeated))) is not None:
        raise Refused(wrong, where=str(path), fix="train them again")
    return tensors


def _misfit(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Why a training's weights do not belong to a base's; None if they do."""
    for name in sorted(stored.keys() ^ tensors.keys()):
        what = "lack" if name in stored else "hold a tensor that the base does not have:"
        return f"the weights {what} {name[:120]}"
    for name, tensor in tensors.items():
        if (own := _kind(tensor)) != (theirs := _kind(stored[name])):
            return f"{name} is {own}, but the base's is {theirs}"
    equal = all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items())
    return "the weights equal the base's" if equal else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Gives the parameters of a sharded module on this device memory, and reads this rank's rows of each into it.
ReadLate = Callable[[Any, torch.device], None]


@torch.no_grad()
def _read_late(keys: Mapping[str, str], files: Mapping[str, Any], module: Any, device: torch.device) -> None:
    """keys: the tensor of each parameter; files: the open file of each tensor."""
    module._apply(lambda each: torch.empty_like(each, device=device) if each.is_meta else each)
    for name, parameter in module.named_parameters():
        if (key := keys.get(name.replace(".base_layer.", "."))) is not None:
            mine, first = held(parameter), first_row(parameter)
            mine.copy_(files[key].get_slice(key)[first : first + len(mine)])


def without_weights(build: Callable[[], Any], folder: Path, device: torch.device) -> tuple[Any, ReadLate] | None:
    """A base's module without its weights, and what reads them.

    build: makes the module by transformers' from_config. None where the files do not hold exactly the module's tensors
    under its own names, as where transformers renames or merges them, or keeps some of them in fp32 under bf16.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        module = build()
    module.tie_weights()
    files = stored_tensors(folder)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    stored: dict[int, list[str]] = {id(parameter): [] for parameter in parameters.values()}  # its names in the files
    for name in parameters.keys() & files.keys():
        stored[id(parameters[name])].append(name)
    keys = {name: names[0] for name, parameter in parameters.items() if (names := stored[id(parameter)])}
    if (
        any(len(names) != 1 for names in stored.values())
        or {*files} != {*keys.values()}
        or module.state_dict().keys() != parameters.keys()  # there are buffers among the weights
        or (module.dtype != torch.float32 and module._get_dtype_plan(module.dtype))
        or any([*parameters[name].shape] != files[key].get_slice(key).get_shape() for name, key in keys.items())
    ):
        return None
    replace_parameters(module, lambda each: torch.zeros((), dtype=each.dtype, device=device).expand(each.shape))
    for each in module.modules():
        each._buffers.update({name: buffer.to(device) for name, buffer in each._buffers.items() if buffer is not None})
    return module, partial(_read_late, keys, files)


def to_meta(module: nn.Module) -> None:
    """Make the frozen parameters' zeros describe a shape and nothing else, as fully_shard wants them."""
    replace_parameters(module, lambda each: torch.empty(each.shape, dtype=each.dtype, device="meta"))


def replace_parameters(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace each frozen parameter of a module by what make returns for it. Tied ones stay tied."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old ones too, so that no number is used again
    for each in module.modules():
        for name, old in each._parameters.items():
            if old is not None and not (old.requires_grad and not old.is_meta):
                if id(old) not in made:
                    made[id(old)] = old, nn.Parameter(make(old), requires_grad=False)
                each._parameters[name] = made[id(old)][1]


def check_room(base: Base, what: str, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> None:
    """Raises Refused where this rank has no room for all of a base's weights. what: the setting that needs them."""
    shapes = (file.get_slice(key).get_shape() for key, file in stored_tensors(base.folder).items())
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    needed, free = numbers * dtype.itemsize, DeviceMemory(device).available(ranks.local)
    if needed > free:
        raise Refused(
            f"{what} needs whole weights on every rank: {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free",
            where=f"train.{what.split(':')[0]}",
            fix=f"leave {what.split(':')[0]} out: each rank then reads its part of the weights only",
        )


def stored_tensors(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor in a folder."""
    opened = [safe_open(str(path), framework="pt") for path in weight_files(folder)]
    return {key: file for file in opened for key in list(file.keys())}

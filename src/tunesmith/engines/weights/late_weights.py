"""A module without its weights, of which each rank reads only its own rows once the module is sharded.

So a base that no rank has room for can be loaded. Until then its parameters are zeros that share one number each, so
that PEFT can put an adapter into the module and the module can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import Refused
from tunesmith.engines.device import DeviceMemory
from tunesmith.engines.ranks import Ranks, first_row, held
from tunesmith.models.base import Base, weight_files


class LateWeights:
    """Where a module's weights are. keys: the tensor of each parameter; files: the open file of each tensor."""

    def __init__(self, keys: Mapping[str, str], files: Mapping[str, Any]) -> None:
        self._keys, self._files = keys, files

    @torch.no_grad()
    def read(self, module: Any, device: torch.device) -> None:
        """Give a sharded module's parameters memory, and read this rank's rows of each into it."""
        module._apply(lambda each: torch.empty_like(each, device=device) if each.is_meta else each)
        for name, parameter in module.named_parameters():
            if (key := self._keys.get(name.replace(".base_layer.", "."))) is not None:
                mine = held(parameter)
                first = first_row(parameter)
                mine.copy_(self._files[key].get_slice(key)[first : first + len(mine)])


def without_weights(build: Callable[[], Any], folder: Path, device: torch.device) -> tuple[Any, LateWeights] | None:
    """A base's module without its weights, and where they are.

    build: makes the module by transformers' from_config. None where the files do not hold exactly the module's tensors
    under its own names, as where transformers renames or merges them, or keeps some of them in fp32 under bf16.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        module = build()
    module.tie_weights()
    files = stored_tensors(folder)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}  # of each parameter: several where it is tied
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    found = {id_: [name for name in some if name in files] for id_, some in names.items()}
    if any(len(some) != 1 for some in found.values()) or {*files} != {some[0] for some in found.values()}:
        return None
    if module.state_dict().keys() != parameters.keys():  # there are buffers among the weights
        return None
    if module.dtype != torch.float32 and module._get_dtype_plan(module.dtype):
        return None
    keys = {name: found[id(parameter)][0] for name, parameter in parameters.items()}
    shapes = {name: files[key].get_slice(key).get_shape() for name, key in keys.items()}
    if any([*parameters[name].shape] != shape for name, shape in shapes.items()):
        return None
    replace_parameters(module, lambda each: torch.zeros((), dtype=each.dtype, device=device).expand(each.shape))
    for each in module.modules():
        each._buffers.update({name: buffer.to(device) for name, buffer in each._buffers.items() if buffer is not None})
    return module, LateWeights(keys, files)


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
    from safetensors import safe_open

    opened = [safe_open(str(path), framework="pt") for path in weight_files(folder)]
    return {key: file for file in opened for key in list(file.keys())}

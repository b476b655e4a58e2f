"""Files of fully fine-tuned models: all tensors of the base, by its names and in its dtypes, bound to the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.engines.native.adapters.adapter import adapted_linear, read_adapter
from tunesmith.engines.native.network.network import Linear, Network, frozen_linear
from tunesmith.engines.native.network.weights import load_network, read_weights
from tunesmith.engines.tensor_files import write_tensors
from tunesmith.models.base import Base
from tunesmith.models.weight_files import HEAD, MODEL_FILE, binding, check_model_file, has_whole_model


def tuned(folder: Path, network: Network, base: Base) -> tuple[Network, Linear]:
    """The network and linear layers that a training's folder describes: the base's with an adapter, or a new network.

    Raises Refused where the files belong to another base.
    """
    if not has_whole_model(folder):
        return network, adapted_linear(network, read_adapter(folder, network, base))
    own = load_network(base.folder, network.dtype, read_model_file(folder, base, network.tied))
    return own, frozen_linear(own)


def own_weights(base: Path, tied: bool) -> dict[str, Tensor]:
    """The base's tensors as stored, without the head's where it is tied to the embedding."""
    tensors = read_weights(base)
    if tied:
        tensors.pop(HEAD, None)
    return tensors


def save_model(trained: Mapping[str, Tensor], base: Base, folder: Path, *, tied: bool) -> None:
    """Write model.safetensors into an existing folder: the base's weights, with the trained ones in their place.

    trained: by the base's names; each is rounded to the base's dtype. Raises TunesmithError where none of them differs
    from the base's after that.
    """
    tensors = own_weights(base.folder, tied)
    changed = False
    for name, weight in trained.items():
        rounded = weight.to(tensors[name].dtype)
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


def read_model_file(folder: Path, base: Base, tied: bool) -> dict[str, Tensor]:
    """The weights in a training's folder, for the base they were trained on.

    Raises Refused for weights of another base, for missing or unknown tensors, other shapes or dtypes, and for weights
    equal to the base's: the base would answer under the model's name.
    """
    path = folder / MODEL_FILE
    check_model_file(folder, base=base.digest, fingerprint=base.fingerprint)
    tensors = load_file(path)
    stored = own_weights(base.folder, tied)
    for name in sorted(stored.keys() ^ tensors.keys()):
        what = "lack" if name in stored else "hold a tensor that the base does not have:"
        raise Refused(f"the weights {what} {name[:120]}", where=str(path), fix="train them again")
    for name, tensor in tensors.items():
        own = stored[name]
        if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            raise Refused(
                f"{name} is {_kind(tensor)}, but the base's is {_kind(own)}", where=str(path), fix="train them again"
            )
    if all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items()):
        raise Refused("the weights equal the base's", where=str(path), fix="train them again")
    return tensors


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

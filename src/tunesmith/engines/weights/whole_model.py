"""Files of fully fine-tuned models: all tensors of the base, by its names and in its dtypes, bound to the base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.engines.weights.tensor_files import write_tensors
from tunesmith.models.base import Base, weight_files
from tunesmith.models.weight_files import MODEL_FILE, binding, check_model_file

NOTHING: frozenset[str] = frozenset()


def read_weights(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a base's folder by name, in dtype (None: as stored).

    Raises Refused for a folder without safetensors weights and for damaged ones.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = shard.get_tensor(name).to(dtype=dtype)
        except SafetensorError as error:
            raise Refused(f"{path.name} is damaged: {error}", where=str(folder), fix="fetch the base again") from error
    return tensors


def own_weights(base: Path, repeated: frozenset[str] = NOTHING) -> dict[str, Tensor]:
    """The base's tensors as stored. repeated: names of those that repeat another one (a tied head), to be left out."""
    return {name: tensor for name, tensor in read_weights(base).items() if name not in repeated}


def save_model(
    trained: Iterable[tuple[str, Tensor]], base: Base, folder: Path, repeated: frozenset[str] = NOTHING
) -> None:
    """Write model.safetensors into an existing folder: the base's weights, with the trained ones in their place.

    trained: names in the base's files, and weights on any device; each is rounded to the base's dtype. repeated: see
    own_weights. Raises TunesmithError where none of them differs from the base's after that.
    """
    tensors = own_weights(base.folder, repeated)
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


def read_model_file(folder: Path, base: Base, repeated: frozenset[str] = NOTHING) -> dict[str, Tensor]:
    """The weights in a training's folder, for the base they were trained on. repeated: see own_weights.

    Raises Refused for weights of another base, for missing or unknown tensors, other shapes or dtypes, and for weights
    equal to the base's: the base would answer under the model's name.
    """
    path = folder / MODEL_FILE
    check_model_file(folder, base=base.digest, fingerprint=base.fingerprint)
    tensors = load_file(path)
    stored = own_weights(base.folder, repeated)
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

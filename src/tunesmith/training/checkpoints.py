"""Checkpoints: complete, atomic, checked before use. A run continued from one ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused
from tunesmith.core.files import sync_folder

KEPT = 2  # the newest, and the one before it in case the newest is damaged


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write step's checkpoint under folder: a sub-folder that appears whole or not at all; older ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        digest = _write(scratch / "tensors.safetensors", tensors)
        with (scratch / "state.json").open("wb") as stream:
            stream.write(json.dumps({**state, "step": step, "tensors": digest}).encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(scratch, folder / f"step-{step:08d}")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write fp32 tensors as safetensors straight from where they lie, and sync them; returns the file's digest.

    They may be most of the memory there is: the library would put all of them into one more string.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers after it are aligned
    hasher = hashlib.sha256()
    with path.open("wb") as stream:
        told: list[bytes | memoryview] = [len(encoded).to_bytes(8, "little"), encoded]
        for piece in chain(told, (tensor.contiguous().numpy().data for tensor in tensors.values())):
            hasher.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return f"sha256:{hasher.hexdigest()}"


def load_checkpoint(
    folder: Path, identity: Mapping[str, Any]
) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """The newest whole checkpoint under folder, its tensors and its state, None where there is none; and the names of
    damaged newer ones, which are removed.

    identity: everything that must be as it was for the run's bytes to come out the same. Raises Refused where it is
    not.
    """
    for scratch in folder.glob(".writing-*"):  # left by a kill in the middle of a write
        shutil.rmtree(scratch, ignore_errors=True)
    damaged: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        whole = _read(path)
        if whole is None:
            damaged.append(path.name)
            shutil.rmtree(path)  # the run comes to this step again, and its place must be free then
            continue
        tensors, state = whole
        changed = _changed(state["identity"], identity)
        if changed:
            raise Refused(
                f"this training was begun with other {', '.join(changed)}: continuing would not give the same bytes",
                where=str(path),
                fix="restore them, or start over with `tunesmith train --restart`",
            )
        return (load_file(tensors), state), damaged
    return None, damaged


def newest_bytes(folder: Path) -> int:
    """The size of the newest checkpoint under folder; 0 where there is none."""
    newest = max(folder.glob("step-*"), default=None)
    return 0 if newest is None else sum(path.stat().st_size for path in newest.iterdir())


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs; of a part with names of its own, which of them."""
    found: list[str] = []
    for key in now:
        was, given = before.get(key), now[key]
        if was == given:
            continue
        if isinstance(was, Mapping) and isinstance(given, Mapping):
            names = sorted(name for name in {**was, **given} if was.get(name) != given.get(name))
            found.append(f"{key} ({', '.join(names)})")
        else:
            found.append(key)
    return found


def _read(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint's file of tensors and its state; None where it is not whole."""
    tensors = path / "tensors.safetensors"
    try:
        state = json.loads((path / "state.json").read_bytes())
        actual = digest_file(tensors)
    except (OSError, ValueError):
        return None
    whole = isinstance(state, dict) and state.get("tensors") == actual
    return (tensors, state) if whole else None

"""Checkpoints: complete, atomic, checked before use. A run continued from one ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.files import sync_folder

_KEPT = 2  # the newest, and the one before it in case the newest is damaged


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write step's checkpoint under folder: a sub-folder that appears whole or not at all; older ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save(dict(tensors))
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        stated = json.dumps({**state, "step": step, "tensors": digest_bytes(data)}).encode()
        for name, content in (("tensors.safetensors", data), ("state.json", stated)):
            with (scratch / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        os.rename(scratch, folder / f"step-{step:08d}")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-_KEPT]:
        shutil.rmtree(old)


def load_checkpoint(
    folder: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest whole checkpoint under folder: its tensors, its state, and the names of damaged newer
    ones, which are removed.

    identity: everything that must be as it was for the run's bytes to come out the same. Raises Refused where it is
    not; returns None where there is no whole checkpoint.
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
        data, state = whole
        changed = [key for key in identity if state["identity"].get(key) != identity[key]]
        if changed:
            raise Refused(
                f"this training was begun with other {', '.join(changed)}: continuing would not give the same bytes",
                where=str(path),
                fix="restore them, or start over with `tunesmith train --restart`",
            )
        return load(data), state, damaged
    return None


def _read(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """A checkpoint's tensors and state; None where it is not whole."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        data = (path / "tensors.safetensors").read_bytes()
    except (OSError, ValueError):
        return None
    whole = isinstance(state, dict) and state.get("tensors") == digest_bytes(data)
    return (data, state) if whole else None

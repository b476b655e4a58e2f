"""Checkpoints: complete, atomic, and checked before use. A training resumed from one ends in the same bytes.

Each rank writes the rows of the tensors that it holds, and reads those that it needs, so no rank ever holds all of
them, and a training can be resumed on any number of ranks, or in one process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith.core.digests import digest_file
from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.system.files import sync_folder, write_atomic
from tunesmith.core.system.scratch import remove_leftovers, scratch_folder
from tunesmith.engines.ranks import ALONE, Ranks, held
from tunesmith.engines.weights import SavedTensors, write_tensors

KEPT = 2  # the newest, and the one before it in case the newest is damaged
_STATE = "state.json"


class Checkpoints:
    """The checkpoints of one training, in one folder that all ranks see.

    identity: everything that must be equal for a resumed training to end in the same bytes. The number of ranks, and
    with it that of each one's threads, may differ nevertheless; moved says where that happened.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.folder, self.identity, self._ranks = folder, dict(identity), ranks
        self.moved: list[str] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a step's checkpoint: a folder that appears complete or not at all. Removes older ones.

        All ranks call this with the same names.
        """
        with ExitStack() as until_renamed:
            written = self.folder / self._ranks.agree(lambda: self._begin(until_renamed)) / "step"
            digest = None
            if self._ranks.rank < self._ranks.size // self._ranks.copies:  # the others hold copies
                mine = {name: held(tensor) for name, tensor in tensors.items()}
                digest = write_tensors(written / _part(self._ranks.rank), mine)
            digests = self._ranks.gather(digest)
            if self._ranks.first:
                parts = {_part(rank): each for rank, each in enumerate(digests) if each is not None}
                stated = {**state, "identity": self.identity, "step": step, "tensors": parts}
                stated |= {"moved": self.moved} if self.moved else {}
                write_atomic(written / _STATE, json.dumps(stated).encode())
                os.rename(written, self.folder / f"step-{step:08d}")
                sync_folder(self.folder)
                for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                    shutil.rmtree(old)

    def _begin(self, until_renamed: ExitStack) -> str:
        """The name of a new folder that all ranks write into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = until_renamed.enter_context(scratch_folder(self.folder))
        (scratch / "step").mkdir()
        return scratch.name

    def load(self) -> tuple[tuple[SavedTensors, dict[str, Any]] | None, list[str]]:
        """The tensors and the state of the newest complete checkpoint, None where there is none; and the names of
        damaged newer ones, which are removed.

        Raises Refused where the training's identity differs from the checkpoint's.
        """
        newest, damaged = self._ranks.agree(self._newest)
        if newest is None:
            return None, damaged
        name, state = newest
        self.moved = list(state.get("moved", []))
        before, now = (_ranks(each) for each in (state["identity"], self.identity))
        if before != now:
            self.moved.append(
                f"{before} trained until step {state['step']}, then {now}: it ends like an undisturbed training within "
                "rounding, not in the same bytes"
            )
        return (SavedTensors([self.folder / name / part for part in state["tensors"]]), state), damaged

    def _newest(self) -> tuple[tuple[str, dict[str, Any]] | None, list[str]]:
        """The name and the state of the newest complete checkpoint, and the names of damaged newer ones."""
        remove_leftovers(self.folder)  # of a process that was killed during a write
        damaged: list[str] = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            state = _read_state(path)
            if state is None:
                damaged.append(path.name)
                shutil.rmtree(path)  # the training will reach this step and write it again
                continue
            changed = _changed(state["identity"], self.identity)
            if changed:
                raise Refused(
                    f"this training was started with other {', '.join(changed)}: resuming it would not give the same "
                    "bytes",
                    where=str(path),
                    fix=NextStep("restore them, or start over", "train", restart=True),
                )
            return (path.name, state), damaged
        return None, damaged

    def newest_bytes(self) -> int:
        """The size of the newest checkpoint; 0 where there is none."""
        newest = max(self.folder.glob("step-*"), default=None)
        return 0 if newest is None else sum(path.stat().st_size for path in newest.iterdir())


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ; for a value that is a mapping, with its keys that differ.

    There a missing key counts as one without a value: a setting may be newer than the checkpoint.
    """
    changed: list[str] = []
    before, now = _comparable(before, now), _comparable(now, before)
    for key in {**now, **before}:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
            changed += [f"{key} ({', '.join(names)})"] if names else []
        else:
            changed.append(key)
    return changed


def _comparable(identity: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """An identity without what differs when the other one has another number of ranks."""
    if _ranks(identity) == _ranks(other):
        return identity
    own = identity.get("environment", {})
    return {**identity, "environment": {key: own[key] for key in own if key not in ("ranks", "copies", "threads")}}


def _ranks(identity: Mapping[str, Any]) -> str:
    """The number of ranks, and of copies of the model among them."""
    stated = identity.get("environment", {})
    ranks, copies = stated.get("ranks", 1), stated.get("copies", 1)
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'}" + (f" with {copies} copies" if copies > 1 else "")


def _part(rank: int) -> str:
    """The file of a rank's rows."""
    return f"tensors-{rank}.safetensors" if rank else "tensors.safetensors"


def _read_state(path: Path) -> dict[str, Any] | None:
    """A checkpoint's state; None where the checkpoint is not complete or its tensors changed."""
    try:
        state = json.loads((path / _STATE).read_bytes())
        parts = state["tensors"] if isinstance(state, dict) else {}
        actual = {part: digest_file(path / part) for part in parts}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if parts and parts == actual else None

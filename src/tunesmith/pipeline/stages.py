"""How a stage is run: what is stale, what is skipped, where to resume. It knows no stage but their names.

A stage's key is the digest of everything its result depends on: its settings, its parents' digests and its revision.
The record a key gave is kept in the store, so a stage whose inputs did not change is not run again, and one that was
stopped half way carries on in a work folder named by its key.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_of, short
from tunesmith.core.errors import Refused
from tunesmith.core.files import lock
from tunesmith.core.progress import SILENT, Progress
from tunesmith.project import Project
from tunesmith.store import database
from tunesmith.store.identities import require
from tunesmith.store.recalls import recalled

# Bump a stage's number when what it computes from the same inputs changes; not where kernels round otherwise, as those
# of another processor do too.
REVISIONS = {
    "data": 6,
    "documents": 1,
    "train": 2,
    "search": 1,
    "answer": 1,
    "judge": 1,
    "probe": 1,
    "risk": 1,
    "evaluate": 2,
    "gate": 2,
}
# What a person must be allowed to do for a stage to be run.
ACTIONS = {
    "data": "data.build",
    "documents": "data.build",
    "search": "evaluation.run",
    "train": "training.run",
    "answer": "evaluation.run",
    "judge": "evaluation.run",
    "probe": "evaluation.run",
    "risk": "evaluation.run",
    "evaluate": "evaluation.run",
    "gate": "evaluation.run",
}


@dataclass
class Stage:
    """How one stage went. seconds: 0 where it was skipped."""

    name: str
    seconds: float
    skipped: bool


@dataclass
class Stages:
    """Runs a project's stages. done: how each went, in the order they were first asked for."""

    project: Project
    progress: Progress = SILENT
    actor: str | None = None  # whose work it is; the project's own way to find out where None
    done: list[Stage] = field(default_factory=list)

    @property
    def acting(self) -> str:
        """Name of the person whose work it is."""
        return self.project.actor(self.actor)

    def run(
        self, name: str, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], str], *, again: bool = False
    ) -> str:
        """The record a stage gave for these inputs before, else, or again, make(work folder) gives it now."""
        store = self.project.store
        key = digest_of({"stage": kind, "revision": REVISIONS[kind], **inputs})
        known = None if again else store.recall_memo(key)
        if known is not None:
            self._refuse_recalled(name, known)
            self._tell(name, 0.0, skipped=True)
            return known
        work = store.root / "work" / f"{kind}-{key.removeprefix('sha256:')[:24]}"
        with lock(store.root / "work" / f"{work.name}.lock", f"stage {name}"):
            known = None if again else store.recall_memo(key)  # another process may have finished it meanwhile
            if known is not None:
                return known
            require(store, self.acting, ACTIONS[kind])
            work.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            digest = make(work)
            self._refuse_recalled(name, digest)
            store.keep_memo(key, digest)
            shutil.rmtree(work, ignore_errors=True)
        self._tell(name, time.perf_counter() - began, skipped=False)
        return digest

    def _refuse_recalled(self, name: str, digest: str) -> None:
        with database.reading(self.project.store.engine) as session:
            reason = recalled(session, digest)
        if reason is not None:
            raise Refused(
                f"what this stage gives was recalled: {reason}",
                where=f"stage {name}, record {short(digest)}",
                fix="take what was withdrawn out of the sources (or settings), then run again",
            )

    def _tell(self, name: str, seconds: float, *, skipped: bool) -> None:
        if any(stage.name == name for stage in self.done):
            return
        self.done.append(Stage(name, seconds, skipped))
        self.progress.say(f"{name}: unchanged, skipped" if skipped else f"{name}: {seconds:.1f} s")

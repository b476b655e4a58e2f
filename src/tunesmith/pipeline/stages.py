"""Runs one stage: skips it where its inputs did not change, and resumes it where it was stopped.

A stage's key is the digest of everything its result depends on: its settings, its parents' digests and its revision.
The store keeps a memo from each key to the record that the stage made. A stopped stage resumes in its work folder,
which is named by the key. For a tenant or a region the key has their names: nobody learns from a skipped stage what
others have, nor gets what they made.
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
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import room_for, write_atomic
from tunesmith.core.text.names import Scope
from tunesmith.project import Project
from tunesmith.store.people.identities import require
from tunesmith.store.records import ancestor_recalled, recalled

# Raise a stage's number when it computes something else from the same inputs. Not for rounding in kernels: that differs
# between processors anyway.
REVISIONS = {
    "data": 17,
    "documents": 8,
    "train": 9,
    "search": 5,
    "training_search": 8,
    "answer": 4,
    "judge": 2,
    "probe": 2,
    "risk": 4,
    "policy": 2,
    "style": 3,
    "evaluate": 14,
    "gate": 9,
}
# The permission that running a stage needs, where it is not evaluation.run.
_PERMISSIONS = {
    "data": "data.build",
    "documents": "data.build",
    "training_search": "training.run",
    "train": "training.run",
}
_AGAIN = "again"  # in a work folder: the stage was told to run again, and has not ended


@dataclass
class Stage:
    """One stage that was run or skipped. seconds: 0 where it was skipped because its inputs did not change."""

    name: str
    seconds: float
    skipped: bool


@dataclass
class Stages:
    """Runs a project's stages. done: the stages so far, in the order in which they were first run."""

    project: Project
    progress: Progress = SILENT
    actor: str | None = None  # who runs the stages; None: as `Project.actor` decides
    scope: Scope = field(default_factory=Scope)  # whom they are run for, which the person must be permitted to act for
    done: list[Stage] = field(default_factory=list)

    @property
    def acting(self) -> str:
        """The name of the person who runs the stages."""
        return self.project.actor(self.actor)

    def run(
        self,
        name: str,
        kind: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], str],
        *,
        again: bool = False,
        for_all: bool = False,
    ) -> str:
        """Digest of the record that make(work folder) returns; a memo of the same inputs is returned instead.

        for_all: the inputs hold nothing of a tenant, so all tenants share the result. again: ignore the memo; so does
        the next run where this one was stopped, and goes on with it. Raises Refused where the record or one that it was
        made from was recalled, or where the person may not run the stage.
        """
        store = self.project.store
        key = _key(kind, inputs, Scope() if for_all else self.scope)
        work = self._work(kind, key)
        if (known := None if again else self._memo(name, key, work)) is not None:
            return known
        with store.lock(work.name, f"stage {name}"):
            # Another process may have finished the stage before this one took the lock.
            if (known := None if again else self._memo(name, key, work)) is not None:
                return known
            require(store, self.acting, _PERMISSIONS.get(kind, "evaluation.run"), scope=self.scope)
            work.mkdir(parents=True, exist_ok=True)
            if again:
                write_atomic(work / _AGAIN, b"")
            began = time.perf_counter()
            try:
                with room_for(work):
                    digest = make(work)
            except Refused:
                if again:  # nothing was made yet: the earlier result stands
                    (work / _AGAIN).unlink(missing_ok=True)
                raise
            self._refuse_recalled(name, digest)
            store.keep_memo(key, digest)
            (work / _AGAIN).unlink(missing_ok=True)  # before the checkpoints, without which it would run from the start
            shutil.rmtree(work, ignore_errors=True)
        self._report(name, time.perf_counter() - began, skipped=False)
        return digest

    def known(self, kind: str, inputs: Mapping[str, Any]) -> str | None:
        """The record that a stage made of the same inputs before, recalled or not; None where it has to run."""
        key = _key(kind, inputs, self.scope)
        return self._kept(key, self._work(kind, key))

    def _work(self, kind: str, key: str) -> Path:
        return self.project.store.local("work", f"{kind}-{key.removeprefix('sha256:')[:24]}")

    def _kept(self, key: str, work: Path) -> str | None:
        return None if (work / _AGAIN).exists() else self.project.store.recall_memo(key)

    def _memo(self, name: str, key: str, work: Path) -> str | None:
        """The record that the stage made of the same inputs before. Raises Refused where it was recalled."""
        known = self._kept(key, work)
        if known is not None:
            self._refuse_recalled(name, known)
            self._report(name, 0.0, skipped=True)
        return known

    def _refuse_recalled(self, name: str, digest: str) -> None:
        """Raise Refused where a record, or one that it was made from, was recalled: it may have been meanwhile."""
        with self.project.store.reading() as session:
            reason = recalled(session, digest) or ancestor_recalled(session, digest)
        if reason is not None:
            raise Refused(
                f"the result of this stage, or something that it was made from, was recalled: {reason}",
                where=f"stage {name}, record {short(digest)}",
                fix="remove the withdrawn data from the sources (or settings), then run again",
            )

    def _report(self, name: str, seconds: float, *, skipped: bool) -> None:
        if any(stage.name == name for stage in self.done):
            return
        self.done.append(Stage(name, seconds, skipped))
        self.progress.say(f"{name}: unchanged, skipped" if skipped else f"{name}: {seconds:.1f} s")


def _key(kind: str, inputs: Mapping[str, Any], scope: Scope) -> str:
    return digest_of({"stage": kind, "revision": REVISIONS[kind], **inputs, **scope.stated()})

"""Runs of an operation that are killed at one chosen write each.

A point is a write inside the operation that others can see: a file of the store that gets its name or loses it, or a
commit of the database. What lies in a scratch file or in an open transaction is the same to all others, however much of
it there is. `record` runs an operation whole in a forked child and lists its points; `run_killed` runs it in another
child that kills itself (SIGKILL) before or after one of them. Children are forked: they have everything imported.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.forked import run_forked
from tunesmith.store.store import Store

# The functions of os by which files get names and lose them. The first argument is a path.
_CHANGES = ("link", "remove", "rename", "replace", "rmdir", "symlink", "truncate", "unlink")

Moment = Literal["before", "after"]
Operation = Callable[[Store], object]


class _Watch:
    """Notes the writes under a folder, and kills this process at one of them."""

    def __init__(self, root: Path, number: int | None = None, moment: Moment = "before") -> None:
        self.root, self.number, self.moment = str(root.resolve()), number, moment
        self.points: list[str] = []

    def install(self, store: Store) -> None:
        """Replace the functions of this process. It must end with os._exit."""
        for name in _CHANGES:
            setattr(os, name, self._changing(name, getattr(os, name)))
        dialect = store.engine.dialect
        commit = dialect.do_commit

        def committing(connection: Any) -> None:
            if connection.in_transaction:
                self._call("commit", lambda: commit(connection))
            else:
                commit(connection)

        dialect.do_commit = committing  # type: ignore[method-assign]

    def _changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(target: Any, *rest: Any, **named: Any) -> Any:
            folder = named.get("dir_fd")
            path = os.path.abspath(target if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{target}")
            if not path.startswith(self.root + os.sep):
                return real(target, *rest, **named)
            return self._call(f"{name} {os.path.relpath(path, self.root)}", lambda: real(target, *rest, **named))

        return change

    def _call(self, what: str, real: Callable[[], Any]) -> Any:
        mine = len(self.points) == self.number
        self.points.append(what)
        if mine and self.moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real()
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def record(root: Path, operation: Operation) -> list[str]:
    """Run an operation whole on the store in root, and return its points: the call and the file of each."""
    listed = root.parent / f"{root.name}-points.json"
    watch = _Watch(root)
    assert _forked(root, operation, watch, lambda: listed.write_text(json.dumps(watch.points))) == 0, "it failed"
    found: list[str] = json.loads(listed.read_text())
    return found


def run_killed(root: Path, operation: Operation, number: int, moment: Moment) -> None:
    """Run an operation on the store in root and kill it at a point. Fails if it was not killed."""
    status = _forked(root, operation, _Watch(root, number, moment), lambda: None)
    assert os.WIFSIGNALED(status), f"the operation ended before point {number} {moment}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def _forked(root: Path, operation: Operation, watch: _Watch, then: Callable[[], object]) -> int:
    def work() -> None:
        private = root.parent / f"{root.name}-temporary"
        private.mkdir(exist_ok=True)
        tempfile.tempdir = str(private)
        store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
        watch.install(store)
        operation(store)
        watch.number = None
        then()

    return run_forked(work)

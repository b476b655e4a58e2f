"""Runs of an operation that are killed at one chosen write each.

A point is a write inside the operation: a call that changes a file or folder of the store, or a statement or commit of
the database. `record` runs an operation whole in a forked child and lists its points; `run_killed` runs it in another
child that kills itself (SIGKILL) at one of them. A child is forked, so that everything is imported already.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import event

from tests.forked import run_forked
from tunesmith.store.store import Store

# The functions of os that change a file or a folder. The first argument is a path or an open file.
_CHANGES = (
    "chmod", "fsync", "ftruncate", "link", "mkdir", "remove", "rename", "replace", "rmdir", "sendfile", "symlink",
    "truncate", "unlink", "write",
)  # fmt: skip
_STATEMENTS = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "DELETE")

Moment = Literal["before", "half", "after"]
Operation = Callable[[Store], object]


@dataclass(frozen=True)
class Point:
    """One write. number: its place in the operation; what: the call and the file. half: whether it writes data."""

    number: int
    what: str
    half: bool = False


class _Watch:
    """Counts the writes under a folder, and kills this process at one of them."""

    def __init__(self, root: Path, number: int | None = None, moment: Moment = "before") -> None:
        self.root, self.number, self.moment = str(root.resolve()), number, moment
        self.points: list[Point] = []

    def call(self, what: str, real: Callable[[], Any], half: Callable[[], object] | None = None) -> Any:
        mine = len(self.points) == self.number
        self.points.append(Point(len(self.points), what, half is not None))
        if mine and self.moment == "half" and half is not None:
            half()
        if mine and self.moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real()
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def inside(self, target: Any) -> str | None:
        """The path of a file under the root, relative to it; None for any other."""
        try:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(target)
        except (OSError, TypeError):
            return None
        return os.path.relpath(path, self.root) if path.startswith(self.root + os.sep) else None

    def install(self, store: Store) -> None:
        """Replace the functions of this process. It must end with os._exit."""
        self._watch_database(store)
        for name in _CHANGES:
            setattr(os, name, self._changing(name, getattr(os, name)))
        real_open, real_os_open = io.open, os.open

        def open_file(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            path = self.inside(file) if set(mode) & set("wax+") else None
            if path is None:
                return real_open(file, mode, *rest, **named)
            if isinstance(file, int):  # opened by os.open, which was a point
                return _Watched(self, path, real_open(file, mode, *rest, **named))
            opened = self.call(f"open {path}", lambda: real_open(file, mode, *rest, **named))
            return _Watched(self, path, opened)

        def open_handle(file: Any, flags: int, *rest: Any, **named: Any) -> Any:
            path = self.inside(file) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
            if path is None:
                return real_os_open(file, flags, *rest, **named)
            return self.call(f"open {path}", lambda: real_os_open(file, flags, *rest, **named))

        builtins.open = io.open = open_file
        os.open = open_handle

    def _changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(target: Any, *rest: Any, **named: Any) -> Any:
            folder = named.get("dir_fd")
            path = self.inside(target if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{target}")
            if path is None:
                return real(target, *rest, **named)
            run = (lambda: None) if name == "fsync" else lambda: real(target, *rest, **named)
            half = None
            if name == "sendfile":
                half = lambda: real(target, rest[0], 0, os.fstat(rest[0]).st_size // 2)  # noqa: E731
            elif name == "write":
                half = lambda: real(target, rest[0][: len(rest[0]) // 2])  # noqa: E731
            return self.call(f"{name} {path}", run, half)

        return change

    def _watch_database(self, store: Store) -> None:
        engine = store.engine

        def before(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if statement.upper().startswith(_STATEMENTS):
                inside = statement.upper().startswith("BEGIN") or cursor.connection.in_transaction
                assert inside, f"durable before the commit: {statement}"
                self.call(f"execute {' '.join(statement.split()[:3])}", lambda: None)

        event.listen(engine, "before_cursor_execute", before)
        commit = engine.dialect.do_commit

        def committing(connection: Any) -> None:
            if connection.in_transaction:
                self.call("commit", lambda: commit(connection))
            else:
                commit(connection)

        engine.dialect.do_commit = committing  # type: ignore[method-assign]


class _Watched:
    """A file that is open for writing, whose every write is a point."""

    def __init__(self, watch: _Watch, path: str, stream: Any) -> None:
        self._watch, self._path, self._stream = watch, path, stream

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        def whole() -> Any:
            written = self._stream.write(data)
            self._stream.flush()
            return written

        return self._watch.call(f"write {self._path}", whole, half)

    def __enter__(self) -> _Watched:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._stream.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def record(root: Path, operation: Operation) -> list[Point]:
    """Run an operation whole on the store in root, and return its points."""
    listed = root.parent / f"{root.name}-points.json"

    def write_points(watch: _Watch) -> None:
        listed.write_text(json.dumps([(point.number, point.what, point.half) for point in watch.points]))

    assert _forked(root, operation, _Watch(root), write_points) == 0, "the operation failed"
    return [Point(*stated) for stated in json.loads(listed.read_text())]


def run_killed(root: Path, operation: Operation, number: int, moment: Moment) -> None:
    """Run an operation on the store in root and kill it at a point. Fails if it was not killed."""
    status = _forked(root, operation, _Watch(root, number, moment), lambda _watch: None)
    assert os.WIFSIGNALED(status), f"the operation ended before point {number} {moment}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def _forked(root: Path, operation: Operation, watch: _Watch, then: Callable[[_Watch], None]) -> int:
    def work() -> None:
        private = root.parent / f"{root.name}-temporary"
        private.mkdir(exist_ok=True)
        tempfile.tempdir = str(private)
        store = Store(root, url=f"sqlite:///{root / 'tunesmith.db'}")
        watch.install(store)
        operation(store)
        number = watch.number
        watch.number, watch.root = None, "nowhere"
        if number is None:
            then(watch)

    return run_forked(work)

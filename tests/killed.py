"""Kills an operation on a store at each of its writes that others can see, for tests of what the next start finds.

A point is a file of the store that gets its name or loses it, an object of a bucket that is written or deleted, a
commit of the database, or SQLite's VACUUM. What lies in a scratch file or in an open transaction is the same to all
others, however much of it there is.

All work is done in forked children, which have everything imported. Call this in a process of one thread that has used
no bucket, so with `run_elsewhere`: in one with more threads, a child can wait for a lock that none of its own holds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import create_engine, make_url, text

from tests.forked import run_forked
from tests.s3_server import create_bucket
from tunesmith.store import database
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.store import Store

# The functions of os by which files get names and lose them. The first argument is a path.
_CHANGES = ("link", "remove", "rename", "replace", "rmdir", "symlink", "truncate", "unlink")

Operation = Callable[[Store], object]
EVERY = os.environ.get("TUNESMITH_KILL_POINTS") == "all"


class Home(NamedTuple):
    """Where a store is kept. bucket: its URL on the server of $AWS_ENDPOINT_URL; by default the blobs are in root."""

    root: Path
    url: str
    bucket: str = ""

    @classmethod
    def local(cls, root: Path) -> Home:
        """SQLite and a folder."""
        return cls(root, f"sqlite:///{root / 'tunesmith.db'}")

    def open(self) -> Store:
        """The store."""
        if not self.bucket:
            return Store(self.root, url=self.url)
        from tunesmith.store.blobs.s3 import S3Blobs

        return Store(self.root, url=self.url, blobs=S3Blobs(self.bucket, self.root / "cache", 1 << 30))

    def copy(self, root: Path) -> Home:
        """The same in another folder, and in a database and a bucket of its own. Nobody may use the first meanwhile."""
        shutil.copytree(self.root, root)
        if not self.bucket:
            return Home.local(root)
        name, url = f"copied_{uuid.uuid4().hex}", make_url(self.url)
        ends = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{url.database}'"  # noqa: S608
        _on_server(self.url, ends)  # connections that a test before left in a pool
        _on_server(self.url, f"create database {name} template {url.database}")
        source, target, server = self.bucket.split("/")[2], f"b{uuid.uuid4().hex}", os.environ["AWS_ENDPOINT_URL"]
        create_bucket(server, target)
        with urllib.request.urlopen(f"{server}/{source}?list-type=2&max-keys=1000") as listed:  # noqa: S310
            keys = [part.partition("</Key>")[0] for part in listed.read().decode().split("<Key>")[1:]]
        for key in keys:
            header = {"x-amz-copy-source": urllib.parse.quote(f"/{source}/{key}")}
            address = f"{server}/{target}/{urllib.parse.quote(key)}"
            with urllib.request.urlopen(urllib.request.Request(address, method="PUT", headers=header)):  # noqa: S310
                pass
        return Home(root, url.set(database=name).render_as_string(False), self.bucket.replace(source, target))

    def remove(self) -> None:
        """Delete the folder and the database of a copy."""
        shutil.rmtree(self.root)
        if self.bucket:
            _on_server(self.url, f"drop database {make_url(self.url).database} with (force)")


def _on_server(url: str, statement: str) -> None:
    admin = create_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(statement))
    admin.dispose()


class _Watch:
    """Notes the writes of a store, and kills this process before one of them."""

    def __init__(self, root: Path, number: int | None = None) -> None:
        self.root, self.number = str(root.resolve()), number
        self.points: list[str] = []

    def install(self, store: Store) -> None:
        """Replace the functions of this process. It must end with os._exit."""
        for name in _CHANGES:
            setattr(os, name, self._changing(name, getattr(os, name)))
        if not isinstance(store.blobs, LocalBlobs):
            for name in ("put", "put_file", "delete"):
                setattr(store.blobs, name, self._object(name, getattr(store.blobs, name)))
        dialect, scrub = store.engine.dialect, database.scrub
        commit = dialect.do_commit

        def committing(connection: Any) -> None:
            if getattr(connection, "in_transaction", True):
                self._call("commit", lambda: commit(connection))
            else:
                commit(connection)

        dialect.do_commit = committing  # type: ignore[method-assign]
        database.scrub = lambda *given: self._call("scrub", lambda: scrub(*given))

    def _object(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda key, *rest, **named: self._call(f"{name} {key}", lambda: real(key, *rest, **named))

    def _changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(target: Any, *rest: Any, **named: Any) -> Any:
            folder = named.get("dir_fd")
            path = os.path.abspath(target if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{target}")
            if not path.startswith(self.root + os.sep):
                return real(target, *rest, **named)
            return self._call(f"{name} {os.path.relpath(path, self.root)}", lambda: real(target, *rest, **named))

        return change

    def _call(self, what: str, real: Callable[[], Any]) -> Any:
        if len(self.points) == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        self.points.append(what)
        return real()


def record(home: Home, operation: Operation, number: int | None = None) -> list[str]:
    """Run an operation on a store, and kill it before a point. Without one run it whole, and return its points: the
    call and the file of each."""
    listed, watch = home.root.parent / f"{home.root.name}-points.json", _Watch(home.root, number)

    def work() -> None:
        private = home.root.parent / f"{home.root.name}-temporary"
        private.mkdir(exist_ok=True)
        tempfile.tempdir = str(private)
        store = home.open()
        watch.install(store)
        operation(store)
        listed.write_text(json.dumps(watch.points))

    status = run_forked(work)
    if number is not None:
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the operation ended before point {number}"
        return []
    assert status == 0, "it failed"
    found: list[str] = json.loads(listed.read_text())
    return found


def kill_each(made: Home, operation: Operation, check: Operation, samples: int) -> int:
    """Kill an operation at so many of its points, each on a copy of a store, and check what is left in a new process.

    Returns how many points it has. TUNESMITH_KILL_POINTS=all kills it at every one.
    """

    def run(number: int | None) -> list[str]:
        home = made.copy(made.root.parent / f"killed-{number}")
        points = record(home, operation, number)
        assert run_forked(lambda: check(home.open())) == 0, f"wrong after a kill at point {number}"
        home.remove()
        return points

    points = run(None)
    step = 1 if EVERY else max(1, len(points) // samples)
    for number in range(step // 2, len(points), step):
        run(number)
    return len(points)

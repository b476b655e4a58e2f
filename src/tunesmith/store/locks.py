"""Locks between processes: rows of the database, so that no shared folder is needed.

A lock is a lease. Its owner renews it while it works. A lock whose owner is gone is taken over: on the same machine as
soon as the owner's process has ended, from another machine when the lease has run out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
from sqlalchemy import Engine, delete, select, update

from tunesmith.core.errors import TunesmithError
from tunesmith.store import database
from tunesmith.store.tables import LockRow

LEASE_SECONDS = 60.0
COPYING = "copying"  # of whoever copies a store or deletes records: one at a time
ALONE = "alone"  # the lock of an erasure beside it, during which nobody takes another one
# Except these: what a worker sends by webhooks, and a server's notes of what it loaded.
LOADED = "loaded "
_BESIDE = ("webhooks ", LOADED)
# Owners of this process that have ended but could not say so, since the database was away or its disk full.
_ENDED: set[str] = set()


class LockHeld(TunesmithError):
    """Another process or thread holds the lock."""


@contextlib.contextmanager
def lock(engine: Engine, name: str, purpose: str) -> Iterator[None]:
    """Hold the lock of a name. Raises LockHeld at once where another process or thread holds it.

    purpose: what the holder does, for the message.
    """
    owner = uuid.uuid4().hex
    take(engine, name, purpose, owner)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(engine, owner, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        drop(engine, owner)


def abandoned(engine: Engine, prefix: str) -> list[str]:
    """The names that begin with prefix whose lock was left by an owner that is gone."""
    with database.reading(engine) as session:
        held = session.scalars(select(LockRow).where(LockRow.name.startswith(prefix, autoescape=True)))
        return [row.name for row in held if not _alive(row)]


def users_of(engine: Engine, candidates: Collection[str]) -> list[str]:
    """Who holds a lock now, and for what, but for those that an erasure takes itself. Of servers those that loaded one
    of these candidates (digests)."""
    names = tuple(f"{LOADED}{candidate} " for candidate in candidates)
    with database.reading(engine) as session:
        rows = session.scalars(select(LockRow).where(LockRow.name.not_in((COPYING, ALONE))).order_by(LockRow.name))
        held = (row for row in rows if _alive(row) and (row.name.startswith(names) or not row.name.startswith(_BESIDE)))
        return [f"process {row.pid} on {row.host} ({row.purpose})" for row in held]


def drop(engine: Engine, owner: str) -> None:
    """Let go of all that an owner holds."""
    _ENDED.add(owner)
    with database.writing(engine) as session:
        session.execute(delete(LockRow).where(LockRow.owner == owner))
    _ENDED.discard(owner)


def renew(engine: Engine, owner: str) -> None:
    """Hold for longer what an owner holds."""
    with database.writing(engine) as session:
        mine = update(LockRow).where(LockRow.owner == owner)
        session.execute(mine.values(until=time.time() + LEASE_SECONDS))


def take(engine: Engine, name: str, purpose: str, owner: str) -> None:
    """Hold a lock until `drop`, or for LEASE_SECONDS after `renew` where this process is seen from other machines.
    Raises LockHeld as `lock` does."""
    with database.writing(engine) as session:
        against = (name,) if name.startswith(_BESIDE) else (name, ALONE)
        rows = (row for each in against if (row := session.get(LockRow, each)) and row.owner != owner)
        held = next(filter(_alive, rows), None)
        if held is not None:
            raise LockHeld(
                f"another process is at work here ({held.purpose})",
                where=f"process {held.pid} on {held.host}",
                fix="wait for it, or stop it",
            )
        place = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        session.merge(
            LockRow(name=name, owner=owner, purpose=purpose, until=time.time() + LEASE_SECONDS, **place),
        )


def _alive(held: LockRow) -> bool:
    """Whether a lock's owner still works."""
    if held.owner in _ENDED:
        return False
    if held.host != socket.gethostname():
        return held.until > time.time()
    try:
        # A process number may be given to another process later; when it started tells them apart.
        return abs(_started(held.pid) - held.started) < 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return held.until > time.time()


def _started(process: int) -> float:
    """A number for when a process started, the same whatever happens to the clock. Raises as psutil.Process does.

    The time since boot in clock ticks, below 2 ** 36, and 16 bits for the boot itself: a float holds both. The time
    since 1970 that psutil computes moves with every correction of the clock; it is taken where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return float(psutil.Process(process).create_time())
    since_boot = int(fields[19])  # the 22nd of all, proc(5)
    return float(int.from_bytes(hashlib.sha256(boot).digest()[:2]) << 36 | since_boot)


def _renew(engine: Engine, owner: str, ended: threading.Event) -> None:
    while not ended.wait(LEASE_SECONDS / 3):
        # If the database cannot be reached for a moment, the next turn renews the lease.
        with contextlib.suppress(TunesmithError):
            renew(engine, owner)

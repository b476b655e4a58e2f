"""Locks between processes: rows of the database, so that no shared folder is needed.

A lock is a lease. Its owner renews it while it works. A lock whose owner is gone is taken over: on the same machine as
soon as the owner's process has ended, from another machine when the lease has run out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import psutil
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from tunesmith.core.errors import TunesmithError
from tunesmith.store import database
from tunesmith.store.tables import LockRow

LEASE_SECONDS = 60.0
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
    _take(engine, name, purpose, owner)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(engine, name, owner, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        _ENDED.add(owner)
        with database.writing(engine) as session:
            session.execute(delete(LockRow).where(LockRow.name == name, LockRow.owner == owner))
        _ENDED.discard(owner)


def abandoned(engine: Engine, prefix: str) -> list[str]:
    """The names that begin with prefix whose lock was left by an owner that is gone."""
    with database.reading(engine) as session:
        held = session.scalars(select(LockRow).where(LockRow.name.startswith(prefix, autoescape=True)))
        return [row.name for row in held if not _alive(row)]


def _take(engine: Engine, name: str, purpose: str, owner: str) -> None:
    with database.writing(engine) as session:
        held = session.get(LockRow, name)
        if held is not None and _alive(held):
            raise LockHeld(
                f"another process is at work here ({held.purpose})",
                where=f"process {held.pid} on {held.host}",
                fix="wait for it, or stop it",
            )
        place = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
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
        # A process number may be given to another process later; the time when it started tells them apart.
        return bool(abs(psutil.Process(held.pid).create_time() - held.started) < 1.0)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return held.until > time.time()


def _renew(engine: Engine, name: str, owner: str, ended: threading.Event) -> None:
    while not ended.wait(LEASE_SECONDS / 3):
        # If the database cannot be reached for a moment, the next turn renews the lease.
        with contextlib.suppress(TunesmithError), database.writing(engine) as session:
            _extend(session, name, owner)


def _extend(session: Session, name: str, owner: str) -> None:
    mine = (LockRow.name == name, LockRow.owner == owner)
    session.execute(update(LockRow).where(*mine).values(until=time.time() + LEASE_SECONDS))

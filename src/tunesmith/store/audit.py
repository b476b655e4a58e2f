"""The audit log: a hash chain in the database, its newest link also kept in a file, so that a cut tail shows.

Someone who can write both the database and the file can write a whole new chain. What they cannot change is a head that
was kept elsewhere: the registry signs the newest head into every version and approval, and `audit verify --head` takes
one that a person wrote down.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical, digest_of
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import write_atomic
from tunesmith.store.tables import AuditRow

GENESIS = digest_of("tunesmith audit log")
_HEAD_FILE = "audit-head.json"


class Head(BaseModel):
    """The newest entry: its number and digest. Number 0 is the log before its first entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    digest: str


class Pin(BaseModel):
    """A head that something outside the log bears witness to. witness: what messages call it."""

    witness: str
    head: Head


def append(session: Session, *, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> Head:
    """Add an entry inside the caller's transaction. Raises UsageError for detail that is not JSON."""
    previous = newest(session)
    row = AuditRow(
        seq=previous.seq + 1,
        at=stamp(),
        actor=actor,
        action=action,
        subject=subject,
        detail=dict(detail),
        previous=previous.digest,
    )
    row.digest = _digest(row)
    session.add(row)
    session.flush()
    return Head(seq=row.seq, digest=row.digest)


def newest(session: Session) -> Head:
    """The newest entry that this session sees."""
    found = session.execute(select(AuditRow.seq, AuditRow.digest).order_by(AuditRow.seq.desc()).limit(1)).first()
    return Head(seq=found[0], digest=found[1]) if found else Head(seq=0, digest=GENESIS)


def write_head(root: Path, head: Head) -> None:
    """Keep the newest link outside the database. A crash before this leaves an older head, which is not an error.

    Raises TunesmithError where the file cannot be written; the change itself is committed by then.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Two writers that committed in one order may arrive here in the other: the head must never go back.
        with (root / f".{_HEAD_FILE}.lock").open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            try:
                current = _read_head(root)
            except _Unreadable:
                return  # writing over it would hide what `verify` must report
            if current is None or current.seq < head.seq:
                write_atomic(root / _HEAD_FILE, canonical(head.model_dump()))
    except OSError as error:
        raise TunesmithError(
            f"entry {head.seq} of the audit log is committed, but its head could not be kept beside it: {error}",
            where=str(root / _HEAD_FILE),
            fix="free space or restore access; the next change writes the head again",
        ) from error


def entries(session: Session) -> list[AuditRow]:
    """All entries, oldest first."""
    return list(session.scalars(select(AuditRow).order_by(AuditRow.seq)))


def verify(session: Session, root: Path, pins: Iterable[Pin] = ()) -> list[str]:
    """What is wrong with the log, in sentences; empty where the chain is whole and reaches every head known elsewhere.

    pins: heads beside the one in the file. A head that the chain does not hold means a cut tail or a rewritten past.
    """
    problems: list[str] = []
    digests = {0: GENESIS}
    previous = Head(seq=0, digest=GENESIS)
    try:
        for row in session.scalars(select(AuditRow).order_by(AuditRow.seq).execution_options(yield_per=1000)):
            problems += _link_problems(row, previous)
            previous = Head(seq=row.seq, digest=row.digest)
            digests[row.seq] = row.digest
    except ValueError as error:
        problems.append(f"an entry after {previous.seq} cannot be read: {error}")
    witnesses = list(pins)
    try:
        kept = _read_head(root)
        if kept is not None:
            witnesses.append(Pin(witness=_HEAD_FILE, head=kept))
        elif len(digests) > 1:
            problems.append(f"{_HEAD_FILE} is missing, so a cut tail would not show")
    except _Unreadable as error:
        problems.append(f"{_HEAD_FILE} cannot be read: {error}")
    for pin in witnesses:
        if pin.head.seq not in digests:
            problems.append(f"entry {pin.head.seq}, which {pin.witness} bears witness to, is missing: the tail was cut")
        elif digests[pin.head.seq] != pin.head.digest:
            problems.append(
                f"entry {pin.head.seq} is not the one {pin.witness} bears witness to: the log was rewritten"
            )
    return problems


def _link_problems(row: AuditRow, previous: Head) -> list[str]:
    problems = []
    if row.seq != previous.seq + 1:
        problems.append(f"entry {previous.seq + 1} is missing: the next one is numbered {row.seq}")
    elif row.previous != previous.digest:
        problems.append(f"entry {row.seq} does not follow entry {previous.seq}")
    try:
        whole = _digest(row) == row.digest
    except TunesmithError:  # what was put in is not even JSON
        whole = False
    if not whole:
        problems.append(f"entry {row.seq} was changed after it was written")
    return problems


def _digest(row: AuditRow) -> str:
    fields = ("seq", "at", "actor", "action", "subject", "detail", "previous")
    return digest_of({field: getattr(row, field) for field in fields})


def _read_head(root: Path) -> Head | None:
    path = root / _HEAD_FILE
    try:
        return Head.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise _Unreadable(type(error).__name__) from error


class _Unreadable(Exception):
    pass

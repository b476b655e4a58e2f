"""The audit log: a hash chain in the database, its newest link also kept in a file, so that a cut tail shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical, digest_of
from tunesmith.core.files import write_atomic
from tunesmith.store.tables import AuditRow

GENESIS = digest_of("tunesmith audit log")
_HEAD_FILE = "audit-head.json"


class Head(BaseModel):
    """The newest entry: its number and digest."""

    seq: int
    digest: str


def append(session: Session, *, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> Head:
    """Add an entry inside the caller's transaction."""
    newest = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc()).limit(1)).first()
    seq, previous = (newest.seq + 1, newest.digest) if newest else (1, GENESIS)
    row = AuditRow(
        seq=seq, at=stamp(), actor=actor, action=action, subject=subject, detail=dict(detail), previous=previous
    )
    row.digest = _digest(row)
    session.add(row)
    session.flush()
    return Head(seq=seq, digest=row.digest)


def write_head(root: Path, head: Head) -> None:
    """Keep the newest link outside the database. A crash before this leaves an older head, which is not an error."""
    current = _read_head(root)
    if current is None or current.seq < head.seq:
        write_atomic(root / _HEAD_FILE, canonical(head.model_dump()))


def entries(session: Session) -> list[AuditRow]:
    """All entries, oldest first."""
    return list(session.scalars(select(AuditRow).order_by(AuditRow.seq)))


def verify(session: Session, root: Path) -> list[str]:
    """What is wrong with the log, in sentences; empty where the chain is whole and reaches the kept head."""
    problems: list[str] = []
    previous, seen = GENESIS, {}
    for expected, row in enumerate(entries(session), start=1):
        if row.seq != expected:
            problems.append(f"entry {expected} is missing: the next one is numbered {row.seq}")
            break
        if row.previous != previous:
            problems.append(f"entry {row.seq} does not follow entry {row.seq - 1}")
        if _digest(row) != row.digest:
            problems.append(f"entry {row.seq} was changed after it was written")
        previous = row.digest
        seen[row.seq] = row.digest
    head = _read_head(root)
    if head is None and seen:
        problems.append(f"{_HEAD_FILE} is missing, so a cut tail would not show")
    elif head is not None and seen.get(head.seq) != head.digest:
        problems.append(f"entry {head.seq}, the newest one known, is missing or not the one that was written")
    return problems


def _digest(row: AuditRow) -> str:
    fields = ("seq", "at", "actor", "action", "subject", "detail", "previous")
    return digest_of({field: getattr(row, field) for field in fields})


def _read_head(root: Path) -> Head | None:
    path = root / _HEAD_FILE
    return Head.model_validate(json.loads(path.read_bytes())) if path.is_file() else None

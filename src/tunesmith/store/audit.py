"""The audit log: a hash chain in the database. A separate row, the head, also names the newest entry.

A changed, missing or reordered entry breaks the chain, and a log that was cut does not reach its head. Somebody who can
write the whole database can write a new chain and a new head. They cannot change a head that was kept elsewhere: the
registry signs the newest head into every version and approval, `audit anchor` writes it to a place outside, and
`audit verify --head` takes one that a person wrote down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Engine, bindparam, insert, select, update
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_of
from tunesmith.core.errors import TunesmithError
from tunesmith.core.reading.strict_json import Fields
from tunesmith.core.values import Frozen
from tunesmith.store import database
from tunesmith.store.tables import AuditHeadRow, AuditRow

GENESIS = digest_of("tunesmith audit log")
_ONLY_ROW = 1
# Statements on the tables themselves, made once: every write transaction that changes something executes them.
_LOG, _HEAD = (AuditRow.metadata.tables[row.__tablename__] for row in (AuditRow, AuditHeadRow))
_ADD = insert(_LOG)
_MOVE = (
    update(_HEAD)
    .where(_HEAD.c.seq == bindparam("from_seq"), _HEAD.c.digest == bindparam("from_digest"))
    .values(seq=bindparam("to_seq"), digest=bindparam("to_digest"))
)
_NEWEST = select(AuditRow.seq, AuditRow.digest).order_by(AuditRow.seq.desc()).limit(1)


class Head(Frozen):
    """The newest entry: its number and digest. Number 0 is the log before its first entry."""

    seq: int
    digest: str


class Pin(Frozen):
    """A head that was kept outside the log. witness: what messages call the place. outside: not in the database."""

    witness: str
    head: Head
    outside: bool = True


def append(session: Session, *, actor: str, action: str, subject: str, detail: Fields) -> None:
    """Add an entry inside the caller's transaction. Raises UsageError for detail that is not JSON."""
    previous = newest(session)
    entry = {
        "seq": previous.seq + 1,
        "at": stamp(),
        "actor": actor,
        "action": action,
        "subject": subject,
        "detail": dict(detail),
        "previous": previous.digest,
    }
    head = Head(seq=previous.seq + 1, digest=digest_of(entry))
    session.execute(_ADD, {**entry, "digest": head.digest})
    _move_head(session, previous, head)


def _move_head(session: Session, before: Head, after: Head) -> None:
    """Move the head from one entry to the next.

    A head that names another entry stays as it is: moving it would hide from `verify` that the log was cut.
    """
    if before.seq == 0 and session.get(AuditHeadRow, _ONLY_ROW) is None:
        session.add(AuditHeadRow(id=_ONLY_ROW, **after.model_dump()))
        session.flush()
        return
    moved = {"from_seq": before.seq, "from_digest": before.digest, "to_seq": after.seq, "to_digest": after.digest}
    session.execute(_MOVE, moved)


def newest(session: Session) -> Head:
    """The newest entry that a session sees."""
    row = session.execute(_NEWEST).first()
    return Head(seq=row[0], digest=row[1]) if row else Head(seq=0, digest=GENESIS)


def revision(engine: Engine) -> Sequence[Any] | None:
    """Number and digest of the newest entry that was committed; None for a log without entries. For comparisons: it
    costs less than `newest`."""
    return database.first_row(engine, _NEWEST)


def entries(session: Session) -> list[AuditRow]:
    """All entries, oldest first."""
    return list(session.scalars(select(AuditRow).order_by(AuditRow.seq)))


def verify(session: Session, pins: Iterable[Pin] = ()) -> list[str]:
    """What is wrong with the log, in sentences; empty where the chain is whole and holds every head kept elsewhere.

    pins: heads that are kept elsewhere. A head that the chain does not hold means a cut tail or a rewritten past.
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
    kept = session.get(AuditHeadRow, _ONLY_ROW)
    if kept is not None:
        pins = [Pin(witness="the log's head", head=Head(seq=kept.seq, digest=kept.digest), outside=False), *pins]
    elif len(digests) > 1:
        problems.append("the log's head is missing, so a cut tail would not show")
    for pin in pins:
        if pin.head.seq not in digests:
            cause = f"the tail was cut{', or an old copy of the store was put back' if pin.outside else ''}"
            problems.append(f"entry {pin.head.seq}, which {pin.witness} names, is missing: {cause}")
        elif digests[pin.head.seq] != pin.head.digest:
            cause = f"the log was rewritten{', or an old copy was put back and used' if pin.outside else ''}"
            problems.append(f"entry {pin.head.seq} is not the one that {pin.witness} names: {cause}")
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

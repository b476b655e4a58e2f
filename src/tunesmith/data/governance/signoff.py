"""A steward's sign-off: who looked at a dataset version and stands behind it, in the audit log and as a record."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.data.building.verify import verify_dataset
from tunesmith.store import database, identities
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

ACTION = "data.sign"


def sign_off(store: Store, digest: str, *, steward: str, reason: str) -> str:
    """Enter that a steward stands behind a dataset version; returns the sign-off record's digest.

    The version is verified first. Raises Refused where it does not verify or the user may not, UsageError without a
    reason: what was looked at is what a sign-off is worth.
    """
    identities.require(store, steward, ACTION)
    if not reason.strip():
        raise UsageError("a sign-off needs a reason", fix='--reason "what was looked at"')
    found = verify_dataset(store, digest)
    if not found.ok:
        first = found.problems[0]
        raise Refused(f"the dataset version does not verify: {first.reason}", where=first.path)
    detail: dict[str, Any] = {}
    with store.change(steward, ACTION, digest, detail) as session:
        identities.require(session, steward, ACTION)  # a role taken away meanwhile counts
        body = {"steward": steward, "reason": reason.strip(), "at": stamp()}
        record = Record(kind="signoff", parents={"dataset": digest}, blobs={}, body=body)
        store.put_record(record, session)
        detail |= {"signoff": record.digest, "reason": reason.strip()}
    return record.digest


def sign_offs(store: Store, digest: str) -> list[dict[str, Any]]:
    """The sign-offs that count now: [{"signoff", "steward", "reason", "at"}], oldest first.

    One counts while the log holds it, its record says the same, and its steward is still one.
    """
    with database.reading(store.engine) as session:
        return [found for row in _entries(session, digest) if (found := _standing(store, session, digest, row))]


def require_signed(store: Store, digest: str) -> None:
    """Raises Refused where no sign-off of a dataset version counts now."""
    if not sign_offs(store, digest):
        raise Refused(
            f"no steward stands behind dataset version {short(digest)}",
            where="data.sign_off",
            fix=f'have a steward run: tunesmith data sign {short(digest)} --reason "what was looked at" --as NAME',
        )


def _entries(session: Session, digest: str) -> list[AuditRow]:
    query = select(AuditRow).where(AuditRow.action == ACTION, AuditRow.subject == digest).order_by(AuditRow.seq)
    return list(session.scalars(query))


def _standing(store: Store, session: Session, digest: str, entry: AuditRow) -> dict[str, Any] | None:
    try:
        record = store.record(str(entry.detail.get("signoff")), kind="signoff")
        identities.require(session, entry.actor, ACTION)
    except TunesmithError:
        return None
    same = record.parents == {"dataset": digest} and record.body["steward"] == entry.actor
    return {"signoff": record.digest, **record.body} if same else None

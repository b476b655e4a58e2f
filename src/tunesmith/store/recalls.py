"""What was withdrawn and must not be served or built on any more."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.store.tables import RecallRow


def recalled(session: Session, digest: str, *, as_evidence: bool = False) -> str | None:
    """Why a record was withdrawn, or None where it was not. The oldest reason where there are several.

    as_evidence: for something that was merely measured beside it, the recall of a version is no reason: its weights
    are not in what was measured against them.
    """
    query = select(RecallRow.reason).where(RecallRow.digest == digest).order_by(RecallRow.at, RecallRow.cause)
    if as_evidence:
        query = query.where(~RecallRow.cause.startswith("version "))
    return session.scalars(query.limit(1)).first()


def causes(session: Session) -> dict[str, list[str]]:
    """Cause (`licence CC-BY-NC-4.0`) -> digests of the records that it reached, in the order of the causes."""
    found: dict[str, list[str]] = {}
    for cause, digest in session.execute(select(RecallRow.cause, RecallRow.digest).order_by(RecallRow.cause)):
        found.setdefault(cause, []).append(digest)
    return found

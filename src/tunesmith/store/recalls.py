"""What was withdrawn and must not be served or built on any more."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.store.tables import RecallRow


def recalled(session: Session, digest: str) -> str | None:
    """Why a record was withdrawn, or None where it was not. The oldest reason where there are several."""
    query = select(RecallRow.reason).where(RecallRow.digest == digest).order_by(RecallRow.at, RecallRow.cause)
    return session.scalars(query.limit(1)).first()

"""Records that were recalled: they may no longer be served or used to build others."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.store.tables import EdgeRow, RecallRow


def reasons_of_recalls(session: Session, digests: Sequence[str]) -> dict[str, str]:
    """Digest -> why a record was recalled as evidence (see `recalled`), for those that were. One query for all."""
    query = select(RecallRow.digest, RecallRow.reason).where(
        RecallRow.digest.in_(digests), ~RecallRow.cause.startswith("version ")
    )
    newest_first = query.order_by(RecallRow.at.desc(), RecallRow.cause.desc())
    return {digest: reason for digest, reason in session.execute(newest_first)}  # noqa: C416 - rows are no pairs


def recalled(session: Session, digest: str, *, as_evidence: bool = False) -> str | None:
    """Why a record was recalled, or None if it was not. The oldest reason if there are several.

    as_evidence: ignore recalls of a version. A candidate that was only compared with that version does not contain its
    weights.
    """
    query = select(RecallRow.reason).where(RecallRow.digest == digest).order_by(RecallRow.at, RecallRow.cause)
    if as_evidence:
        query = query.where(~RecallRow.cause.startswith("version "))
    return session.scalars(query.limit(1)).first()


def ancestor_recalled(session: Session, digest: str) -> str | None:
    """Why a record that this one was made from was recalled as evidence (see `recalled`), or None if none was."""
    found, waiting = set[str](), {digest}
    while waiting:
        found |= waiting
        waiting = set(session.scalars(select(EdgeRow.parent).where(EdgeRow.child.in_(waiting)))) - found
    return next(iter(reasons_of_recalls(session, sorted(found - {digest})).values()), None)


def causes(session: Session) -> dict[str, list[str]]:
    """Cause, such as `licence CC-BY-NC-4.0` -> digests of the records that it reached. Sorted by cause."""
    found: dict[str, list[str]] = {}
    for cause, digest in session.execute(select(RecallRow.cause, RecallRow.digest).order_by(RecallRow.cause)):
        found.setdefault(cause, []).append(digest)
    return found

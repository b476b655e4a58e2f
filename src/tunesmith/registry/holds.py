"""Legal holds: while a version is held, nothing that it was made from is erased.

The audit log alone keeps them: the newest entry about a version says whether it is held. So a hold cannot be lifted
without an entry. Pruning leaves what any version reaches, held or not.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.values import View
from tunesmith.store.tables import AuditRow

HOLD = "version.hold"


class Held(View):
    """A version that is held, or whose hold ended: since when, by whom and why. version: its label, NAME@v3."""

    version: str
    held: bool
    at: str
    by: str
    reason: str

    @property
    def said(self) -> str:
        """`home@v3 is held by sue (2026-01-31): a lawsuit`."""
        how = "is held" if self.held else "was released"
        return f"{self.version} {how} by {self.by} ({self.at[:10]}): {self.reason}"


def held_versions(session: Session) -> dict[str, Held]:
    """The holds that are in force, by the digests of their versions."""
    entries = select(AuditRow).where(AuditRow.action == HOLD).order_by(AuditRow.seq)
    newest = {row.subject: Held(by=row.actor, at=row.at, **row.detail) for row in session.scalars(entries)}
    return {digest: held for digest, held in newest.items() if held.held}


def refuse_held(session: Session, digests: Collection[str]) -> None:
    """Raise Refused where one of these is a version that is held."""
    for digest, held in held_versions(session).items():
        if digest in digests:
            fix = NextStep("have the hold ended first", "hold", version=held.version, end=True, reason=...)
            raise Refused(f"{held.said}; nothing that it was made from is erased", where=held.version, fix=fix)

"""The audit log: its verification and its entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunesmith.core.digests import is_digest
from tunesmith.core.errors import UsageError
from tunesmith.core.view import Problem, View
from tunesmith.registry.history import verify_log
from tunesmith.store import audit, database
from tunesmith.store.audit import Head
from tunesmith.store.store import Store


class AuditVerification(View):
    """Whether the log is unchanged. checked: number of entries; head: the newest entry, to be kept elsewhere."""

    ok: bool
    checked: int
    problems: tuple[Problem, ...]
    head: Head


class AuditEntry(View):
    """One change: who did what to what, and when."""

    seq: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


class AuditLog(View):
    """The newest entries that were asked for. total: how many match, shown or not."""

    entries: tuple[AuditEntry, ...]
    total: int


def verify_audit(store: Store, heads: Iterable[str] = ()) -> AuditVerification:
    """Compare the log with its own digests, with signed records and with the state that it describes.

    heads: entries that the caller kept elsewhere, as `12:sha256:...`. Raises UsageError for text that is no entry.
    """
    reasons = verify_log(store, [_head(text) for text in heads])
    with database.reading(store.engine) as session:
        newest = audit.newest(session)
    problems = tuple(Problem(path="audit log", reason=reason) for reason in reasons)
    return AuditVerification(ok=not problems, checked=newest.seq, problems=problems, head=newest)


def show_audit(store: Store, *, subject: str | None = None, action: str | None = None, limit: int = 0) -> AuditLog:
    """The newest entries, oldest first. limit: how many; 0 for all."""
    with database.reading(store.engine) as session:
        found = [
            AuditEntry(
                seq=row.seq, at=row.at, actor=row.actor, action=row.action, subject=row.subject, detail=dict(row.detail)
            )
            for row in audit.entries(session)
            if subject in (None, row.subject) and action in (None, row.action)
        ]
    return AuditLog(entries=tuple(found[-limit:] if limit else found), total=len(found))


def _head(text: str) -> Head:
    number, _, digest = text.partition(":")
    if not number.isdecimal() or not is_digest(digest):
        raise UsageError(f"{text[:100]!r} is not an entry", fix="write 12:sha256:..., as `audit verify` prints it")
    return Head(seq=int(number), digest=digest)

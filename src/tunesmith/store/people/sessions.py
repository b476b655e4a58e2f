"""Sessions of the web console, and the one-time links that open them.

A link and a session's cookie are secrets of 256 random bits, of which the store keeps digests. A session ends 12 hours
after it was opened, or after two hours without a request. Its cookie is replaced by a new one every 15 minutes; the one
before holds for another minute, for requests that were under way.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.store.people.identities import User, changing, get_user, user_row
from tunesmith.store.people.tokens import secret_digest, time_or_now
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, LoginLinkRow, SessionRow, UserRow

LINK_SECONDS = 600.0
SESSION_SECONDS, IDLE_SECONDS = 12 * 3600.0, 2 * 3600.0
REPLACE_SECONDS, BEFORE_SECONDS = 900.0, 60.0
_USED_SECONDS = 60.0  # `used` is written this seldom
_BYTES = 32
_OPENED = "session.open"


class OpenSession(NamedTuple):
    """A session that may go on. secret: the cookie's value from now on, None where the one that was sent stays."""

    id: str
    user: User
    secret: str | None


def make_link(store: Store, name: str, *, actor: str, account: str = "", now: float | None = None) -> str:
    """The secret of a link that logs a user in once, within ten minutes. Every user may make their own, an admin
    anybody's. account: on whose account of the machine the command ran, for the audit log.

    Raises Refused for anybody else, or where the user is deactivated.
    """
    secret, at = secrets.token_urlsafe(_BYTES), time_or_now(now)
    with changing(store, actor, "session.link", name, own=True) as (session, detail):
        detail |= {"account": account} if account else {}
        if not user_row(session, name).active:
            raise Refused(f"{name} is deactivated", fix="add a new user")
        session.execute(delete(LoginLinkRow).where(LoginLinkRow.until < at))
        session.add(LoginLinkRow(digest=secret_digest(secret), user=name, made_by=actor, until=at + LINK_SECONDS))
    return secret


def link_user(store: Store, link: str, *, now: float | None = None) -> User | None:
    """Whom a link would log in now; None where it was used, has ended or never was."""
    with store.reading() as session:
        row = session.get(LoginLinkRow, secret_digest(link))
        if row is None or row.until < time_or_now(now):
            return None
        user = get_user(session, row.user)
    return user if user.active else None


def follow_link(store: Store, link: str, *, now: float | None = None) -> OpenSession | None:
    """Open a session by a link, which no longer works then. None where it was used, has ended or never was."""
    user = link_user(store, link, now=now)
    return None if user is None else open_session(store, user.name, link=link, how="link", now=now)


def open_session(
    store: Store, name: str, *, how: str, link: str | None = None, now: float | None = None
) -> OpenSession | None:
    """Open a session for a user who has shown who they are. how: for the audit log. link: used up by it; None is
    returned where another request was first."""
    secret, at, number = secrets.token_urlsafe(_BYTES), time_or_now(now), secrets.token_hex(16)
    detail: dict[str, str | None] = {"session": _shown(number), "how": how}
    with contextlib.suppress(_AlreadyUsed), store.change(name, _OPENED, name, detail) as session:
        user = get_user(session, name)
        if link is not None:
            used = delete(LoginLinkRow).where(LoginLinkRow.digest == secret_digest(link))
            detail["by"] = session.scalars(used.returning(LoginLinkRow.made_by)).first()
            if detail["by"] is None:
                raise _AlreadyUsed
        if not user.active:
            raise Refused(f"{name} is deactivated", fix="ask an admin")
        session.execute(delete(SessionRow).where(or_(SessionRow.until < at, SessionRow.used < at - IDLE_SECONDS)))
        times = {"opened": at, "changed": at, "used": at, "until": at + SESSION_SECONDS}
        session.add(SessionRow(id=number, digest=secret_digest(secret), user=name, **times))
        return OpenSession(number, user, secret)
    return None


def continue_session(store: Store, secret: str, *, now: float | None = None) -> OpenSession | None:
    """The session of a cookie, with the cookie's next value where it is time for one. None where it may not go on."""
    at, digest = time_or_now(now), secret_digest(secret)
    with store.reading() as session:
        known = _row(session, digest)
        if known is None or not _may_go_on(known, digest, at):
            return None
        user = get_user(session, known.user)
    if not user.active:
        return None
    replaces = known.digest == digest and at - known.changed >= REPLACE_SECONDS
    if not replaces and at - known.used < _USED_SECONDS:
        return OpenSession(known.id, user, None)
    with store.writing() as session:
        row = _row(session, digest)
        if row is None:
            return None
        row.used = at
        if not replaces or row.digest != digest:  # another request replaced it first
            return OpenSession(known.id, user, None)
        following = secrets.token_urlsafe(_BYTES)
        row.digest, row.before, row.changed = secret_digest(following), digest, at
    return OpenSession(known.id, user, following)


def open_among(store: Store, numbers: Sequence[str], *, now: float | None = None) -> frozenset[str]:
    """Those of some sessions that may still go on."""
    query = select(SessionRow).join(UserRow, UserRow.name == SessionRow.user)
    with store.reading() as session:
        rows = session.scalars(query.where(SessionRow.id.in_(numbers), UserRow.active))
        return frozenset(row.id for row in rows if _may_go_on(row, row.digest, time_or_now(now)))


def end_session(store: Store, number: str, *, actor: str) -> None:
    """End a session at once. Does nothing where it has ended."""
    with store.change(actor, "session.end", actor, {"session": _shown(number)}) as session:
        session.execute(delete(SessionRow).where(SessionRow.id == number))


def link_maker(session: Session, number: str, user: str) -> str | None:
    """Who made the link that opened a session of a user. None where the identity provider said who they are."""
    opened = select(AuditRow).where(AuditRow.action == _OPENED, AuditRow.subject == user).order_by(AuditRow.seq.desc())
    for row in session.scalars(opened):
        if row.detail.get("session") == _shown(number):
            by = row.detail.get("by")
            return None if by is None else str(by)
    raise Refused(f"the audit log does not say how this session of {user} was opened", fix="log in again")


class _AlreadyUsed(Exception):
    pass


def _row(session: Session, digest: str) -> SessionRow | None:
    query = select(SessionRow).where(or_(SessionRow.digest == digest, SessionRow.before == digest))
    return session.scalars(query).first()


def _may_go_on(row: SessionRow, digest: str, at: float) -> bool:
    replaced = row.digest != digest and at - row.changed > BEFORE_SECONDS
    return not replaced and at <= row.until and at - row.used <= IDLE_SECONDS


def _shown(number: str) -> str:
    """A session's name in the audit log. Forms are protected by its number, so the log does not show that."""
    return digest_bytes(number.encode())[7:23]

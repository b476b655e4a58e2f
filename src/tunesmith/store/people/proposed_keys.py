"""Public keys that a user proposes for themself. One counts once an admin has confirmed it by its fingerprint.

A proposal is an entry of the audit log and nothing else. It waits until its key is enrolled, or until its user or an
admin ends it.

A key must not be proposed and confirmed by one person. A session is in the hands of its user and of whoever made the
link that opened it, so no one of those who proposed may be one of those who confirm.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.values import View
from tunesmith.store.people.identities import User, changing, check_new_key
from tunesmith.store.people.sessions import link_maker
from tunesmith.store.people.user_keys import enrol_key
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, KeyRow, UserRow

_PROPOSED, _ENDED = "user.key.propose", "user.key.reject"
_MOST = 5  # that wait for one user
_LEAST_DIGITS = 20  # 80 bits: nobody finds a second key whose fingerprint begins so


class ProposedKey(View):
    """A key that waits for an admin. public_key: PEM; fingerprint: of that text; at: when it was proposed.

    link_by: who made the link that opened the session in which it was proposed, and so may not confirm it; None for no
    link.
    """

    user: str
    fingerprint: str
    public_key: Annotated[str, Field(exclude=True)]
    at: str
    link_by: str | None


def propose_key(store: Store, name: str, public_key: str, *, actor: str, session: str | None = None) -> ProposedKey:
    """Keep a public key (PEM, as `public_pem` spells it) that a user wants to sign with. Proposed twice, it stays once.

    session: the console's session in which actor does so. Raises Refused if anybody has or had this key, UsageError if
    too many keys of the user wait.
    """
    fingerprint = digest_bytes(public_key.encode())
    for known in waiting_keys(store, name):
        if known.fingerprint == fingerprint:
            return known
    with changing(store, actor, _PROPOSED, name, own=True) as (change, detail):
        check_new_key(change, name, fingerprint)
        if len(_waiting(change, name)) >= _MOST:
            raise UsageError(f"{_MOST} keys of {name} wait for an admin", where=name, fix="withdraw one of them")
        detail |= {"key": fingerprint, "public_key": public_key}
        if session is not None and (maker := link_maker(change, session, actor)) is not None:
            detail["link_by"] = maker
    return next(key for key in waiting_keys(store, name) if key.fingerprint == fingerprint)


def confirm_key(store: Store, name: str, fingerprint: str, *, actor: str, session: str | None = None) -> User:
    """Enrol a proposed key. fingerprint: its first 20 hex digits or more, as the user told them to the admin.

    session: the console's session in which actor does so. Raises UsageError if no key of that user waits under it,
    Refused unless actor is an admin, and nobody had a hand in both sessions.
    """
    key = _find(store, name, fingerprint)
    fix = "have another admin confirm it"
    if actor == name:
        raise Refused(f"{name} proposed this key", where=name, fix=fix)
    hands = {actor}
    if session is not None:
        with store.reading() as reading:
            hands.add(link_maker(reading, session, actor) or actor)
    if both := hands & {name, key.link_by}:
        raise Refused(
            f"{both.pop()} made the link of a session in which this key was proposed or is confirmed: the two take "
            "different people",
            where=name,
            fix=f"{fix}, who made neither link; or {name} proposes it again after a login by the identity provider",
        )
    return enrol_key(store, name, key.public_key, actor=actor)


def reject_key(store: Store, name: str, fingerprint: str, *, actor: str) -> ProposedKey:
    """End a proposal. Its user may, and every admin. Raises as confirm_key does for a key that does not wait."""
    key = _find(store, name, fingerprint)
    with changing(store, actor, _ENDED, name, own=True) as (_, detail):
        detail |= {"key": key.fingerprint}
    return key


def waiting_keys(store: Store, name: str | None = None) -> list[ProposedKey]:
    """The keys that wait, the oldest first. name: only those of this user."""
    with store.reading() as session:
        return _waiting(session, name)


def _waiting(session: Session, name: str | None) -> list[ProposedKey]:
    entries = select(AuditRow).where(AuditRow.action.in_((_PROPOSED, _ENDED))).order_by(AuditRow.seq)
    waiting: dict[tuple[str, str], ProposedKey] = {}
    for row in session.scalars(entries if name is None else entries.where(AuditRow.subject == name)):
        key = (row.subject, str(row.detail["key"]))
        if row.action == _PROPOSED:
            more = {"public_key": row.detail["public_key"], "link_by": row.detail.get("link_by")}
            waiting[key] = ProposedKey(user=key[0], fingerprint=key[1], at=row.at, **more)
        else:
            waiting.pop(key, None)
    keys, users = {key for _, key in waiting}, {user for user, _ in waiting}
    enrolled = set(session.scalars(select(KeyRow.fingerprint).where(KeyRow.fingerprint.in_(keys))))
    active = set(session.scalars(select(UserRow.name).where(UserRow.name.in_(users), UserRow.active)))
    return [one for one in waiting.values() if one.fingerprint not in enrolled and one.user in active]


def _find(store: Store, name: str, fingerprint: str) -> ProposedKey:
    digits = "".join(fingerprint.split()).lower().removeprefix("sha256:")
    if not _LEAST_DIGITS <= len(digits) <= 64:
        raise UsageError(f"give the first {_LEAST_DIGITS} digits of the fingerprint or more", where=name)
    for key in waiting_keys(store, name):
        if key.fingerprint.removeprefix("sha256:").startswith(digits):
            return key
    raise UsageError(
        f"no key of {name} waits under this fingerprint",
        where=name,
        fix=NextStep(f"compare it again with what {name} reads on their page My keys", "keys list"),
    )

"""Users and their roles. Every change is one transaction with its audit entry.

The first user of a store is its owner, with the roles admin and engineer. The owner's name is $TUNESMITH_USER, else the
name of the operating system's user. On the command line, everybody who may write the store's files can act as any user;
over HTTP a token says who acts. Signatures protect against a person who can write the store (registry/).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import time
from collections.abc import Iterable, Iterator

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Forbidden, NextStep, NotThere, Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope, check_name, check_new_name
from tunesmith.core.values import ScopedView, View
from tunesmith.store import audit
from tunesmith.store.people.roles import ACTIONS, ROLES, Role, chosen, permits
from tunesmith.store.people.trust import (
    FIRST_LABEL,
    KeyStatus,
    TrustedKey,
    in_both,
    is_written,
    write_trust,
)
from tunesmith.store.store import Store, session_of
from tunesmith.store.tables import AuditRow, KeyRow, TokenRow, UserRow

# The actions whose audit entries record a signature, under the key of `signature_entry`.
_STANDING = ("erase.plan", "erase.confirm", "version.hold")  # what they did stands, whatever becomes of the signer
_SIGNING = ("version.register", "version.approve", "version.refuse", "version.papers")


class UserKey(View):
    """A user's public key in PEM. until: the first audit entry that no longer records a signature by it, once it ended.

    proven_by: the fingerprint of the older key that proved the enrolment, "" without such a proof.
    """

    label: str
    fingerprint: str
    public_key: str
    status: KeyStatus
    enrolled: int
    proven_by: str = ""
    until: int | None = None


class User(ScopedView):
    """A person or a service. tenant, region: what they may act for; "" means all. keys: all they had, oldest first.

    groups: the groups whose documents they may see.
    """

    name: str
    roles: tuple[Role, ...]
    tenant: str = ""
    region: str = ""
    groups: tuple[str, ...] = ()
    active: bool = True
    keys: tuple[UserKey, ...] = ()

    @property
    def active_keys(self) -> tuple[UserKey, ...]:
        """The keys whose new signatures count, newest first."""
        return tuple(key for key in reversed(self.keys) if key.status == "active")

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of their newest active key; None without one."""
        return self.active_keys[0].fingerprint if self.active_keys else None

    def may(self, action: str) -> bool:
        """Whether the user is active and one of their roles permits an action."""
        return self.active and permits(self.roles, action)

    def require_everything(self) -> None:
        """Raise Forbidden for a user of one tenant or region: the same, whatever there is."""
        if not self.scope.unlimited:
            raise Forbidden("this is for users of all tenants and regions")

    def require(self, action: str) -> None:
        """Raise Forbidden where they may not do an action."""
        if not self.active:
            raise Forbidden(f"{self.name} is deactivated", where=action, fix="act as another user")
        if not self.may(action):
            able = " or ".join(sorted(ACTIONS.get(action, ()))) or "no role"
            raise Forbidden(
                f"{self.name} may not do this: it takes {able}, they are {', '.join(self.roles)}",
                where=action,
                fix="act as a user who may, or have an admin change their roles",
            )


# The acting user


def acting(store: Store, name: str | None = None) -> str:
    """The name of the acting user: name, else $TUNESMITH_USER, else the owner. Raises UsageError if unknown."""
    owner = ensure_owner(store)
    return get_user(store, name or os.environ.get("TUNESMITH_USER") or owner.name).name


def ensure_owner(store: Store) -> User:
    """The store's first user. Adds one to a store without users.

    Also writes the list of trusted keys where a command that changed users was killed before it did.
    """
    with store.reading() as session:
        name = first_user(session)
        published = is_written(store.blobs, trusted_keys(session))
    if not published:
        publish_trust(store)
    if name is not None:
        return get_user(store, name)
    name = _own_name()
    detail: JsonObject = {}
    with contextlib.suppress(_AlreadyThere), store.change(name, "user.add", name, detail) as session:
        if first_user(session) is not None:  # another process added one
            raise _AlreadyThere
        if session.scalars(select(UserRow).limit(1)).first() is not None:
            raise Refused("the store has users whom the audit log does not know", fix="verify the audit log")
        row = UserRow(name=name, roles=["admin", "engineer"], tenant="", region="", groups=[], active=True)
        session.add(row)
        detail["user"] = state(row)
    return ensure_owner(store)


def require(where: Store | Session, user: str, action: str, *, scope: Scope = Scope()) -> User:
    """The user, if they may do an action in a scope now. Raises Forbidden otherwise.

    where: with a session, the caller's transaction decides, so that a role that was just taken away counts.
    """
    with session_of(where) as session:
        row = session.get(UserRow, user)
        person = _user(row) if row else None
    if person is None:
        raise Forbidden(f"{_shown(user)} is not a user", where=action, fix="act as another user")
    person.require(action)
    if not person.scope.covers(scope):
        own = "/".join(part or "*" for part in (person.tenant, person.region))
        raise Forbidden(
            f"{user} may act only within {own}", where=action, fix="act as a user of that tenant and region"
        )
    return person


def get_user(where: Store | Session, name: str) -> User:
    """A user by name. Raises UsageError where there is none."""
    with session_of(where) as session:
        return _user(user_row(session, name))


def list_users(where: Store | Session) -> list[User]:
    """All users sorted by name, deactivated ones included."""
    with session_of(where) as session:
        return [_user(row) for row in session.scalars(select(UserRow).order_by(UserRow.name))]


# Changes


def add_user(
    store: Store,
    name: str,
    roles: Iterable[str],
    *,
    actor: str,
    scope: Scope = Scope(),
    groups: Iterable[str] = (),
    public_key: str = "",
) -> User:
    """Add a user, with a public key (PEM) or without.

    Raises UsageError for a bad, reserved or used name, one that looks like another user's, a bad role or group; Refused
    if actor may not add users or if the key was enrolled before. Then there is no new user.
    """
    check_name(name, "user name")
    given, member_of = chosen(roles, ROLES, "role", "a user"), _groups(groups)
    with changing(store, actor, "user.add", name) as (session, detail):
        if session.get(UserRow, name) is not None:
            raise UsageError(f"there is already a user {name}", fix=NextStep("change their roles", "users roles"))
        check_new_name(name, session.scalars(select(UserRow.name)))
        row = UserRow(name=name, roles=given, **scope.fields(), groups=member_of, active=True)
        session.add(row)
        if public_key:
            add_key(session, row, public_key, FIRST_LABEL)
        detail["user"] = state(row)
    return get_user(store, name)


def set_roles(store: Store, name: str, roles: Iterable[str], *, actor: str) -> User:
    """Replace a user's roles. Raises Refused if no admin would be left."""
    given = chosen(roles, ROLES, "role", "a user")
    with changing(store, actor, "user.roles", name) as (session, detail):
        row = user_row(session, name)
        detail["before"], row.roles = list(row.roles), given
        _keep_an_admin(session)
        detail["user"] = state(row)
    return get_user(store, name)


def set_groups(store: Store, name: str, groups: Iterable[str], *, actor: str) -> User:
    """Replace the groups whose documents a user may see. Counts from the user's next request on."""
    given = _groups(groups)
    with changing(store, actor, "user.groups", name) as (session, detail):
        row = user_row(session, name)
        detail["before"], row.groups = list(row.groups), given
        detail["user"] = state(row)
    return get_user(store, name)


def deactivate(store: Store, name: str, *, actor: str) -> User:
    """Deactivate a user: their tokens, approvals and signatures no longer count. Users are never deleted."""
    with changing(store, actor, "user.deactivate", name) as (session, detail):
        row = user_row(session, name)
        row.active = False
        _keep_an_admin(session)
        detail["user"] = state(row)
        working = [token for token in row.tokens if token.revoked is None]
        for token in working:
            token.revoked = time.time()
        detail["tokens"] = [token_state(token) for token in working]
    return get_user(store, name)


def check_new_key(session: Session, name: str, fingerprint: str) -> None:
    """Raise Refused if a key was enrolled before, by anybody. name: who wants it now."""
    known = session.get(KeyRow, fingerprint)
    if known is not None:
        whose = f"this key is {known.user}'s" + ("" if known.status == "active" else f" and was {known.status}")
        raise Refused(whose, where=name, fix=NextStep("make another one", "keys create"))


def add_key(session: Session, row: UserRow, public_key: str, label: str, proven_by: str = "") -> None:
    """Give a user a key, inside the caller's change. Raises Refused if it was enrolled before, by anybody."""
    fingerprint = digest_bytes(public_key.encode())
    check_new_key(session, row.name, fingerprint)
    row.keys.append(
        KeyRow(
            fingerprint=fingerprint,
            user=row.name,
            label=label,
            public_key=public_key,
            enrolled=audit.newest(session).seq + 1,
            proven_by=proven_by,
        )
    )
    session.flush()


# Trusted keys, and what the audit log keeps


def trusted_keys(where: Store | Session) -> tuple[TrustedKey, ...]:
    """The keys of all users, retired and revoked ones included, with their owners' roles now.

    Sorted by user, then by age.
    """
    with session_of(where) as session:
        users = list(session.scalars(select(UserRow).order_by(UserRow.name)))
        signed = _signed_in_time(session, [key for user in users for key in user.keys if key.status != "active"])
        return tuple(
            TrustedKey.of(
                key,
                user=user.name,
                roles=tuple(user.roles),
                **user.scope.fields(),
                active=user.active,
                signed=tuple(sorted(signed.get(key.fingerprint, ()))),
            )
            for user in users
            for key in user.keys
        )


def _signed_in_time(session: Session, ended: list[KeyRow]) -> dict[str, set[str]]:
    """Fingerprint -> digests whose signature by that key the log recorded before the key was retired or revoked, and
    those of erasures and holds, which stand when their signer has another role."""
    until = {key.fingerprint: key.until or 0 for key in ended}
    signed: dict[str, set[str]] = {}
    ending = and_(AuditRow.action.in_(_SIGNING), AuditRow.seq < max(until.values(), default=0))
    entries = select(AuditRow.seq, AuditRow.action, AuditRow.detail).where(or_(AuditRow.action.in_(_STANDING), ending))
    for seq, action, detail in session.execute(entries):
        for signature in (detail.get("signature"), detail.get("plan")):
            if isinstance(signature, dict) and (action in _STANDING or seq < until.get(str(signature.get("key")), 0)):
                signed.setdefault(signature["key"], set()).add(str(signature.get("digest")))
    return signed


def publish_trust(store: Store) -> None:
    """Write the store's list of trusted keys from its users."""
    # Writers of the database take turns, so the list never goes back to older users.
    with store.writing() as session:
        write_trust(store.blobs, trusted_keys(session))


def state(row: UserRow) -> JsonObject:
    """What the audit log keeps of a user after a change, so that a row that was changed without it can be found."""
    # The groups are left out where there are none, as in the entries of a log that is older than groups.
    parts = ("name", "roles", "tenant", "region", *(["groups"] if row.groups else []), "active")
    of_key = ("label", "status", "enrolled", "proven_by", "until")
    keys = [
        {"fingerprint": digest_bytes(key.public_key.encode()), **{part: getattr(key, part) for part in of_key}}
        for key in row.keys
    ]
    return {**{part: getattr(row, part) for part in parts}, "keys": keys}


def token_state(row: TokenRow) -> JsonObject:
    """What the audit log keeps of a token after a change. When it was used last is no part of it."""
    parts = ("user", "name", "scopes", "created", "expires", "revoked")
    return {"token": digest_bytes(row.digest.encode()), **{part: getattr(row, part) for part in parts}}


class _AlreadyThere(Exception):
    pass


@contextlib.contextmanager
def changing(
    store: Store, actor: str, action: str, name: str, *, own: bool = False
) -> Iterator[tuple[Session, JsonObject]]:
    """One audited change of a user by an actor who may make it. own: every user may change themself.

    What the list of trusted keys loses is taken from it before the commit, and what it gains is added afterwards: a
    command that is killed leaves a list that trusts less than the database, never more.
    """
    detail: JsonObject = {}
    with store.change(actor, action, name, detail) as session:
        if own and actor == name:
            if not user_row(session, name).active:
                raise Refused(f"{name} is deactivated", where=action, fix="ask an admin")
        else:
            require(session, actor, "user.change")
        before = trusted_keys(session)
        yield session, detail
        session.flush()
        write_trust(store.blobs, in_both(before, trusted_keys(session)))
    publish_trust(store)


def _user(row: UserRow) -> User:
    return User.model_validate(row, from_attributes=True)


def user_row(session: Session, name: str) -> UserRow:
    """A user's row, to be changed inside `changing`. Raises UsageError where there is none."""
    row = session.get(UserRow, name)
    if row is None:
        fix = NextStep("list the users, or add this one", "users list")
        raise NotThere(f"there is no user {_shown(name)}", fix=fix, code="user_not_found")
    return row


def _shown(name: str) -> str:
    """A name for a message. Text that is not a name is not repeated: it may be a token, pasted by mistake."""
    try:
        return check_name(name, "user name")
    except UsageError:
        return "(no user's name)"


def _groups(groups: Iterable[str]) -> list[str]:
    return sorted({check_name(group, "group name") for group in groups})


def _keep_an_admin(session: Session) -> None:
    session.flush()
    # An admin of one tenant or region may not change users, so could not name another.
    if not any(user.may("user.change") and user.scope.unlimited for user in list_users(session)):
        raise Refused(
            "this would leave the store without an admin of all tenants and regions",
            fix="first give that role to another user of all tenants and regions",
        )


def first_user(session: Session) -> str | None:
    """The name of the owner; None in an empty store."""
    # From the log, not the table: if somebody empties the table, the next user must not become the owner.
    first = select(AuditRow.subject).where(AuditRow.action == "user.add").order_by(AuditRow.seq).limit(1)
    return session.scalars(first).first()


def account() -> str:
    """The name of the machine's account that this process runs on; "" where it has none, as in some containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _own_name() -> str:
    if given := os.environ.get("TUNESMITH_USER"):
        return check_new_name(check_name(given, "user name"), ())
    # A login such as `DOMAIN\First Last` is rewritten by our rule for names. The name is no credential.
    plain = re.sub(r"[^a-z0-9_-]+", "-", account().lower()).strip("-_")[:63]
    try:
        return check_new_name(plain or "owner", ())
    except UsageError:
        return "owner"

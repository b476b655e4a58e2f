"""Users, their tokens and their keys."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.scope import Scope
from tunesmith.core.text.numbers import is_number
from tunesmith.core.view import View
from tunesmith.registry.history import lost_signatures
from tunesmith.registry.signing import keys
from tunesmith.registry.versions import list_versions
from tunesmith.services.accounts.proposed_keys import ProposedKeyView, waiting
from tunesmith.store.people import identities, sessions, tokens, user_keys
from tunesmith.store.people.identities import User, acting
from tunesmith.store.people.tokens import TokenStatus
from tunesmith.store.people.trust import KeyStatus
from tunesmith.store.store import Store

_EXPIRES = "90d"


class UserView(View):
    """One user. fingerprint: of their newest active key, None without one. groups: whose documents they may see.

    invalidated: labels of the versions that they signed and that no longer verify after this change.
    """

    user: str
    roles: tuple[str, ...]
    tenant: str
    region: str
    groups: tuple[str, ...]
    active: bool
    fingerprint: str | None
    invalidated: Annotated[tuple[str, ...], Field(exclude=True)] = ()


class UserList(View):
    """Every user, deactivated ones included."""

    users: tuple[UserView, ...]


class KeyView(View):
    """One enrolled public key. private: whether this machine holds its private half. active: whether its owner is.

    status: active, retired or revoked. until: the number of the audit entry from which on its signatures do not count,
    None while the key is active.
    """

    user: str
    label: str
    fingerprint: str
    roles: tuple[str, ...]
    active: bool
    status: KeyStatus
    enrolled: int
    until: int | None
    private: bool


class KeyList(View):
    """Every enrolled key, and those that users proposed and no admin has confirmed yet."""

    keys: tuple[KeyView, ...]
    proposed: tuple[ProposedKeyView, ...]


class EnrolledKey(View):
    """A new key. path: the file of its private half, where it was made here."""

    user: str
    label: str
    fingerprint: str
    path: Annotated[Path | None, Field(exclude=True)] = None


class EndedKey(View):
    """A key that was retired or revoked. until: the audit entry from which on its signatures do not count.

    also_revoked: labels of keys that were revoked with it, because their enrolment was proved with a stolen key.
    to_look_at: other keys that its user gave to anybody since then, which may be the thief's. They still count.
    invalidated: labels of the versions whose signature does not count any more. unapproved, unrefused: labels of the
    versions with an approval, or a refusal, that does not count any more.
    """

    user: str
    label: str
    fingerprint: str
    status: KeyStatus
    until: int | None
    also_revoked: tuple[str, ...] = ()
    to_look_at: tuple[str, ...] = ()
    invalidated: tuple[str, ...] = ()
    unapproved: tuple[str, ...] = ()
    unrefused: tuple[str, ...] = ()


class TokenView(View):
    """One token. Times are ISO 8601; expires: None never; used: about when it was used last, None if it was not."""

    user: str
    name: str
    scopes: tuple[str, ...]
    status: TokenStatus
    created: str
    expires: str | None
    revoked: str | None
    used: str | None


class TokenList(View):
    """Tokens, ended ones included. Nobody can be told their secrets any more."""

    tokens: tuple[TokenView, ...]


class IssuedToken(View):
    """A new token. It is shown once; the store keeps only its digest. expires: None never."""

    user: str
    name: str
    scopes: tuple[str, ...]
    expires: str | None
    token: str


class LoginLink(View):
    """A link that logs a user in to the console once. It is shown once; the store keeps only a digest."""

    user: str
    url: str


def login_link(store: Store, name: str | None = None, *, url: str, actor: str | None = None) -> LoginLink:
    """A link to the console of the server at a URL, for the actor or, if they are an admin, for anybody."""
    by = acting(store, actor)
    who = name or by
    secret = sessions.make_link(store, who, actor=by, account=identities.account())
    return LoginLink(user=who, url=f"{url.rstrip('/')}/console/login/{secret}")


def list_users(store: Store) -> UserList:
    """Every user with their roles."""
    identities.ensure_owner(store)
    return UserList(users=tuple(_view(user) for user in identities.list_users(store)))


def add_user(
    store: Store,
    name: str,
    roles: list[str],
    *,
    actor: str | None = None,
    scope: Scope = Scope(),
    groups: Iterable[str] = (),
    public_key: Path | None = None,
) -> UserView:
    """Add a user. public_key: their own key as a PEM file; without one, a key pair is made when they first sign."""
    pem = keys.read_public_key(_read_key(public_key)) if public_key is not None else ""
    by = acting(store, actor)
    return _view(identities.add_user(store, name, roles, actor=by, scope=scope, groups=groups, public_key=pem))


def set_roles(store: Store, name: str, roles: list[str], *, actor: str | None = None) -> UserView:
    """Replace a user's roles."""
    return _changed(store, identities.set_roles(store, name, roles, actor=acting(store, actor)))


def set_groups(store: Store, name: str, groups: Iterable[str], *, actor: str | None = None) -> UserView:
    """Replace the groups whose documents a user may see."""
    return _view(identities.set_groups(store, name, groups, actor=acting(store, actor)))


def deactivate(store: Store, name: str, *, actor: str | None = None) -> UserView:
    """Deactivate a user: their tokens, approvals and signatures no longer count."""
    return _changed(store, identities.deactivate(store, name, actor=acting(store, actor)))


def issue_token(
    store: Store,
    user: str,
    *,
    name: str = tokens.FIRST,
    scopes: Iterable[str] = (),
    expires: str | None = None,
    by: tokens.Token | None = None,
    actor: str | None = None,
) -> IssuedToken:
    """Make a token for a user. A token named `first` replaces the one before; another name must be free.

    expires: `90d`, the default, or `never`. scopes: by default everything. by: the token that asks for it, which gives
    no more scopes than its own, and no later end.
    """
    at = time.time()
    given = list(scopes) or list(by.scopes if by is not None else ("all",))
    end = None if expires == "never" else at + _days(expires or _EXPIRES) * 86400
    if by is not None and not by.covers(given):
        raise Refused(
            f"the token {by.name} has the scopes {', '.join(by.scopes)} and gives no others",
            fix=f"tunesmith users token {user} --scope {given[0]}",
        )
    if by is not None and by.expires is not None and (end is None or end > by.expires):
        if expires is not None:
            raise Refused(f"the token {by.name} expires before that", fix=f"tunesmith users token {user}")
        end = by.expires
    secret = tokens.issue_token(store, user, name=name, scopes=given, expires=end, now=at, actor=acting(store, actor))
    return IssuedToken(user=user, name=name, scopes=tuple(sorted(set(given))), expires=_iso(end), token=secret)


def list_tokens(store: Store, user: str | None = None) -> TokenList:
    """The tokens of a user, or of all."""
    return TokenList(tokens=tuple(_token(token) for token in tokens.list_tokens(store, user)))


def revoke_token(store: Store, user: str, name: str, *, actor: str | None = None) -> TokenView:
    """End a token at once. Every user may end their own, an admin anybody's."""
    return _token(tokens.revoke_token(store, user, name, actor=acting(store, actor)))


def list_keys(store: Store) -> KeyList:
    """Every enrolled key, retired and revoked ones included, and the proposed ones."""
    enrolled = (
        KeyView.of(key, user=user.name, roles=user.roles, active=user.active, private=key.fingerprint in private)
        for user in identities.list_users(store)
        for private in [keys.private_keys(store, user)]
        for key in user.keys
    )
    return KeyList(keys=tuple(enrolled), proposed=waiting(store))


def create_key(
    store: Store, name: str | None = None, *, label: str | None = None, actor: str | None = None
) -> EnrolledKey:
    """Make a key pair for a user, by default for the caller.

    A user who has a key needs an active private key here, or an admin to act.
    """
    by = acting(store, actor)
    user = name or by
    key = keys.create_key(store, user, actor=by, label=label)
    path = keys.private_key_path(store, user, key.label)
    return EnrolledKey(user=user, label=key.label, fingerprint=key.fingerprint, path=path)


def enrol_key(
    store: Store, name: str, file: Path, *, label: str | None = None, actor: str | None = None
) -> EnrolledKey:
    """Bind a public key that was made elsewhere to a user. Needs what create_key needs."""
    key = keys.enrol_public_key(store, name, _read_key(file), actor=acting(store, actor), label=label)
    return EnrolledKey(user=name, label=key.label, fingerprint=key.fingerprint)


def retire_key(store: Store, name: str, label: str, *, actor: str | None = None) -> EndedKey:
    """End a key's use: what was recorded before keeps counting, what it signs from now on does not."""
    return _ended(store, keys.retire_key(store, name, label, actor=acting(store, actor)), [label])


def revoke_key(store: Store, name: str, label: str, *, since: str, actor: str | None = None) -> EndedKey:
    """End a stolen key's use from a moment of the past on.

    since: ISO 8601 with a time zone, or the number of an audit entry. What the audit log recorded from then on does not
    count. Only an admin may. Keys that the thief gave to others, where the user is an admin, are named, not revoked.
    """
    user, revoked = user_keys.revoke_key(store, name, label, since=_moment(since), actor=acting(store, actor))
    ended = _ended(store, user, revoked)
    known = {key.fingerprint for key in user.keys if key.status == "revoked"}
    given = user_keys.enrolled_by(store, user.name, ended.until or 0)
    others = tuple(what for fingerprint, what in given.items() if fingerprint not in known)
    return ended.model_copy(update={"to_look_at": others})


def _days(text: str) -> int:
    matched = re.fullmatch("([1-9][0-9]{0,4})d", text)
    if matched is None:
        raise UsageError(f"{text[:20]!r} is no time until a token expires", fix="write days, as in 90d, or never")
    return int(matched[1])


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _token(token: tokens.Token) -> TokenView:
    times = {name: _iso(getattr(token, name)) for name in ("created", "expires", "revoked", "used")}
    return TokenView.of(token, status=token.status(time.time()), **times)


def _read_key(file: Path) -> bytes:
    return read_text_file(file, "the public key").encode()


def _moment(text: str) -> datetime | int:
    if is_number(text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            f"{text[:80]!r} is neither a time nor the number of an audit entry",
            fix="write 2030-01-31T00:00:00Z, or a number that `tunesmith audit show` lists",
        )
    return moment


def _ended(store: Store, user: User, labels: list[str]) -> EndedKey:
    """The first key of labels, with what no longer counts because of all of them."""
    ended = {key.label: key for key in user.keys if key.label in labels}
    prints = {key.fingerprint for key in ended.values()}
    invalidated, unapproved, unrefused = lost_signatures(store, prints)
    key = ended[labels[0]]
    return EndedKey.of(
        key,
        user=user.name,
        also_revoked=tuple(labels[1:]),
        invalidated=tuple(invalidated),
        unapproved=tuple(unapproved),
        unrefused=tuple(unrefused),
    )


def _view(user: User, invalidated: tuple[str, ...] = ()) -> UserView:
    return UserView.of(user, user=user.name, invalidated=invalidated)


def _changed(store: Store, user: User) -> UserView:
    """The user, with the versions that no longer verify because their signer may not register any more."""
    signed: list[str] = []
    if not user.may("version.register"):
        # A damaged registry must not prevent the deactivation of a user.
        with contextlib.suppress(TunesmithError):
            signed = [version.label for version in list_versions(store) if version.signer == user.name]
    return _view(user, tuple(signed))

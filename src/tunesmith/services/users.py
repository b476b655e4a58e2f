"""Users, their tokens, and their keys: also those that users propose for themselves, such as one made in a browser."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tunesmith.core.errors import Forbidden, NextStep, TunesmithError, UsageError
from tunesmith.core.text.names import Scope, is_number
from tunesmith.core.values import ScopedView, View
from tunesmith.registry.history import lost_signatures
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.keys import read_public_key
from tunesmith.registry.versions import list_versions
from tunesmith.services.actions import Acting, Named, Request, Short, action
from tunesmith.store.people import identities, sessions, tokens, user_keys
from tunesmith.store.people import proposed_keys as proposals
from tunesmith.store.people.identities import User
from tunesmith.store.people.proposed_keys import ProposedKey
from tunesmith.store.people.roles import Role, TokenScope
from tunesmith.store.people.tokens import TokenStatus
from tunesmith.store.people.trust import KeyStatus
from tunesmith.store.store import Store

_EXPIRES = "90d"
Roles = Annotated[tuple[Role, ...], Field(min_length=1, max_length=5)]
Groups = Annotated[tuple[Named, ...], Field(max_length=100)]
PublicKey = Annotated[str, Field(max_length=10_000)]


class UserView(ScopedView):
    """One user. fingerprint: of their newest active key, None without one. groups: whose documents they may see.

    invalidated: labels of the versions that they signed and that no longer verify after this change.
    """

    user: str
    roles: tuple[str, ...]
    groups: tuple[str, ...]
    active: bool
    fingerprint: str | None
    invalidated: tuple[str, ...] = Field(default=(), exclude=True)


class UserList(View):
    """Every user, deactivated ones included."""

    users: tuple[UserView, ...]


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


class AddUser(Request):
    """A user to add. tenant, region: what they may act for, "" for all. groups: whose documents they may see."""

    name: Named
    roles: Roles
    tenant: Short = ""
    region: Short = ""
    groups: Groups = ()


class AddSigner(AddUser):
    """A user to add with their own public key, in PEM."""

    public_key: PublicKey


class SetRoles(Request):
    """The roles that a user has from now on."""

    user: Named
    roles: Roles


class SetGroups(Request):
    """The groups whose documents a user may see from now on."""

    user: Named
    groups: Groups


class DeactivateUser(Request):
    """A user to deactivate."""

    user: Named


class IssueToken(Request):
    """A token to be made. name: a token `first` replaces the one before, another name must be free.

    user: by default the caller. scopes: by default those of the calling token, else everything. expires: days, as `90d`
    (the default), or `never`.
    """

    name: str = Field(min_length=1, max_length=128)
    user: Named | None = None
    scopes: Annotated[tuple[TokenScope, ...], Field(min_length=1, max_length=20)] | None = None
    expires: Annotated[str, Field(pattern="^([1-9][0-9]{0,4}d|never)$")] | None = None


class RevokeToken(Request):
    """A token to end."""

    user: Named
    name: Named


class MakeLink(Request):
    """A link for a login. user: by default whoever makes it. url: where people reach the server."""

    url: str = Field(max_length=2000)
    user: Named | None = None


def is_admin(viewer: User) -> bool:
    """Whether a person is an admin of all tenants and regions, who sees everybody. Others see themselves."""
    return viewer.may("user.change") and viewer.scope.unlimited


def _sees(acting: Acting, user: str) -> bool:
    return is_admin(acting.user) or user == acting.actor


def list_users(acting: Acting) -> UserList:
    """The users with their roles."""
    identities.ensure_owner(acting.store)
    every = identities.list_users(acting.store)
    return UserList(users=tuple(_view(one) for one in every if _sees(acting, one.name)))


def list_tokens(acting: Acting, *, user: str | None = None) -> TokenList:
    """The tokens of a user, by default of all whom the viewer may see. Raises Forbidden for one whom they may not."""
    if not is_admin(acting.user):
        if user not in (None, acting.actor):
            raise Forbidden(f"{acting.actor} may see only their own tokens", fix="ask an admin")
        user = acting.actor
    return TokenList(tokens=tuple(_token(token) for token in tokens.list_tokens(acting.store, user)))


_change = partial(action, permission="user.change", tokens=("all",), whole=True, form=True)


@_change("user.add", says="added a user", at="/users")
def add(acting: Acting, asked: AddUser) -> UserView:
    """Add a user. A key pair is made when they first sign, or they enrol a key of their own."""
    return _add(acting, asked, "")


@action("user.add_with_key", permission="user.change", whole=True)
def add_with_key(acting: Acting, asked: AddSigner) -> UserView:
    """Add a user with their own key. Where the key is refused, there is no user."""
    return _add(acting, asked, read_public_key(asked.public_key.encode()))


@_change("user.roles", says="changed a user's roles", at="/users/{user}/roles")
def set_roles(acting: Acting, asked: SetRoles) -> UserView:
    """Replace a user's roles."""
    return _changed(acting.store, identities.set_roles(acting.store, asked.user, asked.roles, actor=acting.actor))


@action("user.groups", says="changed a user's groups", permission="user.change", whole=True)
def set_groups(acting: Acting, asked: SetGroups) -> UserView:
    """Replace the groups whose documents a user may see."""
    return _view(identities.set_groups(acting.store, asked.user, asked.groups, actor=acting.actor))


@_change("user.deactivate", says="deactivated a user", at="/users/{user}/deactivate")
def deactivate(acting: Acting, asked: DeactivateUser) -> UserView:
    """Deactivate a user for good: their tokens, sessions, approvals and signatures no longer count."""
    return _changed(acting.store, identities.deactivate(acting.store, asked.user, actor=acting.actor))


@action("user.token", says="issued a token", tokens=("tokens",), at="/tokens")
def issue_token(acting: Acting, asked: IssueToken) -> IssuedToken:
    """Make a token: every user their own, an admin anybody's. Its secret is in this answer only.

    A token that asks for it gives no more scopes than its own, and no later end.
    """
    at, by, user = time.time(), acting.token, asked.user or acting.actor
    given = asked.scopes or (by.scopes if by is not None else ("all",))
    end = None if asked.expires == "never" else at + int((asked.expires or _EXPIRES)[:-1]) * 86400
    if by is not None and not by.covers(given):
        raise Forbidden(f"the token {by.name} has the scopes {', '.join(by.scopes)} and gives no others")
    if by is not None and by.expires is not None and (end is None or end > by.expires):
        if asked.expires is not None:
            raise Forbidden(f"the token {by.name} expires before that", fix=NextStep("ask an admin", "users token"))
        end = by.expires
    secret = tokens.issue_token(
        acting.store, user, name=asked.name, scopes=given, expires=end, now=at, actor=acting.actor
    )
    return IssuedToken(user=user, name=asked.name, scopes=tuple(sorted(set(given))), expires=_iso(end), token=secret)


@action("user.token.revoke", says="revoked a token", at="/tokens/{user}/{name}", method="DELETE", form=True)
def revoke_token(acting: Acting, asked: RevokeToken) -> TokenView:
    """End a token at once: every user their own, an admin anybody's. A token may end itself, whatever it is for."""
    by = acting.token
    if by is not None and (asked.user, asked.name) != (by.user, by.name) and not by.permits("tokens"):
        raise Forbidden(by.lacks("tokens"), code="insufficient_scope")
    return _token(tokens.revoke_token(acting.store, asked.user, asked.name, actor=acting.actor))


@action("session.link", says="made a login link")
def make_link(acting: Acting, asked: MakeLink) -> LoginLink:
    """A link that opens the console once, for whoever makes it or, if they are an admin, for anybody."""
    who = asked.user or acting.actor
    secret = sessions.make_link(acting.store, who, actor=acting.actor, account=identities.account())
    return LoginLink(user=who, url=f"{asked.url.rstrip('/')}/console/login/{secret}")


def _add(acting: Acting, asked: AddUser, public_key: str) -> UserView:
    scope = Scope(asked.tenant, asked.region)
    added = identities.add_user(
        acting.store,
        asked.name,
        asked.roles,
        actor=acting.actor,
        scope=scope,
        groups=asked.groups,
        public_key=public_key,
    )
    return _view(added)


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _token(token: tokens.Token) -> TokenView:
    times = {name: _iso(getattr(token, name)) for name in ("created", "expires", "revoked", "used")}
    return TokenView.of(token, status=token.status(time.time()), **times)


def _view(user: User, invalidated: Iterable[str] = ()) -> UserView:
    return UserView.of(user, user=user.name, invalidated=tuple(invalidated))


def _changed(store: Store, user: User) -> UserView:
    """The user, with the versions that no longer verify because their signer may not register any more."""
    signed: list[str] = []
    if not user.may("version.register"):
        # A damaged registry must not prevent the deactivation of a user.
        with contextlib.suppress(TunesmithError):
            signed = [version.label for version in list_versions(store) if version.signer == user.name]
    return _view(user, signed)


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
    proposed: tuple[ProposedKey, ...]


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


class CreateKey(Request):
    """A key pair to make. user: by default whoever makes it. label: by default key-1, key-2 and so on."""

    user: Named | None = None
    label: Short | None = None


class EnrolKey(Request):
    """A public key, in PEM, that was made elsewhere, for a user. label: as for CreateKey."""

    user: Named
    public_key: PublicKey
    label: Short | None = None


class ProposeKey(Request):
    """A public key, in PEM, of one's own."""

    public_key: PublicKey


class NameProposal(Request):
    """A key that a user proposed. fingerprint: its first 20 digits or more, as the user told them."""

    user: Named
    fingerprint: Short


class RetireKey(Request):
    """A key of a user to end from now on."""

    user: Named
    label: Named


class RevokeKey(RetireKey):
    """A stolen key of a user. since: from when on it does not count, a time (ISO 8601 with a time zone) or the number
    of an audit entry."""

    since: Named


def list_keys(acting: Acting) -> KeyList:
    """The enrolled keys, retired and revoked ones included, and the proposed ones, the oldest first."""
    enrolled = (
        KeyView.of(key, user=user.name, roles=user.roles, active=user.active, private=key.fingerprint in private)
        for user in identities.list_users(acting.store)
        if _sees(acting, user.name)
        for private in [keys.private_keys(acting.store, user)]
        for key in user.keys
    )
    return KeyList(keys=tuple(enrolled), proposed=proposed_keys(acting))


def proposed_keys(acting: Acting) -> tuple[ProposedKey, ...]:
    """The keys that users proposed and no admin has confirmed yet, the oldest first."""
    return tuple(key for key in proposals.waiting_keys(acting.store) if _sees(acting, key.user))


@action("user.key.create")
def create_key(acting: Acting, asked: CreateKey) -> EnrolledKey:
    """Make a key pair. A user who has a key needs an active private key here, or an admin to act."""
    user = asked.user or acting.actor
    key = keys.create_key(acting.store, user, actor=acting.actor, label=asked.label)
    path = keys.private_key_path(acting.store, user, key.label)
    return EnrolledKey.of(key, user=user, path=path)


@action("user.key.enrol")
def enrol_key(acting: Acting, asked: EnrolKey) -> EnrolledKey:
    """Bind a public key that was made elsewhere to a user. Needs what a new key pair needs."""
    pem = asked.public_key.encode()
    key = keys.enrol_public_key(acting.store, asked.user, pem, actor=acting.actor, label=asked.label)
    return EnrolledKey.of(key, user=asked.user)


# No token proposes or confirms a key: nobody may have a hand in both, and a token does not say who made it.


@action("user.key.propose", says="proposed a key", at="/keys", form=True, api=False)
def propose_key(acting: Acting, asked: ProposeKey) -> ProposedKey:
    """Propose a key of one's own, whose private half may be in a browser. It counts once an admin confirmed it."""
    pem, session = keys.read_public_key(asked.public_key.encode()), acting.session or None
    return proposals.propose_key(acting.store, acting.actor, pem, actor=acting.actor, session=session)


@action("user.key.confirm", permission="user.change", at="/keys/{user}/confirm", whole=True, form=True, api=False)
def confirm_key(acting: Acting, asked: NameProposal) -> EnrolledKey:
    """Let a key count that somebody else proposed, by the fingerprint that they told."""
    session = acting.session or None
    owner = proposals.confirm_key(acting.store, asked.user, asked.fingerprint, actor=acting.actor, session=session)
    return EnrolledKey.of(owner.keys[-1], user=owner.name)


@action("user.key.reject", says="rejected a proposed key", at="/keys/{user}/reject", form=True, api=False)
def reject_key(acting: Acting, asked: NameProposal) -> ProposedKey:
    """End a proposal: one's own or, as an admin, anybody's."""
    return proposals.reject_key(acting.store, asked.user, asked.fingerprint, actor=acting.actor)


@action("user.key.retire", says="retired a key")
def retire_key(acting: Acting, asked: RetireKey) -> EndedKey:
    """End a key's use: what was recorded before keeps counting, what it signs from now on does not."""
    user = keys.retire_key(acting.store, asked.user, asked.label, actor=acting.actor)
    return _ended(acting.store, user, [asked.label])


@action("user.key.revoke", says="revoked a key", permission="user.change", whole=True)
def revoke_key(acting: Acting, asked: RevokeKey) -> EndedKey:
    """End a stolen key's use from a moment of the past on. What the audit log recorded from then on does not count.

    Keys that the thief gave to others, where the user is an admin, are named, not revoked.
    """
    store, since = acting.store, _moment(asked.since)
    user, revoked = user_keys.revoke_key(store, asked.user, asked.label, since=since, actor=acting.actor)
    ended = _ended(store, user, revoked)
    known = {key.fingerprint for key in user.keys if key.status == "revoked"}
    given = user_keys.enrolled_by(store, user.name, ended.until or 0)
    others = tuple(what for fingerprint, what in given.items() if fingerprint not in known)
    return ended.model_copy(update={"to_look_at": others})


def _moment(text: str) -> datetime | int:
    if is_number(text):
        return int(text)
    with contextlib.suppress(ValueError):
        if (moment := datetime.fromisoformat(text)).tzinfo is not None:
            return moment
    raise UsageError(
        f"{text[:80]!r} is neither a time nor the number of an audit entry",
        where="since",
        fix=NextStep("write 2030-01-31T00:00:00Z, or the number of an entry", "audit show"),
    )


def _ended(store: Store, user: User, labels: list[str]) -> EndedKey:
    """The first key of labels, with what no longer counts because of all of them."""
    ended = {key.label: key for key in user.keys if key.label in labels}
    prints = {key.fingerprint for key in ended.values()}
    invalidated, unapproved, unrefused = lost_signatures(store, prints)
    return EndedKey.of(
        ended[labels[0]],
        user=user.name,
        also_revoked=tuple(labels[1:]),
        invalidated=tuple(invalidated),
        unapproved=tuple(unapproved),
        unrefused=tuple(unrefused),
    )

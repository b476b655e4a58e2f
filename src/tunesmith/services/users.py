"""Users and their tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from tunesmith.core.errors import Forbidden, NextStep, TunesmithError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.registry.signing.keys import read_public_key
from tunesmith.registry.versions import list_versions
from tunesmith.services.actions import Acting, Named, Request, Short, action
from tunesmith.store.people import identities, sessions, tokens
from tunesmith.store.people.identities import User
from tunesmith.store.people.roles import Role, TokenScope
from tunesmith.store.people.tokens import TokenStatus
from tunesmith.store.store import Store

_EXPIRES = "90d"
Roles = Annotated[tuple[Role, ...], Field(min_length=1, max_length=5)]
Groups = Annotated[tuple[Named, ...], Field(max_length=100)]
PublicKey = Annotated[str, Field(max_length=10_000)]


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


def list_users(store: Store) -> UserList:
    """Every user with their roles."""
    identities.ensure_owner(store)
    return UserList(users=tuple(_view(user) for user in identities.list_users(store)))


def list_tokens(store: Store, user: str | None = None) -> TokenList:
    """The tokens of a user, or of all."""
    return TokenList(tokens=tuple(_token(token) for token in tokens.list_tokens(store, user)))


def is_admin(viewer: User) -> bool:
    """Whether a person is an admin of all tenants and regions, who sees everybody. Others see themselves."""
    return viewer.may("user.change") and viewer.scope == Scope()


def visible_users(store: Store, viewer: User) -> UserList:
    """The users whom the viewer may see."""
    known = list_users(store).users
    return UserList(users=tuple(one for one in known if is_admin(viewer) or one.user == viewer.name))


def visible_tokens(store: Store, viewer: User, user: str | None = None) -> TokenList:
    """The tokens of a user, by default of all whom the viewer may see. Raises Forbidden for one whom they may not."""
    if user != viewer.name and not is_admin(viewer):
        if user is not None:
            raise Forbidden(f"{viewer.name} may see only their own tokens", fix="ask an admin")
        user = viewer.name
    return list_tokens(store, user)


@action("user.add", says="added a user", permission="user.change", tokens=("all",), at="/users", whole=True, form=True)
def add(acting: Acting, asked: AddUser) -> UserView:
    """Add a user. A key pair is made when they first sign, or they enrol a key of their own."""
    return _add(acting, asked, "")


@action("user.add_with_key", permission="user.change", whole=True)
def add_with_key(acting: Acting, asked: AddSigner) -> UserView:
    """Add a user with their own key. Where the key is refused, there is no user."""
    return _add(acting, asked, read_public_key(asked.public_key.encode()))


@action(
    "user.roles", says="changed a user's roles", permission="user.change", tokens=("all",), at="/users/{user}/roles",
    whole=True, form=True,
)  # fmt: skip
def set_roles(acting: Acting, asked: SetRoles) -> UserView:
    """Replace a user's roles."""
    return _changed(acting.store, identities.set_roles(acting.store, asked.user, asked.roles, actor=acting.actor))


@action("user.groups", says="changed a user's groups", permission="user.change", whole=True)
def set_groups(acting: Acting, asked: SetGroups) -> UserView:
    """Replace the groups whose documents a user may see."""
    return _view(identities.set_groups(acting.store, asked.user, asked.groups, actor=acting.actor))


@action(
    "user.deactivate", says="deactivated a user", permission="user.change", tokens=("all",),
    at="/users/{user}/deactivate", whole=True, form=True,
)  # fmt: skip
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

"""Users, their tokens and their keys."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tunesmith.core.errors import TunesmithError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.registry.signing import keys
from tunesmith.registry.versions import list_versions
from tunesmith.store import identities
from tunesmith.store.identities import User, acting
from tunesmith.store.store import Store


class UserView(View):
    """One user. fingerprint: of their public key, None without a key.

    invalidated: labels of the versions that they signed and that no longer verify after this change.
    """

    user: str
    roles: tuple[str, ...]
    tenant: str
    region: str
    active: bool
    fingerprint: str | None
    invalidated: Annotated[tuple[str, ...], Field(exclude=True)] = ()


class UserList(View):
    """Every user, deactivated ones included."""

    users: tuple[UserView, ...]


class KeyView(View):
    """One enrolled public key. private: whether this machine holds its private half."""

    user: str
    fingerprint: str
    roles: tuple[str, ...]
    active: bool
    private: bool


class KeyList(View):
    """Every enrolled key."""

    keys: tuple[KeyView, ...]


class IssuedToken(View):
    """A new token. It is shown once; the store keeps only its digest."""

    user: str
    token: str


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
    public_key: Path | None = None,
) -> UserView:
    """Add a user. public_key: their own key as a PEM file; without one, a key pair is made when they first sign."""
    by = acting(store, actor)
    pem = public_key.read_bytes() if public_key is not None else None
    user = identities.add_user(store, name, roles, actor=by, scope=scope)
    if pem is not None:
        user = keys.enrol_public_key(store, name, pem, actor=by)
    return _view(user)


def set_roles(store: Store, name: str, roles: list[str], *, actor: str | None = None) -> UserView:
    """Replace a user's roles."""
    return _changed(store, identities.set_roles(store, name, roles, actor=acting(store, actor)))


def deactivate(store: Store, name: str, *, actor: str | None = None) -> UserView:
    """Deactivate a user: their token, approvals and signatures no longer count."""
    return _changed(store, identities.deactivate(store, name, actor=acting(store, actor)))


def issue_token(store: Store, name: str, *, actor: str | None = None) -> IssuedToken:
    """Make a new HTTP token for a user; any older token of theirs stops working."""
    return IssuedToken(user=name, token=identities.issue_token(store, name, actor=acting(store, actor)))


def list_keys(store: Store) -> KeyList:
    """Every enrolled key."""
    return KeyList(
        keys=tuple(
            KeyView(
                user=key.user,
                fingerprint=key.fingerprint,
                roles=key.roles,
                active=key.active,
                private=keys.private_key_path(store, key.user).is_file(),
            )
            for key in identities.trusted_keys(store)
        )
    )


def create_key(store: Store, name: str | None = None, *, actor: str | None = None) -> tuple[UserView, Path]:
    """Make a key pair for a user, by default for the caller; returns the user and the path of the private key."""
    by = acting(store, actor)
    user = keys.create_key(store, name or by, actor=by)
    return _view(user), keys.private_key_path(store, user.name)


def enrol_key(store: Store, name: str, file: Path, *, actor: str | None = None) -> UserView:
    """Bind a public key that was made elsewhere to a user."""
    return _view(keys.enrol_public_key(store, name, file.read_bytes(), actor=acting(store, actor)))


def _view(user: User, invalidated: tuple[str, ...] = ()) -> UserView:
    return UserView(
        user=user.name,
        roles=user.roles,
        tenant=user.tenant,
        region=user.region,
        active=user.active,
        fingerprint=user.fingerprint,
        invalidated=invalidated,
    )


def _changed(store: Store, user: User) -> UserView:
    """The user, with the versions that no longer verify because their signer may not register any more."""
    signed: list[str] = []
    if not user.may("version.register"):
        # A damaged registry must not prevent the deactivation of a user.
        with contextlib.suppress(TunesmithError):
            signed = [version.label for version in list_versions(store) if version.signer == user.name]
    return _view(user, tuple(signed))

"""Whom and which keys a person may see: an admin of all tenants and regions everybody, others themselves."""

from __future__ import annotations

from tunesmith.core.scope import Scope
from tunesmith.services import users
from tunesmith.services.users import KeyList, UserList
from tunesmith.store.identities import User
from tunesmith.store.store import Store


def is_admin(viewer: User) -> bool:
    """Whether a person is an admin of all tenants and regions."""
    return viewer.may("user.change") and viewer.scope == Scope()


def visible_users(store: Store, viewer: User) -> UserList:
    """The users whom the viewer may see."""
    known = users.list_users(store).users
    return UserList(users=tuple(one for one in known if is_admin(viewer) or one.user == viewer.name))


def visible_keys(store: Store, viewer: User) -> KeyList:
    """The keys of those users, enrolled and proposed."""
    known, everybody = users.list_keys(store), is_admin(viewer)
    return KeyList(
        keys=tuple(key for key in known.keys if everybody or key.user == viewer.name),
        proposed=tuple(key for key in known.proposed if everybody or key.user == viewer.name),
    )

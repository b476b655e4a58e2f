"""Whom a person may see, with keys and tokens: an admin of all tenants and regions everybody, others themselves."""

from __future__ import annotations

from tunesmith.core.errors import Refused
from tunesmith.core.scope import Scope
from tunesmith.services.accounts import users
from tunesmith.services.accounts.users import KeyList, TokenList, UserList
from tunesmith.store.people.identities import User
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


def visible_tokens(store: Store, viewer: User, user: str | None = None) -> TokenList:
    """The tokens of a user, by default of all whom the viewer may see. Raises Refused for a user whom they may not."""
    if user != viewer.name and not is_admin(viewer):
        if user is not None:
            raise Refused(f"{viewer.name} may see only their own tokens", fix="ask an admin")
        user = viewer.name
    return users.list_tokens(store, user)

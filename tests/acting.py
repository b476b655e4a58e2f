"""Doing an action as somebody."""

from typing import Any, TypeVar, cast

from pydantic import BaseModel

from tunesmith.project import Project
from tunesmith.services.actions import Acting, Action
from tunesmith.store.people.identities import acting, get_user
from tunesmith.store.store import Store

Result = TypeVar("Result", bound=BaseModel)


def looking(where: Store | Project, who: str | None = None, **more: Any) -> Acting:
    """Who acts or looks, by default the store's owner."""
    store = where if isinstance(where, Store) else where.store
    user = get_user(store, acting(store, who))
    return Acting(store, user, lambda: cast("Project", where), user.region, **more)


def do(where: Store | Project, action: Action[Any, Result], *, actor: str | None = None, **fields: Any) -> Result:
    """The result of an action. actor: by default the store's owner."""
    return action(looking(where, actor), action.request(fields))

"""Doing an action as somebody."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

from tunesmith.project import Project
from tunesmith.services.actions import Acting, Action
from tunesmith.store.people.identities import acting, get_user
from tunesmith.store.store import Store

Result = TypeVar("Result", bound=BaseModel)


def do(where: Store | Project, action: Action[Any, Result], *, actor: str | None = None, **fields: Any) -> Result:
    """The result of an action. actor: by default the store's owner."""
    store = where if isinstance(where, Store) else where.store

    def project() -> Project:
        assert isinstance(where, Project)
        return where

    return action(Acting(store, get_user(store, acting(store, actor)), project), action.request(fields))

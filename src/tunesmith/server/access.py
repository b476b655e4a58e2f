"""Who may call a route. Every route declares it as a dependency: a token of a scope, a session, or nobody's permission.

A route without such a declaration fails a test, and `caller` knows nobody there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Depends, Request

from tunesmith.server.errors import unauthorised
from tunesmith.server.serving import Serving, serving_of
from tunesmith.store.identities import User
from tunesmith.store.roles import TokenScope

Dependency = TypeVar("Dependency", bound=Callable[..., Any])


def decides(decision: str) -> Callable[[Dependency], Dependency]:
    """Mark a dependency that decides who may call the routes that take it. decision: its name, such as `session`."""

    def mark(dependency: Dependency) -> Dependency:
        dependency.decision = decision  # type: ignore[attr-defined]
        return dependency

    return mark


def needs(*scopes: TokenScope) -> Any:
    """A dependency: a valid token with one of these scopes; without scopes, any valid token.

    Raises ApiError 401 without a valid token.
    """

    @decides(" or ".join(scopes) or "any token")
    async def decide(request: Request) -> None:
        user = await asyncio.to_thread(serving_of(request).router.caller, bearer(request))
        request.state.caller = user

    return Depends(decide)


@decides("public")
async def _anybody() -> None:
    return


PUBLIC: Any = Depends(_anybody)


def caller(request: Request) -> tuple[User, Serving]:
    """Who calls, on a route that declares `needs`, and the server."""
    user = request.state.caller
    assert isinstance(user, User)
    return user, serving_of(request)


def bearer(request: Request) -> str:
    """The request's bearer token. Raises ApiError 401 without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthorised()
    return token.strip()

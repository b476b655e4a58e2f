"""Who may call a route. Every route declares it as a dependency: a token of a scope, a session, or nobody's permission.

A route without such a declaration fails a test, and `caller` knows nobody there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from tunesmith.server.errors import ApiError, bad_request, forbidden, unauthorised
from tunesmith.server.serving import Serving, serving_of
from tunesmith.store.people.identities import User
from tunesmith.store.people.roles import TokenScope
from tunesmith.store.people.tokens import Caller, Token

Dependency = TypeVar("Dependency", bound=Callable[..., Any])


def decides(decision: str) -> Callable[[Dependency], Dependency]:
    """Mark a dependency that decides who may call the routes that take it. decision: its name, such as `session`."""

    def mark(dependency: Dependency) -> Dependency:
        dependency.decision = decision  # type: ignore[attr-defined]
        return dependency

    return mark


def needs(*scopes: TokenScope) -> Any:
    """A dependency: a valid token with one of these scopes; without scopes, any valid token.

    Raises ApiError 404 or 400 for an address that nothing has, 401 without a valid token, 429 where the token or its
    tenant sends too many requests, 403 where the token lacks the scope or the user may not use models.
    """

    @decides(" or ".join(scopes) or "any token")
    async def decide(request: Request) -> None:
        _require_no_nul(request)
        serving = serving_of(request)
        found = serving.router.known_caller(bearer(request))
        if found is None:
            found = await asyncio.to_thread(serving.router.caller, bearer(request))
        serving.used[found.digest] = time.time()
        serving.rates.take(request.scope, found.digest, found.user.tenant)
        request.state.caller = found
        if scopes:
            require_scope(request, *scopes)

    return Depends(decide)


def _require_no_nul(request: Request) -> None:
    """Raise ApiError 404 or 400 for an address with a NUL character, which no database stores as text."""
    if "\0" in request.scope["path"]:
        raise ApiError(404, "There is nothing at this address.", code="not_found")
    if b"%00" in request.scope["query_string"]:
        raise bad_request("The address holds a NUL character.")


class PlainRoute(APIRoute):
    """A route whose endpoint and dependencies take the request and nothing else.

    FastAPI's own handler sorts out parameters, bodies and answers for each request, which takes as long as all else
    that it does.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request: the dependencies in turn, then the endpoint."""
        decide = [each.call for each in self.dependant.dependencies]
        answer = self.endpoint

        async def handle(request: Request) -> Response:
            for each in decide:
                assert each is not None
                await each(request)
            response: Response = await answer(request)
            return response

        return handle


def require_scope(request: Request, *scopes: TokenScope) -> None:
    """Raise ApiError 403 unless the token of a request has one of these scopes."""
    token = token_of(request)
    if not token.permits(*scopes):
        what = token.lacks(*scopes)
        raise forbidden(f"{what[:1].upper()}{what[1:]}.", "insufficient_scope")


@decides("public")
async def _anybody() -> None:
    return


PUBLIC: Any = Depends(_anybody)


def caller(request: Request) -> tuple[User, Serving]:
    """Who calls, on a route that declares `needs`, and the server."""
    return _caller(request).user, serving_of(request)


def token_of(request: Request) -> Token:
    """The token that a request came with, on a route that declares `needs`."""
    return _caller(request).token


def bearer(request: Request) -> str:
    """The request's bearer token. Raises ApiError 401 without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthorised()
    return token.strip()


def _caller(request: Request) -> Caller:
    found = request.state.caller
    assert isinstance(found, Caller)
    return found

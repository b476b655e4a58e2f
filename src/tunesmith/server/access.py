"""Who may call a route. Every route declares it as a dependency: a token of a scope, a session, or nobody's permission.

A route without such a declaration fails a test, and `caller` knows nobody there.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from tunesmith.core.reading.strict_json import Fields
from tunesmith.server.errors import ApiError, bad_request, capital, forbidden, unauthorised
from tunesmith.server.intake.body import read_body
from tunesmith.server.serving import Serving, serving_of
from tunesmith.store.people.identities import User
from tunesmith.store.people.roles import TokenScope
from tunesmith.store.people.tokens import Caller, Token
from tunesmith.store.store import Store

Body = TypeVar("Body", bound=BaseModel)
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
        found = await who_has(request)
        serving.used[found.digest] = time.time()
        serving.rates.take(request.scope, found.digest, found.user.tenant)
        request.state.caller = found
        if scopes and not found.token.permits(*scopes):
            raise forbidden(f"{capital(found.token.lacks(*scopes))}.", "insufficient_scope")

    return Depends(decide)


async def who_has(request: Request) -> Caller:
    """Who has the request's token now. Raises ApiError 401 without a valid one, 403 where they may not use models."""
    token, router = bearer(request), serving_of(request).router
    known = router.known_caller(token)
    return await asyncio.to_thread(router.caller, token) if known is None else known


def _require_no_nul(request: Request) -> None:
    """Raise ApiError 404 or 400 for an address with a NUL character, which no database stores as text."""
    if "\0" in request.scope["path"]:
        raise ApiError(404, "There is nothing at this address.", "not_found")
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


@dataclass(frozen=True)
class Call:
    """Who calls, and the server."""

    user: User
    token: Token
    serving: Serving

    @property
    def store(self) -> Store:
        """The server's store."""
        return self.serving.store


async def call_of(request: Request) -> Call:
    """Who calls, on a route that declares `needs`."""
    found: Caller = request.state.caller
    return Call(found.user, found.token, serving_of(request))


Calling = Annotated[Call, Depends(call_of)]


async def read(request: Request, call: Call, model: type[Body], in_path: Fields | None = None) -> Body:
    """A request's body. in_path: fields of the model that the path holds."""
    with call.serving.arrives(call.user) as count:
        return await read_body(request, model, call.serving.settings, count, in_path=in_path)


def taking(
    look: Callable[..., Any], answer: Callable[[Any, Callable[[], Any]], Awaitable[Response]]
) -> Callable[..., Coroutine[Any, Any, Response]]:
    """An endpoint that takes what a function takes. answer: given its first argument and the call that is to be made.

    Where that is made in a thread, the function needs no `await`, and may read the database.
    """
    signature = inspect.signature(look, eval_str=True)
    first = next(iter(signature.parameters))

    async def endpoint(**given: Any) -> Response:
        return await answer(given[first], partial(look, **given))

    endpoint.__name__, endpoint.__doc__ = look.__name__, look.__doc__
    endpoint.__signature__ = signature  # type: ignore[attr-defined]
    return endpoint


@decides("public")
async def _anybody() -> None:
    return


PUBLIC: Any = Depends(_anybody)


async def _on_lists(call: Call, look: Callable[[], Any]) -> Response:
    found = await call.serving.listing.run(call.user.name, look)
    return found if isinstance(found, Response) else JSONResponse(found.model_dump(mode="json", by_alias=True))


def in_turn(look: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
    """An endpoint of a function of a `Call`: a thread of those for lists runs it, and what it returns is the answer."""
    return taking(look, _on_lists)


def caller(request: Request) -> tuple[User, Serving]:
    """Who calls, on a route that declares `needs`, and the server."""
    found: Caller = request.state.caller
    return found.user, serving_of(request)


def bearer(request: Request) -> str:
    """The request's bearer token. Raises ApiError 401 without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthorised()
    return token.strip()

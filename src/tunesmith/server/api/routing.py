"""What these routes share: who calls, answers as JSON, and errors as the OpenAPI document states them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy.exc import DataError

from tunesmith.core.errors import Forbidden, Inconclusive, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.project import Project
from tunesmith.server.access import caller, token_of
from tunesmith.server.errors import ApiError, bad_request, forbidden, missing, not_stored, sentence
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.server.serving import Serving
from tunesmith.server.shared_threads import SharedThreads
from tunesmith.store.people.identities import User
from tunesmith.store.people.roles import TokenScope
from tunesmith.store.store import Store

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
Digest = Annotated[str, Path(pattern="^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]
Page = Annotated[int, Query(ge=1, le=1_000_000)]
Text = Annotated[str, Query(max_length=300)]
READ = (400, 401, 403, 404, 409, 429, 503)
CHANGE = (400, 401, 403, 404, 408, 409, 413, 429, 503, 507)


class ApiRoute(APIRoute):
    """A route whose services raise: what they say becomes an answer. refused: the code where they refuse."""

    refused: ClassVar[str]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                name = str(first["loc"][-1])
                raise bad_request(f"Invalid {name!r}: {first['msg']}", param=name) from error
            except (OverflowError, DataError) as error:  # a number or text that no column holds
                raise bad_request("The address is not valid.") from error
            except NotThere as error:
                raise ApiError(404, sentence(error), code=error.code) from error
            except UsageError as error:
                raise bad_request(sentence(error)) from error
            except Forbidden as error:
                raise forbidden(sentence(error), error.code or "permission_denied") from error
            except (Refused, Inconclusive) as error:
                own = error.code if isinstance(error, Refused) else ""
                raise ApiError(409, sentence(error), code=own or self.refused) from error
            except TunesmithError as error:
                if request.method == "GET":  # nothing was to be stored: the application logs it and answers 503
                    raise
                raise not_stored(error) from error

        return handler


def router(code: str = "refused") -> APIRouter:
    """A router for these routes. code: of the answer where a service refuses."""

    class Route(ApiRoute):
        refused = code

    return APIRouter(prefix="/api", route_class=Route)


def shows(model: type[BaseModel]) -> JsonObject:
    """How a route that only reads describes itself."""
    return {"response_model": model, "responses": errors(*READ), "openapi_extra": BEARER}


def changes(model: type[BaseModel], given: type[BaseModel] | None = None) -> JsonObject:
    """How a route that changes something describes itself. given: its body."""
    extra = BEARER if given is None else body(given)
    return {"response_model": model, "responses": errors(*CHANGE), "openapi_extra": extra}


@dataclass(frozen=True)
class Call:
    """Who calls, and the server."""

    request: Request
    user: User
    serving: Serving

    @property
    def store(self) -> Store:
        """The server's store."""
        return self.serving.store

    @property
    def project(self) -> Project:
        """The server's project. Raises NotThere where it has none."""
        return self.serving.own_project()

    @property
    def by(self) -> dict[str, str]:
        """Who acts, as services take it."""
        return {"actor": self.user.name}

    def permits(self, scope: TokenScope, action: str) -> bool:
        """Whether both the token and the user's roles permit an action."""
        return token_of(self.request).permits(scope) and self.user.may(action)

    async def answer(
        self, act: Callable[[], BaseModel | None], *, none: str = "", threads: SharedThreads | None = None
    ) -> JSONResponse:
        """What a service returns, as JSON. none: what there is not where it returns None, which is answered by 404."""
        found = await self.run(act, threads)
        if found is None:
            raise missing(none)
        return document(found)

    async def run(self, act: Callable[[], Result], threads: SharedThreads | None = None) -> Result:
        """What a call returns, on the threads that users share: those for lists, unless others are given."""
        return await (threads or self.serving.listing).run(self.user.name, act)

    async def read(self, model: type[Body], in_path: Fields | None = None) -> Body:
        """The request's body. in_path: fields of the model that the path holds."""
        with self.serving.arrives(self.user) as count:
            return await read_body(self.request, model, self.serving.settings, count, in_path=in_path)


def call_of(request: Request, action: str | None = None) -> Call:
    """Who calls, on a route that declares `needs`. Raises Forbidden where none of their roles permits the action."""
    user, serving = caller(request)
    call = Call(request, user, serving)
    if action is not None:
        call.user.require(action)
    return call


def whole_call_of(request: Request, action: str | None = None) -> Call:
    """The call of a user of all tenants and regions. Raises Forbidden for others, and as `call_of` does."""
    call = call_of(request)
    call.user.require_everything()
    if action is not None:
        call.user.require(action)
    return call


def document(found: BaseModel) -> JSONResponse:
    """A result as the answer."""
    return JSONResponse(found.model_dump(mode="json", by_alias=True), headers={"cache-control": "no-store"})

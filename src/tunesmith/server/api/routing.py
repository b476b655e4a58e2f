"""What these routes share: who calls, answers as JSON, and errors as the OpenAPI document states them.

A route that only reads is a function of a `Call` under `@routes.shows`. The routes of the actions that /api offers are
made from their list (services/actions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy.exc import DataError

from tunesmith.core.errors import Forbidden, Inconclusive, NotThere, Refused, TunesmithError, UsageError
from tunesmith.server.errors import ApiError, bad_request, forbidden, not_stored, sentence
from tunesmith.server.openapi import BEARER, answers, body, errors
from tunesmith.server.serving import FIELD, Call, Calling, document, needs, read, taking
from tunesmith.services.actions import Action, all_actions
from tunesmith.store.people.roles import TokenScope

Look = TypeVar("Look", bound=Callable[..., Any])
Digest = Annotated[str, Path(pattern="^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]
Position = Annotated[int, Query(ge=0, le=2**31 - 1)]  # the number behind or before which a list goes on
Page = Annotated[int, Query(ge=1, le=1_000_000)]
Text = Annotated[str, Query(max_length=300)]
READ = (400, 401, 403, 404, 409, 429, 503)
CHANGE = (400, 401, 403, 404, 408, 409, 413, 429, 503, 507)


class ApiRoute(APIRoute):
    """A route whose services raise: what they say becomes an answer."""

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
                raise ApiError(404, sentence(error), error.code) from error
            except UsageError as error:
                raise bad_request(sentence(error)) from error
            except Forbidden as error:
                raise forbidden(sentence(error), error.code or "permission_denied") from error
            except (Refused, Inconclusive) as error:
                raise ApiError(409, sentence(error), error.code or "refused") from error
            except TunesmithError as error:
                if request.method == "GET":  # nothing was to be stored: the application logs it and answers 503
                    raise
                raise not_stored(error) from error

        return handler


class ApiRouter(APIRouter):
    """Routes under /api."""

    def __init__(self) -> None:
        super().__init__(prefix="/api", route_class=ApiRoute)

    def shows(
        self,
        at: str,
        *tokens: TokenScope,
        whole: bool = False,
        permission: str | None = None,
        slow: bool = False,
        written: tuple[str, ...] = (),
        gives: Callable[..., BaseModel] | None = None,
    ) -> Callable[[Look], Look]:
        """Make a route of a function that takes a `Call` and returns the answer; a thread of those for lists runs it.

        tokens: the scopes of which a token needs one. whole: only for users of all tenants and regions. permission: of
        roles. slow: on the threads for what reads files. written: media types of what it answers, if that is no JSON.
        gives: a service that returns the same, where the function's annotation is imported for type checkers only.
        """
        responses = errors(*READ)
        if written:
            responses[200] = {"content": {kind: {} for kind in written}, "description": "Its text."}

        async def answer(call: Call, look: Callable[[], BaseModel | Response]) -> Response:
            if whole:
                call.user.require_everything()
            if permission is not None:
                call.user.require(permission)
            threads = call.serving.files if slow else call.serving.listing
            return document(await threads.run(call.actor, look))

        def added(look: Look) -> Look:
            if gives is not None:
                look.__annotations__["return"] = get_type_hints(gives)["return"]
            own = Response if written else JSONResponse
            add = self.get(
                at, dependencies=[needs(*tokens)], responses=responses, response_class=own, openapi_extra=BEARER
            )
            add(taking(look, answer))
            return look

        return added


def action_routes() -> APIRouter:
    """A route for each action with a path."""
    routes = ApiRouter()
    for action in all_actions():
        if action.at and action.api:
            routes.add_api_route(
                action.at,
                partial(_perform, action),
                methods=[action.method],
                dependencies=[needs(*action.tokens)],
                name=action.name,
                description=action.does.__doc__,
                **answers(action.result, *CHANGE, extra=body(action.asked, in_path=FIELD.findall(action.at))),
            )
    return routes


async def _perform(action: Action[Any, Any], request: Request, call: Calling) -> Response:
    action.check(call.user)
    asked = await read(request, call, action.asked, request.path_params)
    try:
        return document(await call.serving.perform(call, action, asked))
    except (NotThere, Forbidden):
        raise
    except UsageError as error:
        raise bad_request(sentence(error), error.where if error.where in action.asked.model_fields else None) from error
    except (Refused, Inconclusive) as error:
        error.code = error.code or action.refused
        raise

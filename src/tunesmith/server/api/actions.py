"""The routes of the actions that /api offers, made from their list (services/actions.py)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response

from tunesmith.core.errors import NotThere, UsageError
from tunesmith.server.access import needs, token_of
from tunesmith.server.actions import FIELD, perform
from tunesmith.server.api.routing import CHANGE, call_of, document, router
from tunesmith.server.errors import bad_request, sentence
from tunesmith.server.openapi import body, errors
from tunesmith.services.actions import Action, all_actions


def routes() -> APIRouter:
    """A route for each action with a path."""
    found = APIRouter()
    for action in all_actions():
        if action.at and action.api:
            own = router(code=action.refused)
            own.add_api_route(
                action.at,
                _endpoint(action),
                methods=[action.method],
                dependencies=[needs(*action.tokens)],
                response_model=action.result,
                responses=errors(*CHANGE),
                openapi_extra=body(action.asked, in_path=FIELD.findall(action.at)),
                name=action.name,
                description=action.does.__doc__,
            )
            found.include_router(own)
    return found


def _endpoint(action: Action[Any, Any]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def endpoint(request: Request) -> Response:
        call = call_of(request)
        action.check(call.user)
        asked = await call.read(action.asked, request.path_params)
        try:
            return document(await perform(call.serving, call.user, action, asked, token=token_of(request)))
        except NotThere:
            raise
        except UsageError as error:
            field = error.where if error.where in action.asked.model_fields else None
            raise bad_request(sentence(error), field) from error

    return endpoint

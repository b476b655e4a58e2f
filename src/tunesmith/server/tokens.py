"""/api/tokens: the same list of tokens as `tunesmith users tokens`, and the same changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.view import View
from tunesmith.server.access import caller, needs, require_scope, token_of
from tunesmith.server.errors import ApiError, bad_request, forbidden, not_stored
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.services import users as service
from tunesmith.store.roles import TokenScope

routes = APIRouter(prefix="/api/tokens")
Short = Annotated[str, Field(min_length=1, max_length=128)]


class TokenRequest(BaseModel):
    """A token to be made. name: a token `first` replaces the one before, another name must be free.

    user: by default the caller. scopes: by default those of the calling token. expires: days, as `90d`, or `never`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Short
    user: Short | None = None
    scopes: Annotated[tuple[TokenScope, ...], Field(min_length=1, max_length=20)] | None = None
    expires: Annotated[str, Field(pattern="^([1-9][0-9]{0,4}d|never)$")] | None = None


@routes.get(
    "",
    dependencies=[needs("tokens")],
    response_model=service.TokenList,
    responses=errors(400, 401, 403, 429),
    openapi_extra=BEARER,
)
async def tokens(request: Request, user: str | None = None) -> Response:
    """The caller's tokens, and for an admin everybody's. user: only that user's."""
    viewer, serving = caller(request)

    def listed() -> View:
        return service.visible_tokens(serving.store, viewer, user)

    return JSONResponse((await serving.listing.run(viewer.name, partial(_answered, listed))).document())


@routes.post(
    "",
    dependencies=[needs("tokens")],
    response_model=service.IssuedToken,
    responses=errors(400, 401, 403, 408, 413, 429, 503, 507),
    openapi_extra=body(TokenRequest),
)
async def issue(request: Request) -> Response:
    """Make a token, with no more scopes than the calling token and no later end. Its secret is in this answer only."""
    user, serving = caller(request)
    with serving.arrives(user) as count:
        given = await read_body(request, TokenRequest, serving.settings, count)

    def issued() -> View:
        return service.issue_token(
            serving.store,
            given.user or user.name,
            name=given.name,
            scopes=given.scopes or (),
            expires=given.expires,
            by=token_of(request),
            actor=user.name,
        )

    answer = (await serving.noting.run(user.name, partial(_answered, issued))).document()
    return JSONResponse(answer, headers={"cache-control": "no-store"})


@routes.delete(
    "/{user}/{name}",
    dependencies=[needs()],
    response_model=service.TokenView,
    responses=errors(400, 401, 403, 404, 429, 503, 507),
    openapi_extra=BEARER,
)
async def revoke(request: Request, user: str, name: str) -> Response:
    """End a token at once. A token may end itself, whatever its scopes are."""
    by, serving = caller(request)
    if (user, name) != (by.name, token_of(request).name):
        require_scope(request, "tokens")

    def revoked() -> View:
        try:
            return service.revoke_token(serving.store, user, name, actor=by.name)
        except UsageError as error:
            raise ApiError(404, f"{error.what[:1].upper()}{error.what[1:]}.", code="token_not_found") from error

    return JSONResponse((await serving.noting.run(by.name, partial(_answered, revoked))).document())


def _answered(act: Callable[[], View]) -> View:
    try:
        return act()
    except UsageError as error:
        raise bad_request(f"{error.what[:1].upper()}{error.what[1:]}.") from error
    except Refused as error:
        raise forbidden(f"{error.what[:1].upper()}{error.what[1:]}.") from error
    except TunesmithError as error:
        raise not_stored(error) from error

"""/api/tokens: the same list of tokens as `tunesmith users tokens`, and the same changes."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.errors import UsageError
from tunesmith.server.access import needs, require_scope, token_of
from tunesmith.server.api.routing import call_of, changes, router, sentence, shows
from tunesmith.server.errors import ApiError
from tunesmith.services.accounts import users as service
from tunesmith.services.accounts.people import visible_tokens
from tunesmith.store.people.roles import TokenScope

routes = router(403, "permission_denied")
TokenName = Annotated[str, Field(min_length=1, max_length=128)]


class TokenRequest(BaseModel):
    """A token to be made. name: a token `first` replaces the one before, another name must be free.

    user: by default the caller. scopes: by default those of the calling token. expires: days, as `90d`, or `never`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TokenName
    user: TokenName | None = None
    scopes: Annotated[tuple[TokenScope, ...], Field(min_length=1, max_length=20)] | None = None
    expires: Annotated[str, Field(pattern="^([1-9][0-9]{0,4}d|never)$")] | None = None


@routes.get("/tokens", dependencies=[needs("tokens")], **shows(service.TokenList))
async def tokens(request: Request, user: str | None = None) -> Response:
    """The caller's tokens, and for an admin everybody's. user: only that user's."""
    call = call_of(request)
    return await call.answer(partial(visible_tokens, call.store, call.user, user))


@routes.post("/tokens", dependencies=[needs("tokens")], **changes(service.IssuedToken, TokenRequest))
async def issue(request: Request) -> Response:
    """Make a token, with no more scopes than the calling token and no later end. Its secret is in this answer only."""
    call = call_of(request)
    given = await call.read(TokenRequest)
    make = partial(service.issue_token, call.store, given.user or call.user.name, name=given.name)
    made = partial(make, scopes=given.scopes or (), expires=given.expires, by=token_of(request), **call.by)
    return await call.answer(made, threads=call.serving.noting)


@routes.delete("/tokens/{user}/{name}", dependencies=[needs()], **changes(service.TokenView))
async def revoke(request: Request, user: str, name: str) -> Response:
    """End a token at once. A token may end itself, whatever its scopes are."""
    call = call_of(request)
    if (user, name) != (call.user.name, token_of(request).name):
        require_scope(request, "tokens")

    def revoked() -> service.TokenView:
        try:
            return service.revoke_token(call.store, user, name, **call.by)
        except UsageError as error:
            raise ApiError(404, sentence(error), code="token_not_found") from error

    return await call.answer(revoked, threads=call.serving.noting)

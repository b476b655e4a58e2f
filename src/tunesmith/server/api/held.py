"""/api/held: answers that wait for a reviewer."""

from __future__ import annotations

from functools import partial

from fastapi import Request
from fastapi.responses import Response

from tunesmith.server.access import needs, token_of
from tunesmith.server.api.routing import call_of, router, shows
from tunesmith.server.errors import bad_request
from tunesmith.services import held as service

routes = router()


@routes.get("/held", dependencies=[needs("chat", "decisions")], **shows(service.HeldList))
async def held_answers(request: Request, everything: str = "false") -> Response:
    """The answers that wait: the caller's own, and those of their tenant and region if they may review and the token
    has the scope decisions. everything:
    `true` lists decided ones too, until they are deleted. Without texts."""
    call = call_of(request)
    if everything not in ("true", "false"):
        raise bad_request("everything is true or false.", param="everything")
    look = partial(service.list_held, call.store, call.user, everything=everything == "true")
    return await call.answer(partial(look, reviews=token_of(request).permits("decisions")))


@routes.get("/held/{identifier}", dependencies=[needs("chat", "decisions")], **shows(service.HeldAnswerView))
async def held_answer(request: Request, identifier: str) -> Response:
    """One answer. `completion` is there once it may leave; reviewers also see the conversation and what waits. An
    answer that the caller may not see is answered like one that does not exist."""
    call = call_of(request)
    reviews = token_of(request).permits("decisions")
    return await call.answer(partial(service.show, call.store, call.user, identifier, reviews=reviews))

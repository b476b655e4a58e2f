"""/api/held: answers that wait for a reviewer, and the reviewer's decision."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.errors import UsageError
from tunesmith.holding.queue import AlreadyDecided, UnknownAnswer
from tunesmith.server.access import needs, token_of
from tunesmith.server.api.routing import call_of, changes, router, sentence, shows
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.server.intake import limits
from tunesmith.services.traffic import held as service

routes = router(403, "permission_denied")
_AT = "/held/{identifier}"


class HeldDecision(BaseModel):
    """What a reviewer decides. answer: the edited one, with replace only. reason: for the audit log and the caller."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: Literal["release", "replace", "refuse"]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
    answer: Annotated[str, Field(max_length=limits.EDITED)] | None = None


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


@routes.get(_AT, dependencies=[needs("chat", "decisions")], **shows(service.HeldAnswerView))
async def held_answer(request: Request, identifier: str) -> Response:
    """One answer. `completion` is there once it may leave; reviewers also see the conversation and what waits. An
    answer that the caller may not see is answered like one that does not exist."""
    call = call_of(request)
    look = partial(service.show, call.store, call.user, reviews=token_of(request).permits("decisions"))
    return await call.answer(partial(_found, look, identifier))


@routes.post(_AT + "/decide", dependencies=[needs("decisions")], **changes(service.HeldAnswerView, HeldDecision))
async def decide(request: Request, identifier: str) -> Response:
    """Release an answer, replace it by an edited one that fits the version's schema, or refuse it. One decision only:
    the second reviewer gets 409."""
    call = call_of(request)
    given = await call.read(HeldDecision)

    def decided(one: str) -> service.HeldAnswerView:
        found = service.decide(call.store, call.user, one, given.decision, reason=given.reason, answer=given.answer)
        call.serving.metrics.held.labels(found.state).inc()
        return found

    answer = await call.answer(partial(_found, decided, identifier), threads=call.serving.noting)
    call.serving.awaited.tell(_id(identifier))
    return answer


def _found(act: Callable[[str], service.HeldAnswerView], identifier: str) -> service.HeldAnswerView:
    try:
        return act(_id(identifier))
    except UnknownAnswer as error:
        raise ApiError(404, f"There is no held answer {identifier[:80]!r}.", code="held_not_found") from error
    except AlreadyDecided as error:
        raise ApiError(409, sentence(error), code="already_decided") from error
    except UsageError as error:
        raise bad_request(sentence(error), error.where if error.where in ("answer", "reason") else None) from error


def _id(text: str) -> str:
    """The id of a held answer, as a completion or an error names it. Raises UnknownAnswer for anything else."""
    found = text.removeprefix("chatcmpl-")
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise UnknownAnswer(f"there is no held answer {text[:80]!r}")
    return found

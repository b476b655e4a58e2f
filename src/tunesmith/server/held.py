"""/api/held: answers that wait for a reviewer, and the reviewer's decision."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.holding.queue import (
    AlreadyDecided,
    HeldAnswer,
    QueueFull,
    TooManyOfCaller,
    UnknownAnswer,
    get,
    put,
    response_of,
)
from tunesmith.server.access import caller, needs, token_of
from tunesmith.server.errors import (
    ApiError,
    HeldNotice,
    answer_held,
    answer_refused,
    bad_request,
    busy_for_user,
    forbidden,
    not_stored,
    too_many_held,
)
from tunesmith.server.intake import limits
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.server.recording import LOG
from tunesmith.server.serving import Serving
from tunesmith.services import held as service
from tunesmith.store import database

routes = APIRouter(dependencies=[needs("chat", "decisions")])
deciding = APIRouter(dependencies=[needs("decisions")])


class HeldDecision(BaseModel):
    """What a reviewer decides. answer: the edited one, with replace only. reason: for the audit log and the caller."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: Literal["release", "replace", "refuse"]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
    answer: Annotated[str, Field(max_length=limits.EDITED)] | None = None


@routes.get(
    "/api/held", response_model=service.HeldList, responses=errors(400, 401, 403, 429, 503), openapi_extra=BEARER
)
async def held_answers(request: Request, everything: str = "false") -> Response:
    """The answers that wait: the caller's own, and those of their tenant and region if they may review and the token
    has the scope decisions. everything:
    `true` lists decided ones too, until they are deleted. Without texts."""
    user, serving = caller(request)
    if everything not in ("true", "false"):
        raise bad_request("everything is true or false.", param="everything")
    reviews = token_of(request).permits("decisions")
    wanted = partial(service.list_held, serving.store, user, everything=everything == "true", reviews=reviews)
    return JSONResponse((await serving.listing.run(user.name, wanted)).document())


@routes.get(
    "/api/held/{identifier}",
    response_model=service.HeldAnswerView,
    responses=errors(401, 403, 404, 429, 503),
    openapi_extra=BEARER,
)
async def held_answer(request: Request, identifier: str) -> Response:
    """One answer. `completion` is there once it may leave; reviewers also see the conversation and what waits. An
    answer that the caller may not see is answered like one that does not exist."""
    user, serving = caller(request)
    reviews = token_of(request).permits("decisions")
    found = partial(service.show, serving.store, user, _id(identifier), reviews=reviews)
    return JSONResponse((await serving.listing.run(user.name, lambda: _told(found, identifier))).document())


@deciding.post(
    "/api/held/{identifier}/decide",
    response_model=service.HeldAnswerView,
    responses=errors(400, 401, 403, 404, 408, 409, 413, 429, 503, 507),
    openapi_extra=body(HeldDecision),
)
async def decide(request: Request, identifier: str) -> Response:
    """Release an answer, replace it by an edited one that fits the version's schema, or refuse it. One decision only:
    the second reviewer gets 409."""
    user, serving = caller(request)
    with serving.arrives(user) as count:
        given = await read_body(request, HeldDecision, serving.settings, count)
    one = _id(identifier)
    run = partial(service.decide, serving.store, user, one, given.decision, reason=given.reason, answer=given.answer)
    found = await serving.noting.run(user.name, lambda: _told(run, identifier))
    serving.metrics.held.labels(found.state).inc()
    serving.awaited.tell(one)
    return JSONResponse(found.document())


async def decision_on(answer: HeldAnswer, serving: Serving, gone: asyncio.Future[None]) -> tuple[str, str]:
    """(text, state) of an answer that must wait, once a reviewer let it leave. gone: done once the client left.

    Puts it into the queue. Raises ApiError where the queue or database is full, nobody decided in time, or the answer
    was refused.
    """
    holding = serving.holding
    assert holding is not None
    try:
        deadline = await asyncio.to_thread(put, serving.store, answer, holding, serving.settings.per_user)
    except QueueFull as error:
        serving.metrics.held.labels("full").inc()
        raise too_many_held(holding.at_most) from error
    except TooManyOfCaller as error:
        serving.metrics.held.labels("full").inc()
        raise busy_for_user(serving.settings.per_user, "held answers") from error
    except (TunesmithError, SQLAlchemyError, OSError) as error:
        LOG.error("the answer to request %s could not be held: %s", answer.id, type(error).__name__)  # not its text
        raise not_stored(error) from error
    serving.metrics.held.labels("held").inc()
    until = datetime.fromtimestamp(deadline, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    notice = HeldNotice(id=answer.id, url=f"/api/held/{answer.id}", deadline=until)
    if serving.drain.begun or not await serving.awaited.wait(answer.id, holding.wait, gone):
        raise answer_held(notice)

    def read() -> tuple[str, str, str]:
        with database.reading(serving.store.engine) as session:
            row = get(session, answer.id)
            left = response_of(row)
            return "" if left is None else str(row.texts.get("edited", answer.text)), row.state, row.reason

    try:
        text, state, reason = await asyncio.to_thread(read)
    except UnknownAnswer as error:
        raise answer_refused(notice, "its time is over") from error
    if state == "refused":
        raise answer_refused(notice, reason)
    if state == "waiting":
        raise answer_held(notice)
    return text, state


def _id(text: str) -> str:
    """The id of a held answer, as a completion or an error names it. Raises ApiError 404 for anything else."""
    found = text.removeprefix("chatcmpl-")
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise _unknown(text)
    return found


def _told(run: Callable[[], service.HeldAnswerView], identifier: str) -> service.HeldAnswerView:
    try:
        return run()
    except UnknownAnswer as error:
        raise _unknown(identifier) from error
    except AlreadyDecided as error:
        raise ApiError(409, f"{error.what[:1].upper()}{error.what[1:]}.", code="already_decided") from error
    except UsageError as error:
        raise bad_request(f"{error.what}.", error.where if error.where in ("answer", "reason") else None) from error
    except Refused as error:
        raise forbidden(f"{error.what}.") from error
    except TunesmithError as error:
        raise not_stored(error) from error


def _unknown(identifier: str) -> ApiError:
    return ApiError(404, f"There is no held answer {identifier[:80]!r}.", code="held_not_found")

"""/api/feedback, /api/rollouts, and the routes that watch a server: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.errors import TunesmithError
from tunesmith.core.view import View
from tunesmith.server.access import PUBLIC, caller, needs
from tunesmith.server.chat.routes import ID_PREFIX
from tunesmith.server.errors import ApiError, unknown_request
from tunesmith.server.intake import limits
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.server.recording import FeedbackResult, Withdrawal
from tunesmith.server.serving import Serving, serving_of
from tunesmith.services import rollouts as service
from tunesmith.store import database
from tunesmith.store.store import Store

# The number of rollout checks that the controller may miss before the server is not ready.
_MISSED_CHECKS = 10

routes = APIRouter()
Metric = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Score = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Feedback(BaseModel):
    """The expected text of an answer, or scores that were given elsewhere.

    request_id: a completion's id (`chatcmpl-...`) or the x-request-id header. keep: store the texts of the request, of
    its answer and of the expected one for a review, where the server's project allows that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: Annotated[str, Field(min_length=1, max_length=limits.REQUEST_ID)]
    expected: Annotated[str, Field(max_length=limits.EXPECTED)] | None = None
    keep: bool = False
    score: Annotated[dict[Metric, Score] | None, Field(min_length=1, max_length=limits.SCORES)] = None

    @model_validator(mode="after")
    def _one_of(self) -> Feedback:
        if (self.expected is None) == (self.score is None):
            raise ValueError("give either expected or score")
        return self


class Health(View):
    """The process answers. draining: it was told to stop, finishes the requests under way and takes no new ones."""

    ok: bool
    draining: bool


class Readiness(View):
    """Whether the server can answer: the database answers, the engine does not hang, the controller runs.

    draining: it was told to stop and takes no new requests.
    """

    ready: bool
    draining: bool
    database: bool
    engine: bool
    controller: bool


@routes.post(
    "/api/feedback",
    dependencies=[needs("feedback")],
    response_model=FeedbackResult,
    responses=errors(400, 401, 403, 404, 408, 409, 413, 429, 503, 507),
    openapi_extra=body(Feedback),
)
async def feedback(request: Request) -> Response:
    """Score a request of the caller's tenant. Each metric can be scored once."""
    user, serving = caller(request)
    with serving.arrives(user) as count:
        given = await read_body(request, Feedback, serving.settings, count)
    identifier = given.request_id.removeprefix(ID_PREFIX)
    score = partial(serving.recorder.feedback, user, identifier, given.expected, given.score or {}, given.keep)
    threads = serving.noting if given.expected is None and not given.keep else serving.scoring
    found = await threads.run(user.name, score)
    return JSONResponse(found.document())


@routes.delete(
    "/api/feedback/{request_id}",
    dependencies=[needs("feedback")],
    response_model=Withdrawal,
    responses=errors(401, 403, 404, 429, 503, 507),
    openapi_extra=BEARER,
)
async def withdraw(request: Request, request_id: str) -> Response:
    """Delete the kept text of a request that the caller made, and let none be kept from now on."""
    user, serving = caller(request)
    identifier = request_id.removeprefix(ID_PREFIX)
    if not re.fullmatch("[0-9a-f]{32}", identifier):
        raise unknown_request(identifier)
    found = await serving.noting.run(user.name, partial(serving.recorder.withdraw, user, identifier))
    return JSONResponse(found.document())


@routes.get(
    "/api/rollouts",
    dependencies=[needs("read")],
    response_model=service.RolloutList,
    responses=errors(401, 403, 429),
    openapi_extra=BEARER,
)
async def rollouts(request: Request) -> Response:
    """The rollouts of the caller's tenant and region, newest first."""
    user, serving = caller(request)
    found = await serving.listing.run(user.name, partial(service.visible_to, serving.store, user))
    return JSONResponse(found.document())


@routes.get(
    "/api/rollouts/{number}",
    dependencies=[needs("read")],
    response_model=service.RolloutView,
    responses=errors(401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def rollout(request: Request, number: str) -> Response:
    """One rollout. Another tenant's rollout is answered like one that does not exist."""
    user, serving = caller(request)
    found = None
    if re.fullmatch("[1-9][0-9]{0,17}", number):
        found = await serving.listing.run(user.name, partial(service.one_visible_to, serving.store, user, int(number)))
    if found is None:
        raise ApiError(404, f"There is no rollout {number[:20]!r}.", code="rollout_not_found")
    return JSONResponse(found.document())


@routes.get("/healthz", dependencies=[PUBLIC], response_model=Health)
async def healthz(request: Request) -> Response:
    """Say that the process answers, and whether it stops."""
    return JSONResponse(Health(ok=True, draining=serving_of(request).drain.begun).document())


@routes.get("/readyz", dependencies=[PUBLIC], response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(request: Request) -> Response:
    """Check the database, the engine and the rollout controller. 503 if one of them fails or the server drains."""
    serving = serving_of(request)
    checks = {"database": await asyncio.to_thread(_database_answers, serving.store), **parts_that_answer(serving)}
    draining = serving.drain.begun
    found = Readiness(ready=all(checks.values()) and not draining, draining=draining, **checks)
    return JSONResponse(found.document(), status_code=200 if found.ready else 503)


@routes.get("/metrics", dependencies=[PUBLIC], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(serving_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def parts_that_answer(serving: Serving) -> dict[str, bool]:
    """Whether the engine does not hang and the rollout controller runs."""
    late = time.monotonic() - serving.checked_at > _MISSED_CHECKS * serving.settings.check_seconds + 5
    return {"engine": not serving.worker.hanging(), "controller": not late}


def _database_answers(store: Store) -> bool:
    try:
        with database.reading(store.engine) as session:
            session.execute(text("select 1"))
    except (TunesmithError, SQLAlchemyError, OSError):
        return False
    return True

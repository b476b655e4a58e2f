"""/api/feedback, /api/rollouts, and what watches over a server: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.server.body import read_body
from tunesmith.server.chat import ID_PREFIX
from tunesmith.server.errors import ApiError
from tunesmith.server.serving import caller, serving_of
from tunesmith.services import rollouts as service
from tunesmith.store import database
from tunesmith.store.store import Store

# Looks at the rollouts that may be missed before the server counts as not ready.
_MISSED = 10

routes = APIRouter()
Metric = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Score = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Feedback(BaseModel):
    """What became of an answer: the text that was expected, or scores from elsewhere.

    request_id: a completion's id (`chatcmpl-...`) or the x-request-id header. keep: store the texts of the request and
    of what was expected, to become a test case; nothing else stores a text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: Annotated[str, Field(min_length=1, max_length=80)]
    expected: str | None = None
    keep: bool = False
    score: Annotated[dict[Metric, Score] | None, Field(min_length=1, max_length=16)] = None

    @model_validator(mode="after")
    def _one_of(self) -> Feedback:
        if (self.expected is None) == (self.score is None):
            raise ValueError("give either expected or score")
        if self.keep and self.expected is None:
            raise ValueError("keep needs expected: a case without an answer tests nothing")
        return self


@routes.post("/api/feedback")
async def feedback(request: Request) -> Response:
    """Score a request of the caller's tenant, once for each metric."""
    user, serving = await caller(request)
    given = await read_body(request, Feedback, serving.settings)
    identifier = given.request_id.removeprefix(ID_PREFIX)
    feedback_of = serving.recorder.feedback
    added = await asyncio.to_thread(feedback_of, user, identifier, given.expected, given.score or {}, given.keep)
    return JSONResponse({"request_id": identifier, "scores": added} | ({"kept": True} if given.keep else {}))


@routes.get("/api/rollouts")
async def rollouts(request: Request) -> Response:
    """The rollouts of the caller's tenant and region, newest first."""
    user, serving = await caller(request)
    found = await asyncio.to_thread(service.visible_to, serving.store, user)
    return JSONResponse(found.document())


@routes.get("/api/rollouts/{number}")
async def rollout(request: Request, number: str) -> Response:
    """One rollout. Another tenant's rollout is answered like one that does not exist."""
    user, serving = await caller(request)
    found = await asyncio.to_thread(service.visible_to, serving.store, user)
    for one in found.rollouts:
        if str(one.rollout) == number:
            return JSONResponse(one.document())
    raise ApiError(404, f"There is no rollout {number[:20]!r}.", code="rollout_not_found")


@routes.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"ok": True})


@routes.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 where the database answers, the engine does not hang and rollouts are looked after; else 503 and which."""
    serving = serving_of(request)
    late = time.monotonic() - serving.looked > _MISSED * serving.settings.look_seconds + 5
    checks = {
        "database": await asyncio.to_thread(_database_answers, serving.store),
        "engine": not serving.worker.hanging(),
        "controller": not late,
    }
    return JSONResponse({"ready": all(checks.values()), **checks}, status_code=200 if all(checks.values()) else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(serving_of(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _database_answers(store: Store) -> bool:
    try:
        with database.reading(store.engine) as session:
            session.execute(text("select 1"))
    except (SQLAlchemyError, OSError):
        return False
    return True

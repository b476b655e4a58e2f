"""The routes that watch a server: /healthz, /readyz, /metrics."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import generate_latest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.errors import TunesmithError
from tunesmith.core.values import View
from tunesmith.server.serving import PUBLIC, Serving, serving_of
from tunesmith.store import database
from tunesmith.store.store import Store

# The number of rollout checks that the controller may miss before the server is not ready.
_MISSED_CHECKS = 10
_PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

routes = APIRouter()


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
    readiness = Readiness(ready=all(checks.values()) and not draining, draining=draining, **checks)
    return JSONResponse(readiness.document(), status_code=200 if readiness.ready else 503)


@routes.get("/metrics", dependencies=[PUBLIC], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(generate_latest(serving_of(request).metrics.registry), media_type=_PROMETHEUS_TEXT)


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

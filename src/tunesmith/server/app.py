"""The HTTP application: its parts, the rollout controller in the background, and the handlers of errors."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tunesmith.core import telemetry
from tunesmith.core.errors import TunesmithError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.holding.queue import tidy
from tunesmith.monitoring.cases import delete_expired
from tunesmith.rollout.champions import ChampionWatch
from tunesmith.rollout.controller import Watched, advance
from tunesmith.rollout.state import Rollout, list_rollouts
from tunesmith.server import control, openapi
from tunesmith.server.answering.recording import LOG
from tunesmith.server.api import operations, records
from tunesmith.server.api.routing import action_routes
from tunesmith.server.chat import routes as chat
from tunesmith.server.console import routes as console
from tunesmith.server.draining import DrainMiddleware
from tunesmith.server.errors import ApiError, passes, unavailable
from tunesmith.server.fine_tuning import files
from tunesmith.server.fine_tuning import jobs as fine_tuning
from tunesmith.server.intake.rates import RateHeaders
from tunesmith.server.listening import drain
from tunesmith.server.serving import Serving
from tunesmith.services.review import count_held
from tunesmith.store import database
from tunesmith.store.people.tokens import note_use
from tunesmith.store.uploads import remove_leftovers

_LAST_SECONDS = 5.0  # for failed requests that wait to be kept when the server stops
_USED_SECONDS = 30.0  # between two notes of when tokens were used last, and of what is loaded
_REST = 10.0  # times as long as a rollout's check took: one with very many requests is checked less often
_FAILED_REST = 30.0  # seconds from a rollout's failed check to its next one, which may copy its weights again
_CLEAN_SECONDS = 300.0  # between two looks for kept requests whose time is over


def create_app(serving: Serving) -> FastAPI:
    """The application of a server."""
    # No pages of documentation: they load scripts from other servers.
    app = FastAPI(title="tunesmith", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.state.serving = serving
    if serving.settings.token_rate or serving.settings.tenant_rate:
        app.add_middleware(RateHeaders)
    app.add_middleware(DrainMiddleware, drain=serving.drain)
    if (sender := telemetry.active()) is not None:
        from tunesmith.server.tracing import TraceMiddleware

        serving.metrics.send_to(sender)
        app.add_middleware(TraceMiddleware, telemetry=sender)
    _add_routes(app)
    app.openapi = openapi_document  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(TunesmithError, _unforeseen)
    app.add_exception_handler(Exception, _unforeseen)
    return app


def openapi_document() -> JsonObject:
    """The OpenAPI document of every route. Needs no running server."""
    app = FastAPI()
    _add_routes(app)
    return openapi.document(app.routes, version("tunesmith"))


def _add_routes(app: FastAPI) -> None:
    parts = (chat, control, operations, records, files, fine_tuning, console)
    # Routes are tried in turn.
    for routes in (chat.answering, *(part.routes for part in parts), action_routes()):
        app.include_router(routes)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    serving: Serving = app.state.serving
    with contextlib.suppress(TunesmithError, OSError):  # the next upload tries it again
        await asyncio.to_thread(remove_leftovers, serving.store)
    serving.worker.start()
    serving.checked_at = time.monotonic()
    controller = asyncio.create_task(_control(serving))
    try:
        yield
    finally:
        controller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await controller
        if not serving.drain.begun:
            await drain(serving)
        serving.stop_threads()
        await asyncio.to_thread(serving.recorder.stop, _LAST_SECONDS)
        with contextlib.suppress(TunesmithError, OSError):  # a database that is away must not keep the process
            await _note_use(serving)
            await asyncio.to_thread(serving.versions.end)


async def _control(serving: Serving) -> None:
    """Advance every live rollout, and tell of champions that may not serve, every check_seconds.

    Decides on held answers whose deadline is over. Deletes kept requests whose time is over, and writes when tokens
    were used, less often. What fails keeps nothing else from its turn.
    """
    watched = Watched()
    watch, cleaned_at, noted_at = ChampionWatch(serving.store), -math.inf, time.monotonic()
    due: dict[int, float] = {}  # rollout -> when it is checked again
    while True:
        with _go_on(serving, "looking for live rollouts"):
            for rollout in await asyncio.to_thread(list_rollouts, serving.store, live=True):
                if time.monotonic() < due.get(rollout.id, -math.inf):
                    continue
                due[rollout.id] = time.monotonic() + _FAILED_REST
                with _go_on(serving, f"checking rollout {rollout.id}"):
                    moved, seconds = await asyncio.to_thread(_advance, serving, rollout, watched)
                    due[rollout.id] = time.monotonic() + _REST * seconds
                    if moved.revision != rollout.revision:
                        LOG.info("rollout %d of %s: %s, step %d", moved.id, moved.name, moved.status, moved.step)
        with _go_on(serving, "checking the champions"):
            refused = await asyncio.to_thread(watch.refused)
            serving.metrics.champions_refused.set(len(refused))
        with _go_on(serving, "deciding on held answers at their deadline"):
            for _ in await asyncio.to_thread(tidy, serving.store):
                serving.metrics.held.labels("expired").inc()
        with _go_on(serving, "looking for decisions on held answers"):
            serving.metrics.held_waiting.set(await asyncio.to_thread(count_held, serving.store))
            await serving.awaited.look(serving.store)
        with _go_on(serving, "tidying the database"):
            await asyncio.to_thread(database.checkpoint, serving.store.engine)
            if time.monotonic() - cleaned_at >= _CLEAN_SECONDS:
                cleaned_at = time.monotonic()
                await asyncio.to_thread(delete_expired, serving.store)
                await asyncio.to_thread(database.empty_log, serving.store.engine)
        if time.monotonic() - noted_at >= _USED_SECONDS:
            noted_at = time.monotonic()
            with _go_on(serving, "noting when tokens were used"):
                await _note_use(serving)
            with _go_on(serving, "noting what is loaded"):
                await asyncio.to_thread(serving.versions.renew)
        serving.checked_at = time.monotonic()
        await asyncio.sleep(serving.settings.check_seconds)


@contextlib.contextmanager
def _go_on(serving: Serving, what: str) -> Iterator[None]:
    """Log and count an error of one part of the controller, which must not end it."""
    try:
        yield
    except Exception:  # noqa: BLE001
        serving.metrics.controller_failures.inc()
        LOG.exception("%s failed", what)


def _advance(serving: Serving, rollout: Rollout, watched: Watched) -> tuple[Rollout, float]:
    """(the rollout as it is now, seconds of processor time that the check took)."""
    began = time.thread_time()
    return advance(serving.store, rollout.id, watched=watched), time.thread_time() - began


async def _note_use(serving: Serving) -> None:
    """Write when tokens were used last."""
    used, serving.used = serving.used, {}
    if used:
        await asyncio.to_thread(note_use, serving.store, used)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.app.state.serving.metrics.refused.labels(str(error.status)).inc()
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return await _api_error(request, ApiError(error.status_code, str(error.detail), code, headers=error.headers))


async def _unforeseen(request: Request, error: Exception) -> Response:
    LOG.error("%s %s raised", request.method, request.url.path, exc_info=error)
    if passes(error):
        return await _api_error(request, unavailable())
    return await _api_error(request, ApiError(500, "Internal error.", "internal_error"))

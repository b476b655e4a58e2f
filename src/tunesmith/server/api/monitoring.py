"""/api/recalls, /api/impact, /api/drift, /api/retraining and /api/webhooks: what operators look after.

All of it is about every tenant and region, so these routes are for users of all of them.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.monitoring.recall import CauseKind
from tunesmith.monitoring.recall_status import RecallStatus
from tunesmith.server.access import needs
from tunesmith.server.api.routing import router, shows, whole_call_of
from tunesmith.services import monitoring, retraining, webhooks

routes = router()
Value = Annotated[str, Query(min_length=1, max_length=300)]


@routes.get("/recalls", dependencies=[needs("read")], **shows(monitoring.RecallList))
async def recalls(request: Request) -> Response:
    """What was recalled and why, newest first."""
    call = whole_call_of(request)
    return await call.answer(partial(monitoring.list_recalls, call.store))


@routes.get("/recalls/pending", dependencies=[needs("read")], **shows(monitoring.PendingRetrains))
async def pending(request: Request) -> Response:
    """The names whose recalled version is not replaced yet."""
    call = whole_call_of(request)
    return await call.answer(partial(monitoring.list_pending_retrains, call.store))


@routes.get("/recalls/status", dependencies=[needs("read")], **shows(RecallStatus))
async def status(request: Request, kind: CauseKind, value: Value) -> Response:
    """Whether something that was recalled is gone."""
    call = whole_call_of(request)

    def look() -> RecallStatus:
        return monitoring.recall_status_of(call.store, monitoring.cause_of(call.store, kind, value))

    return await call.answer(look)


@routes.get("/impact", dependencies=[needs("read")], **shows(monitoring.Impact))
async def impact(request: Request, base: Value) -> Response:
    """What depends on a base. base: as a project file names it, or the start of its digest."""
    call = whole_call_of(request)
    return await call.answer(partial(monitoring.impact, call.store, base))


@routes.get("/drift", dependencies=[needs("read")], **shows(monitoring.Drift))
async def drift(request: Request) -> Response:
    """Whether requests to the project's champion drifted; with kept requests as examples for who may review rows, if
    the token has the scope rows."""
    call = whole_call_of(request)
    texts = call.permits("rows", "row.review")
    return await call.answer(partial(monitoring.drift, call.project, texts=texts), threads=call.serving.files)


@routes.get("/retraining", dependencies=[needs("read")], **shows(retraining.Retraining))
async def due(request: Request) -> Response:
    """Why a new version is due, and the runs that were queued for it."""
    call = whole_call_of(request)
    return await call.answer(partial(retraining.look, call.project), threads=call.serving.files)


@routes.get("/webhooks", dependencies=[needs("read")], **shows(webhooks.WebhookList))
async def hooks(request: Request) -> Response:
    """The project's webhooks, and deliveries that failed."""
    call = whole_call_of(request)
    return await call.answer(partial(webhooks.list_webhooks, call.project))

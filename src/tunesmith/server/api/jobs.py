"""/api/jobs: the same list, progress, log and curves as `tunesmith jobs` shows."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response

from tunesmith.server.access import needs
from tunesmith.server.api.routing import Number, call_of, router, shows
from tunesmith.services import jobs as service

routes = router()
Asked = Annotated[int, Query(ge=0, le=2**31 - 1)]
_AT = "/jobs/{number}"
_MOST = 100


@routes.get("/jobs", dependencies=[needs("read", "jobs")], **shows(service.JobList))
async def jobs(request: Request, before: Asked | None = None, most: Annotated[int, Query(ge=1)] = _MOST) -> Response:
    """The jobs of the caller's tenant and region, newest first. before: only those with a lower number; most: how many,
    100 by default and at most."""
    call = call_of(request)
    return await call.answer(partial(service.list_jobs, call.store, call.user, before=before, most=min(most, _MOST)))


@routes.get(_AT, dependencies=[needs("read", "jobs")], **shows(service.JobView))
async def job(request: Request, number: Number) -> Response:
    """One job: its state, the step that it is at, the time left for this step, its result or its error. Another
    tenant's job is answered like one that does not exist."""
    call = call_of(request)
    return await call.answer(partial(service.show, call.store, number, call.user))


@routes.get(_AT + "/log", dependencies=[needs("read", "jobs")], **shows(service.JobLog))
async def log(request: Request, number: Number, after: Asked = 0) -> Response:
    """The lines of a job's log, oldest first. after: only those with a higher number. Tracebacks and paths of the
    server are shown to its engineers, operators and admins, and not to those of one tenant or region."""
    call = call_of(request)
    return await call.answer(partial(service.log, call.store, number, call.user, after=after))


@routes.get(_AT + "/curves", dependencies=[needs("read", "jobs")], **shows(service.JobCurves))
async def curves(request: Request, number: Number) -> Response:
    """The losses and scores of a job's trainings, also while it runs, with the time and memory that were predicted."""
    call = call_of(request)
    return await call.answer(partial(service.curves, call.store, number, call.user))

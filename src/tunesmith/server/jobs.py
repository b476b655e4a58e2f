"""/api/jobs: the same list, progress and log as `tunesmith jobs`, and the same changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.server.access import caller, needs
from tunesmith.server.client_text import job_for, log_for
from tunesmith.server.errors import ApiError, bad_request, forbidden, not_stored
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.services import jobs as service
from tunesmith.services import run_curves, run_settings
from tunesmith.store.identities import User
from tunesmith.store.store import Store

routes = APIRouter()
_NUMBER = re.compile("[1-9][0-9]{0,8}")
_MOST = 100


@routes.get(
    "/api/jobs",
    dependencies=[needs("read", "jobs")],
    response_model=service.JobList,
    responses=errors(400, 401, 403, 429),
    openapi_extra=BEARER,
)
async def jobs(request: Request, before: str | None = None, most: str | None = None) -> Response:
    """The jobs of the caller's tenant and region, newest first. before: only those with a lower number; most: how many,
    100 by default and at most."""
    user, serving = caller(request)
    earlier = None if before is None else _number(before, "before")
    count = _MOST if most is None else min(_MOST, _number(most, "most"))
    listed = partial(service.list_jobs, serving.store, before=earlier, most=count, scope=user.scope)
    found = await serving.listing.run(user.name, listed)
    shown = tuple(job_for(user, each) for each in found.jobs)
    return JSONResponse(found.model_copy(update={"jobs": shown}).document())


@routes.get(
    "/api/jobs/{number}",
    dependencies=[needs("read", "jobs")],
    response_model=service.JobView,
    responses=errors(401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def job(request: Request, number: str) -> Response:
    """One job: its state, the step that it is at, the time left for this step, its result or its error. Another
    tenant's job is answered like one that does not exist."""
    user, serving = caller(request)
    return JSONResponse((await serving.listing.run(user.name, partial(_seen, serving.store, user, number))).document())


@routes.get(
    "/api/jobs/{number}/log",
    dependencies=[needs("read", "jobs")],
    response_model=service.JobLog,
    responses=errors(400, 401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def log(request: Request, number: str, after: str | None = None) -> Response:
    """The lines of a job's log, oldest first. after: only those with a higher number. Tracebacks and paths of the
    server are shown to its engineers, operators and admins, and not to those of one tenant or region."""
    user, serving = caller(request)
    known = 0 if after is None else _number(after, "after")

    def read() -> service.JobLog:
        return log_for(user, service.log(serving.store, _seen(serving.store, user, number).job, known))

    return JSONResponse((await serving.listing.run(user.name, read)).document())


@routes.get(
    "/api/jobs/{number}/curves",
    dependencies=[needs("read", "jobs")],
    response_model=run_curves.JobCurves,
    responses=errors(401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def curves(request: Request, number: str) -> Response:
    """The losses and scores of a job's trainings, also while it runs, with the time and memory that were predicted."""
    user, serving = caller(request)

    def read() -> run_curves.JobCurves:
        return run_curves.curves(serving.store, _seen(serving.store, user, number).job)

    return JSONResponse((await serving.listing.run(user.name, read)).document())


@routes.get(
    "/api/jobs/{number}/compare/{other}",
    dependencies=[needs("read", "jobs")],
    response_model=run_curves.JobComparison,
    responses=errors(401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def compare(request: Request, number: str, other: str) -> Response:
    """Two jobs: their curves, the settings that differ, and their results side by side."""
    user, serving = caller(request)

    def read() -> run_curves.JobComparison:
        a, b = (_seen(serving.store, user, each).job for each in (number, other))
        found = run_curves.compare(serving.store, a, b, scope=user.scope)
        return found.model_copy(update={"a": job_for(user, found.a), "b": job_for(user, found.b)})

    return JSONResponse((await serving.listing.run(user.name, read)).document())


class JobRequest(BaseModel):
    """A job for a worker: a run of the project's pipeline, or a forecast of the training of a candidate.

    candidate: that is forecast, by default the only one that is trained. changes: training settings by candidate, for
    this job only. priority: jobs with a higher one are taken first. key: the same key again gives the same run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["run", "forecast"] = "run"
    candidate: Annotated[str, Field(max_length=200)] | None = None
    changes: dict[str, dict[str, int | float | str]] = {}
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    key: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> JobRequest:
        if (self.candidate if self.kind == "run" else self.key) is not None:
            raise ValueError("candidate is for forecasts, and key for runs")
        return self


@routes.post(
    "/api/jobs",
    dependencies=[needs("jobs")],
    response_model=service.JobView,
    responses=errors(400, 401, 403, 404, 408, 409, 413, 429, 503, 507),
    openapi_extra=body(JobRequest),
)
async def add(request: Request) -> Response:
    """Queue a run or a forecast. It is for all tenants and regions, and so must its caller be."""
    user, serving = caller(request)
    if not user.may("job.add") or not user.scope.covers(Scope()):
        raise forbidden(f"{user.name} may not start runs for all tenants and regions.")
    with serving.arrives(user) as count:
        given = await read_body(request, JobRequest, serving.settings, count)

    def run() -> View:
        if serving.project is None:
            raise ApiError(404, "This server has no project.", code="no_project")
        try:
            project = run_settings.read_again(serving.project)
            more: dict[str, Any] = {"changes": given.changes, "priority": given.priority, "actor": user.name}
            if given.kind == "run":
                return service.queue_run(project, key=given.key, **more)
            return service.queue_forecast(project, given.candidate, **more)
        except UsageError as error:
            raise bad_request(f"{error.what}.") from error
        except Refused as error:
            raise ApiError(409, f"{error.what}.", code="job_state") from error
        except TunesmithError as error:
            raise not_stored(error) from error

    return JSONResponse((await serving.files.run(user.name, run)).document())


_CHANGE: dict[str, Any] = {
    "response_model": service.JobView,
    "responses": errors(401, 403, 404, 409, 429, 503, 507),
    "openapi_extra": BEARER,
}


@routes.post("/api/jobs/{number}/cancel", dependencies=[needs("jobs")], **_CHANGE)
async def cancel(request: Request, number: str) -> Response:
    """End a job for good. A running one ends between two of its steps, and its checkpoints are kept."""
    return await _changed(request, number, service.cancel)


@routes.post("/api/jobs/{number}/pause", dependencies=[needs("jobs")], **_CHANGE)
async def pause(request: Request, number: str) -> Response:
    """Keep a job from being performed until it is resumed. A running one stops between two of its steps."""
    return await _changed(request, number, service.pause)


@routes.post("/api/jobs/{number}/resume", dependencies=[needs("jobs")], **_CHANGE)
async def resume(request: Request, number: str) -> Response:
    """Put a paused job back into the queue. A training continues from its newest checkpoint."""
    return await _changed(request, number, service.resume)


async def _changed(request: Request, number: str, change: Callable[..., service.JobView]) -> Response:
    user, serving = caller(request)
    if not user.may("job.change"):
        raise forbidden(f"{user.name} may not change jobs.")

    def run() -> View:
        found = _seen(serving.store, user, number)
        try:
            return job_for(user, change(serving.store, found.job, actor=user.name))
        except Refused as error:
            raise ApiError(409, f"Job {found.job}: {error.what}.", code="job_state") from error
        except TunesmithError as error:
            raise not_stored(error) from error

    return JSONResponse((await serving.noting.run(user.name, run)).document())


def _seen(store: Store, user: User, number: str) -> service.JobView:
    """A job of the user's tenant and region, as they may read it. Raises ApiError 404 for any other number."""
    found = None
    if _NUMBER.fullmatch(number):
        try:
            found = service.show(store, int(number))
        except UsageError:
            found = None
    if found is None or not user.scope.covers(found.scope):
        raise ApiError(404, f"There is no job {number[:20]!r}.", code="job_not_found")
    return job_for(user, found)


def _number(text: str, name: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise bad_request(f"{name} must be a whole number from 1 to 999999999.", param=name)
    return int(text)

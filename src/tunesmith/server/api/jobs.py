"""/api/jobs: the same list, progress and log as `tunesmith jobs`, and the same changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.core.errors import Refused, UsageError
from tunesmith.server.access import needs
from tunesmith.server.api.routing import Call, Number, call_of, changes, router, shows
from tunesmith.server.client_text import job_for, log_for
from tunesmith.server.errors import ApiError
from tunesmith.services import jobs as service
from tunesmith.services import run_settings

routes = router(code="job_state")
Asked = Annotated[int, Query(ge=0, le=2**31 - 1)]
_AT = "/jobs/{number}"
_MOST = 100


@routes.get("/jobs", dependencies=[needs("read", "jobs")], **shows(service.JobList))
async def jobs(request: Request, before: Asked | None = None, most: Annotated[int, Query(ge=1)] = _MOST) -> Response:
    """The jobs of the caller's tenant and region, newest first. before: only those with a lower number; most: how many,
    100 by default and at most."""
    call = call_of(request)

    def look() -> service.JobList:
        found = service.list_jobs(call.store, before=before, most=min(most, _MOST), scope=call.user.scope)
        return found.model_copy(update={"jobs": tuple(job_for(call.user, each) for each in found.jobs)})

    return await call.answer(look)


@routes.get(_AT, dependencies=[needs("read", "jobs")], **shows(service.JobView))
async def job(request: Request, number: Number) -> Response:
    """One job: its state, the step that it is at, the time left for this step, its result or its error. Another
    tenant's job is answered like one that does not exist."""
    call = call_of(request)
    return await call.answer(partial(_seen, call, number))


@routes.get(_AT + "/log", dependencies=[needs("read", "jobs")], **shows(service.JobLog))
async def log(request: Request, number: Number, after: Asked = 0) -> Response:
    """The lines of a job's log, oldest first. after: only those with a higher number. Tracebacks and paths of the
    server are shown to its engineers, operators and admins, and not to those of one tenant or region."""
    call = call_of(request)
    return await call.answer(lambda: log_for(call.user, service.log(call.store, _seen(call, number).job, after)))


@routes.get(_AT + "/curves", dependencies=[needs("read", "jobs")], **shows(service.JobCurves))
async def curves(request: Request, number: Number) -> Response:
    """The losses and scores of a job's trainings, also while it runs, with the time and memory that were predicted."""
    call = call_of(request)
    return await call.answer(lambda: service.curves(call.store, _seen(call, number).job))


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


@routes.post("/jobs", dependencies=[needs("jobs")], **changes(service.JobView, JobRequest))
async def add(request: Request) -> Response:
    """Queue a run or a forecast. It is for all tenants and regions, and so must its caller be."""
    call = call_of(request, "job.add")
    call.require_whole()
    given = await call.read(JobRequest)

    def queued() -> service.JobView:
        project = run_settings.read_again(call.project)
        more: dict[str, Any] = {"changes": given.changes, "priority": given.priority, **call.by}
        if given.kind == "run":
            return service.queue_run(project, key=given.key, **more)
        return service.queue_forecast(project, given.candidate, **more)

    return await call.answer(queued, threads=call.serving.files)


@routes.post(_AT + "/cancel", dependencies=[needs("jobs")], **changes(service.JobView))
async def cancel(request: Request, number: Number) -> Response:
    """End a job for good. A running one ends between two of its steps, and its checkpoints are kept."""
    return await _changed(request, number, service.cancel)


@routes.post(_AT + "/pause", dependencies=[needs("jobs")], **changes(service.JobView))
async def pause(request: Request, number: Number) -> Response:
    """Keep a job from being performed until it is resumed. A running one stops between two of its steps."""
    return await _changed(request, number, service.pause)


@routes.post(_AT + "/resume", dependencies=[needs("jobs")], **changes(service.JobView))
async def resume(request: Request, number: Number) -> Response:
    """Put a paused job back into the queue. A training continues from its newest checkpoint."""
    return await _changed(request, number, service.resume)


async def _changed(request: Request, number: Number, change: Callable[..., service.JobView]) -> Response:
    call = call_of(request, "job.change")

    def changed() -> service.JobView:
        found = _seen(call, number)
        try:
            return job_for(call.user, change(call.store, found.job, **call.by))
        except Refused as error:
            raise Refused(f"job {found.job}: {error.what}", fix=error.fix) from error

    return await call.answer(changed, threads=call.serving.noting)


def _seen(call: Call, number: int) -> service.JobView:
    """A job of the caller's tenant and region, as they may read it. Raises ApiError 404 for any other number."""
    try:
        return job_for(call.user, service.show(call.store, number, scope=call.user.scope))
    except UsageError as error:
        raise ApiError(404, f"There is no job {number}.", code="job_not_found") from error

"""The list of jobs, and one job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Path, Query, Request, Response

from tunesmith.core.errors import UsageError
from tunesmith.jobs.state import ENDED, STATES
from tunesmith.server.api.routing import Page
from tunesmith.server.client_text import job_for, log_for
from tunesmith.server.console.jobs.curves import charts, numbers
from tunesmith.server.console.people.session import Changing, Looking, Viewer
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import ApiError, forbidden, missing
from tunesmith.services import jobs, worker
from tunesmith.services.jobs import JobView

routes = router()
_PAGE = 50  # jobs on a page
_LINES = 100  # of a log on a page
Number = Annotated[int, Path(ge=1, le=999_999_999)]
Asked = Annotated[int, Query(ge=1, le=999_999_999)]


@routes.get("/console/jobs")
async def listed(viewer: Looking, state: str = "", kind: str = "", by: str = "", page: Page = 1) -> Response:
    """The jobs of this person's tenant and region, newest first."""
    filters = {"state": state, "kind": kind, "by": by}
    given = {name: value for name, value in filters.items() if value}
    read = partial(
        jobs.page_of_jobs,
        viewer.store,
        states=jobs.states_named([state] if state else ()),
        kinds=[kind] if kind else (),
        by=by or None,
        first=(page - 1) * _PAGE,
        most=_PAGE,
        scope=viewer.user.scope,
    )
    found = await viewer.run(read)
    return viewer.page(
        "jobs.html.jinja",
        jobs=[job_for(viewer.user, each) for each in found.jobs],
        total=found.total,
        page=page,
        last=max(1, -(-found.total // _PAGE)),
        filters=filters,
        given=given,
        here="/console/jobs?" + (urlencode(given) + "&" if given else ""),
        states=STATES,
        kinds=worker.KINDS,
        reason=no_start(viewer),
    )


@routes.get("/console/jobs/{number}")
async def run(viewer: Looking, number: Number, lines: Asked | None = None) -> Response:
    """One job. lines: the log's lines before this one instead of the newest."""

    def read() -> dict[str, Any]:
        job = _seen(viewer, number)
        return {
            "job": job,
            "ended": job.state in ENDED,
            "curves": jobs.curves(viewer.store, number),
            "log": log_for(viewer.user, jobs.newest_lines(viewer.store, number, before=lines, most=_LINES)).lines,
        }

    found = await viewer.run(read)
    may = viewer.user.may("job.change")
    drawn = charts(found["curves"])
    return viewer.page("jobs_one.html.jinja", **found, charts=drawn, may=may, paged=lines is not None, numbers=numbers)


_CHANGES: Mapping[str, Callable[..., JobView]] = {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.resume}


@routes.post("/console/jobs/{number}/{change}")
async def change(request: Request, viewer: Changing, number: Number, change: str) -> Response:
    """Cancel, pause or resume a job."""
    if change not in _CHANGES:
        raise missing("page")
    if not viewer.user.may("job.change"):
        raise forbidden(f"{viewer.user.name} may not change jobs.")

    def changed() -> None:
        _seen(viewer, number)
        _CHANGES[change](viewer.store, number, actor=viewer.user.name)

    await viewer.run(changed)
    return gone_to(request, f"/console/jobs/{number}")


def _seen(viewer: Viewer, number: int) -> JobView:
    """A job of this person's tenant and region, as they may read it. Raises ApiError 404 for any other number."""
    try:
        return job_for(viewer.user, jobs.show(viewer.store, number, scope=viewer.user.scope))
    except UsageError as error:
        raise ApiError(404, f"There is no job {number}.", code="job_not_found") from error


def no_start(viewer: Viewer) -> str:
    """Why this person may start no run; "" where they may."""
    user = viewer.user
    if not user.may("job.add"):
        return "Starting a run needs the role engineer."
    if user.tenant or user.region:
        return (
            "A run trains on the rows of all tenants and regions, and you act for one. With files of your own you "
            "train for it alone, by /v1/fine_tuning/jobs."
        )
    return "" if viewer.serving.project else "This server has no project."

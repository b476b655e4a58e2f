"""The first page: what serves now, rollouts in progress, what needs action by whom, and whether all parts work."""

from __future__ import annotations

from functools import partial

from fastapi import Response

from tunesmith.server.console.people.session import Looking
from tunesmith.server.console.routing import router
from tunesmith.server.control import parts_that_answer
from tunesmith.services import home as service
from tunesmith.services import jobs
from tunesmith.services.monitoring import PartHealth

routes = router()
_JOBS = 5


@routes.get("/")
async def home(viewer: Looking) -> Response:
    """What serves, rollouts in progress and what needs action, for this person's tenant and region."""
    project = viewer.serving.project
    found = await viewer.run(partial(service.home, viewer.store, viewer.user.name, project))
    newest = await viewer.run(partial(jobs.list_jobs, viewer.store, viewer.user, most=_JOBS))
    total = await viewer.run(partial(jobs.count_jobs, viewer.store, viewer.user))
    said = {True: "answers", False: "does not answer"}
    parts = parts_that_answer(viewer.serving)
    health = [*(PartHealth(part=part, ok=ok, says=said[ok]) for part, ok in parts.items()), *found.health]
    return viewer.page("home.html.jinja", found=found, jobs=newest.jobs, job_total=total, health=health)


@routes.get("/console/due")
async def due(viewer: Looking) -> Response:
    """What measurements of traffic and files say is due. They may take seconds, so the page asks for them apart."""
    project = viewer.serving.project
    found = await viewer.run(partial(service.due, project, viewer.user.name)) if project is not None else ()
    return viewer.page("home_waiting.html.jinja", waiting=found)

"""The first page: what serves now and what moves."""

from __future__ import annotations

from functools import partial

from fastapi import Response

from tunesmith.server.console.routing import router
from tunesmith.server.console.session import Looking
from tunesmith.services import jobs, rollouts

routes = router()
_JOBS = 5


@routes.get("/")
async def home(viewer: Looking) -> Response:
    """What serves now and what moves, for this person's tenant and region."""
    moving = await viewer.run(partial(rollouts.visible_to, viewer.store, viewer.user))
    newest = await viewer.run(partial(jobs.list_jobs, viewer.store, most=_JOBS, scope=viewer.user.scope))
    live = [one for one in moving.rollouts if one.live]
    champions = {(one.name, one.tenant, one.region): one.champion for one in moving.rollouts if one.champion}
    return viewer.page("home.html.jinja", live=live, champions=list(champions.values()), jobs=newest.jobs)

"""/api/rollouts: the list, one of them with its traffic and evidence over time, start one and change it."""

from __future__ import annotations

from functools import partial

from fastapi import Request, Response

from tunesmith.server.access import needs
from tunesmith.server.api.routing import Call, Number, call_of, router, shows
from tunesmith.server.errors import missing
from tunesmith.services import rollout_course
from tunesmith.services import rollouts as service
from tunesmith.services.rollouts import RolloutList, RolloutView

routes = router()
_AT = "/rollouts/{number}"


@routes.get("/rollouts", dependencies=[needs("read")], **shows(RolloutList))
async def rollouts(request: Request) -> Response:
    """The rollouts of the caller's tenant and region, newest first."""
    call = call_of(request)
    return await call.answer(partial(service.visible_to, call.store, call.user))


@routes.get(_AT, dependencies=[needs("read")], **shows(RolloutView))
async def rollout(request: Request, number: Number) -> Response:
    """One rollout. Another tenant's rollout is answered like one that does not exist."""
    call = call_of(request)
    return await call.answer(partial(service.one_visible_to, call.store, call.user, number), none="rollout")


@routes.get(_AT + "/course", dependencies=[needs("read")], **shows(rollout_course.RolloutCourse))
async def course(request: Request, number: Number) -> Response:
    """Traffic by version over time, each step's evidence as it grew, and who did what."""
    call = call_of(request)
    await _found(call, number)
    return await call.answer(partial(rollout_course.course, call.store, number))


async def _found(call: Call, number: int) -> RolloutView:
    found = await call.run(partial(service.one_visible_to, call.store, call.user, number, judged=False))
    if found is None:
        raise missing("rollout")
    return found

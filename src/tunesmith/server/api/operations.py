"""/api/jobs, /api/rollouts and /api/held: what runs, how traffic moves, and the answers that wait for a reviewer."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.server.access import needs, token_of
from tunesmith.server.api.routing import Call, Number, call_of, router, shows
from tunesmith.server.errors import bad_request, missing
from tunesmith.services import held, jobs, rollout_course, rollouts

routes = router()
Asked = Annotated[int, Query(ge=0, le=2**31 - 1)]
_JOB, _ROLLOUT = "/jobs/{number}", "/rollouts/{number}"
_MOST = 100
Most = Annotated[int, Query(ge=1)]


@routes.get("/jobs", dependencies=[needs("read", "jobs")], **shows(jobs.JobList))
async def job_list(
    request: Request, before: Asked | None = None, most: Annotated[int, Query(ge=1)] = _MOST
) -> Response:
    """The jobs of the caller's tenant and region, newest first. before: only those with a lower number; most: how many,
    100 by default and at most."""
    call = call_of(request)
    return await call.answer(partial(jobs.list_jobs, call.store, call.user, before=before, most=min(most, _MOST)))


@routes.get(_JOB, dependencies=[needs("read", "jobs")], **shows(jobs.JobView))
async def job(request: Request, number: Number) -> Response:
    """One job: its state, the step that it is at, the time left for this step, its result or its error. Another
    tenant's job is answered like one that does not exist."""
    call = call_of(request)
    return await call.answer(partial(jobs.show, call.store, number, call.user))


@routes.get(_JOB + "/log", dependencies=[needs("read", "jobs")], **shows(jobs.JobLog))
async def log(request: Request, number: Number, after: Asked = 0) -> Response:
    """The lines of a job's log, oldest first. after: only those with a higher number. Tracebacks and paths of the
    server are shown to its engineers, operators and admins, and not to those of one tenant or region."""
    call = call_of(request)
    return await call.answer(partial(jobs.log, call.store, number, call.user, after=after))


@routes.get(_JOB + "/curves", dependencies=[needs("read", "jobs")], **shows(jobs.JobCurves))
async def curves(request: Request, number: Number) -> Response:
    """The losses and scores of a job's trainings, also while it runs, with the time and memory that were predicted."""
    call = call_of(request)
    return await call.answer(partial(jobs.curves, call.store, number, call.user))


@routes.get("/rollouts", dependencies=[needs("read")], **shows(rollouts.RolloutList))
async def rollout_list(request: Request) -> Response:
    """The rollouts of the caller's tenant and region, newest first."""
    call = call_of(request)
    return await call.answer(partial(rollouts.visible_to, call.store, call.user))


@routes.get(_ROLLOUT, dependencies=[needs("read")], **shows(rollouts.RolloutView))
async def rollout(request: Request, number: Number) -> Response:
    """One rollout. Another tenant's rollout is answered like one that does not exist."""
    call = call_of(request)
    return await call.answer(partial(rollouts.one_visible_to, call.store, call.user, number), none="rollout")


@routes.get(_ROLLOUT + "/course", dependencies=[needs("read")], **shows(rollout_course.RolloutCourse))
async def course(request: Request, number: Number) -> Response:
    """Traffic by version over time, each step's evidence as it grew, and who did what."""
    call = call_of(request)
    await _found(call, number)
    return await call.answer(partial(rollout_course.course, call.store, number))


async def _found(call: Call, number: int) -> rollouts.RolloutView:
    found = await call.run(partial(rollouts.one_visible_to, call.store, call.user, number, judged=False))
    if found is None:
        raise missing("rollout")
    return found


@routes.get("/held", dependencies=[needs("chat", "decisions")], **shows(held.HeldList))
async def held_answers(request: Request, everything: str = "false") -> Response:
    """The answers that wait: the caller's own, and those of their tenant and region if they may review and the token
    has the scope decisions. everything:
    `true` lists decided ones too, until they are deleted. Without texts."""
    call = call_of(request)
    if everything not in ("true", "false"):
        raise bad_request("everything is true or false.", param="everything")
    look = partial(held.list_held, call.store, call.user, everything=everything == "true")
    return await call.answer(partial(look, reviews=token_of(request).permits("decisions")))


@routes.get("/held/{identifier}", dependencies=[needs("chat", "decisions")], **shows(held.HeldAnswerView))
async def held_answer(request: Request, identifier: str) -> Response:
    """One answer. `completion` is there once it may leave; reviewers also see the conversation and what waits. An
    answer that the caller may not see is answered like one that does not exist."""
    call = call_of(request)
    reviews = token_of(request).permits("decisions")
    return await call.answer(partial(held.show, call.store, call.user, identifier, reviews=reviews))

"""/api/rollouts: the list, one of them with its traffic and evidence over time, start one and change it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.scope import Scope
from tunesmith.server.access import needs, stated_scope
from tunesmith.server.api.routing import Call, Number, Reason, Short, call_of, changes, router, shows
from tunesmith.server.errors import missing
from tunesmith.services.releases import rollout_course
from tunesmith.services.releases import rollouts as service
from tunesmith.services.releases.rollouts import RolloutList, RolloutView, Seen

routes = router()
_AT = "/rollouts/{number}"


class RolloutRequest(BaseModel):
    """A rollout to start, in the steps of the project file. version: NAME@v3, an alias or the start of a digest.

    tenant, region: by default the caller's. override: an admin's reason to start without an approval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(min_length=1, max_length=200)]
    tenant: Short | None = None
    region: Short | None = None
    override: Reason | None = None


class ResumeRequest(BaseModel):
    """The end of a pause.

    step, champion: what the caller saw, the index of the rollout's step and the digest of what serves its name. Where
    one of them has changed meanwhile, nothing is done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Reason = ""
    step: Annotated[int, Field(strict=True, ge=0, le=10_000)] | None = None
    champion: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")] | None = None

    def seen(self, rollout: int) -> Seen:
        """What the caller saw of a rollout."""
        return Seen(rollout, self.step, self.champion)


class PromoteRequest(ResumeRequest):
    """All traffic for the new version. override: an admin's reason to skip an analysis that has not passed yet.

    step, champion: as for resume.
    """

    override: Reason | None = None


class AbortRequest(ResumeRequest):
    """All traffic back to the version that serves. reason: for the audit log. step, champion: as for resume."""

    reason: Annotated[str, Field(min_length=1, max_length=2000)]


class RollbackRequest(AbortRequest):
    """Back to the version that served before. override: an admin's reason to do so without an approval of that one.

    step, champion: as for resume.
    """

    override: Reason | None = None


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


@routes.post("/rollouts", dependencies=[needs("operate")], **changes(RolloutView, RolloutRequest))
async def start(request: Request) -> Response:
    """Start a rollout of an approved version."""
    call = call_of(request, "rollout.start")
    given = await call.read(RolloutRequest)
    scope = stated_scope(call.user, given.tenant, given.region)
    begin = partial(service.start, call.project, given.version, override=given.override, scope=scope, **call.by)
    return await call.answer(begin, threads=call.serving.files)


@routes.get(_AT + "/course", dependencies=[needs("read")], **shows(rollout_course.RolloutCourse))
async def course(request: Request, number: Number) -> Response:
    """Traffic by version over time, each step's evidence as it grew, and who did what."""
    call = call_of(request)
    await _found(call, number)
    return await call.answer(partial(rollout_course.course, call.store, number))


@routes.post(_AT + "/resume", dependencies=[needs("operate")], **changes(RolloutView, ResumeRequest))
async def resume(request: Request, number: Number) -> Response:
    """End a rollout's pause."""
    call, found = await _changed(request, number)
    given = await call.read(ResumeRequest)
    return await _done(call, partial(service.resume, call.store, found, reason=given.reason, seen=given.seen(number)))


@routes.post(_AT + "/promote", dependencies=[needs("operate")], **changes(RolloutView, PromoteRequest))
async def promote(request: Request, number: Number) -> Response:
    """Give the new version all traffic now."""
    call, found = await _changed(request, number)
    given = await call.read(PromoteRequest)
    act = partial(service.promote, call.store, found, reason=given.reason, override=given.override)
    return await _done(call, partial(act, seen=given.seen(number)))


@routes.post(_AT + "/abort", dependencies=[needs("operate")], **changes(RolloutView, AbortRequest))
async def abort(request: Request, number: Number) -> Response:
    """Give all traffic back and end the rollout."""
    call, found = await _changed(request, number)
    given = await call.read(AbortRequest)
    end = partial(service.abort, call.store, found, reason=given.reason, seen=given.seen(number))
    return await _done(call, end)


@routes.post(_AT + "/rollback", dependencies=[needs("operate")], **changes(RolloutView, RollbackRequest))
async def rollback(request: Request, number: Number) -> Response:
    """Give the traffic of the rollout's name, tenant and region back to the version that served before."""
    call, _ = await _changed(request, number)
    one = await _found(call, number)
    given = await call.read(RollbackRequest)
    scope = Scope(one.tenant, one.region)
    back = partial(service.rollback, call.store, one.name, reason=given.reason, override=given.override, scope=scope)
    return await _done(call, partial(back, seen=given.seen(number)))


async def _changed(request: Request, number: int) -> tuple[Call, str]:
    """The call, and the number of a rollout that the caller may change, as services take it."""
    call = call_of(request, "rollout.change")
    await _found(call, number)
    return call, str(number)


async def _done(call: Call, act: Callable[..., RolloutView]) -> Response:
    return await call.answer(partial(act, **call.by), threads=call.serving.files)


async def _found(call: Call, number: int) -> RolloutView:
    found = await call.run(partial(service.one_visible_to, call.store, call.user, number, judged=False))
    if found is None:
        raise missing("rollout")
    return found

"""Rollouts: the list, and one rollout with its traffic, its evidence, and what a person may do with it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Request, Response

from tunesmith.core.scope import Scope
from tunesmith.server.console.changes import changes_of
from tunesmith.server.console.charts import Chart, Points, chart
from tunesmith.server.console.evidence import lost
from tunesmith.server.console.rendering import moment, private, rendered
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.console.session import Changing, Looking, Viewer, form
from tunesmith.server.console.shared import Shared
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.services import rollout_course as courses
from tunesmith.services import rollouts
from tunesmith.services.rollout_course import Evidence, StartableVersion, StepView, Traffic
from tunesmith.services.rollouts import RolloutView, Seen

routes = router()
_ROOT = "/console/rollouts"
_COURSE_SECONDS = 3.0
ARMS = ("stable", "canary")
_COURSES: WeakKeyDictionary[FastAPI, Shared[str]] = WeakKeyDictionary()


@routes.get(_ROOT)
async def all_rollouts(viewer: Looking, page: int = 1, version: str = "") -> Response:
    """The rollouts of this person's tenant and region, newest first. version: label of one to start with."""
    found = await viewer.run(partial(courses.list_page, viewer.store, viewer.user, page))
    project = viewer.serving.project
    startable, steps = tuple[StartableVersion, ...](), tuple[StepView, ...]()
    if project is not None and viewer.user.may("rollout.start"):
        startable = await viewer.run(partial(courses.startable, project, viewer.user))
        steps = courses.steps_of(project.settings.rollout.steps)
    return viewer.page("rollouts.html.jinja", found=found, startable=startable, steps=steps, chosen=version)


@routes.post(_ROOT)
async def start(request: Request, viewer: Changing) -> Response:
    """Start a rollout of a version."""
    project, said = viewer.serving.project, await form(request)
    if project is None:
        raise ApiError(409, "This server runs without a project file, which states the steps.", code="no_project")
    tenant, region = (_field(said, key) or own for key, own in viewer.user.scope.fields().items())
    begin = partial(
        rollouts.start,
        project,
        _field(said, "version"),
        actor=viewer.user.name,
        override=_field(said, "override") or None,
        scope=Scope(tenant, region),
    )
    started = await viewer.run(begin)
    return gone_to(request, f"{_ROOT}/{started.rollout}")


@routes.get(_ROOT + "/{number}")
async def one_rollout(viewer: Looking, number: int) -> Response:
    """One rollout: where it stands, its steps, what may be done, and who did what."""
    found = await _find(viewer, number)
    progress = await viewer.run(partial(courses.progress, viewer.store, number))
    before = found.stable.digest if found.stable else ""
    losses = await lost(viewer, found.canary.digest, before) if found.canary else None
    return viewer.page("rollout.html.jinja", one=found, progress=progress, losses=losses)


@routes.get(_ROOT + "/{number}/course")
async def course(request: Request, viewer: Looking, number: int) -> Response:
    """The part of a rollout's page that changes with traffic: made once for everybody who looks at it."""
    await _find(viewer, number)

    async def made() -> str:
        found = await viewer.run(partial(courses.course, viewer.store, number))
        shown = [(each, evidence_charts(each)) for each in reversed(found.evidence)]
        charts = traffic_charts(found.traffic)
        return rendered("rollout_course.html.jinja", {"traffic": found.traffic, "charts": charts, "evidence": shown})

    seen = tuple(changes_of(request, viewer).numbers)
    shared = _COURSES.setdefault(request.app, Shared(_COURSE_SECONDS))
    return private(await shared.get((number, seen), made))


@routes.post(_ROOT + "/{number}/{action}")
async def change(request: Request, viewer: Changing, number: int, action: str) -> Response:
    """Resume, promote, abort or roll back."""
    found, said = await _find(viewer, number), await form(request)
    reason, override = _field(said, "reason"), _field(said, "override") or None
    step = _field(said, "step")
    if step and not (step.isascii() and step.isdecimal() and len(step) < 9):
        raise bad_request("The form cannot be read.", code="invalid_form")
    seen = Seen(number, int(step) if step else None, said["champion"][0] if "champion" in said else None)
    scope = Scope(found.tenant, found.region)
    one: dict[str, Any] = {"actor": viewer.user.name, "reason": reason, "seen": seen}
    calls: dict[str, Callable[[], RolloutView]] = {
        "resume": partial(rollouts.resume, viewer.store, str(number), **one),
        "promote": partial(rollouts.promote, viewer.store, str(number), override=override, **one),
        "abort": partial(rollouts.abort, viewer.store, str(number), **one),
        "rollback": partial(rollouts.rollback, viewer.store, found.name, override=override, scope=scope, **one),
    }
    if action not in calls:
        raise ApiError(404, "There is no such page.", code="not_found")
    if action in ("abort", "rollback") and not reason:
        raise bad_request("Say why: the audit log keeps the reason.", code="no_reason")
    await viewer.run(calls[action])
    return gone_to(request, f"{_ROOT}/{number}")


def traffic_charts(found: Traffic) -> list[Chart]:
    """Requests, failures and scores of both arms over time; [] without requests."""
    if not found.spans:
        return []
    times = [datetime.fromisoformat(span.at).timestamp() for span in found.spans]
    ends = moment(times[0]), moment(times[-1])
    per = "minute" if found.minutes == 1 else f"{found.minutes} minutes"

    def lines(field: str) -> list[tuple[str, Points]]:
        spans = list(zip(times, found.spans, strict=True))
        return [(arm, [(at, getattr(getattr(span, arm), field)) for at, span in spans]) for arm in ARMS]

    scored = any(y is not None for _, points in lines("score") for _, y in points)
    shown = [
        chart(
            title, lines(field), ends=ends, high=max(1.0, *(y or 0.0 for _, points in lines(field) for _, y in points))
        )
        for title, field in ((f"Requests a {per}", "requests"), (f"Failed requests a {per}", "failed"))
    ]
    return [*shown, chart(f"Mean {found.metric}", lines("score"), high=1.0, ends=ends)] if scored else shown


def evidence_charts(found: Evidence) -> list[Chart]:
    """The e-values against the one that decides, and both means, as the step's requests came; [] without requests."""
    points = found.points
    if not points:
        return []
    ends = f"request {points[0].requests}", f"request {points[-1].requests}"
    high = max(10 * found.needed, *(2 * max(point.not_worse, point.worse) for point in points))
    evidence = chart(
        "Evidence (e-values, logarithmic)",
        [
            ("not worse", [(point.requests, point.not_worse) for point in points]),
            ("worse", [(point.requests, point.worse) for point in points]),
        ],
        low=1 / high,
        high=high,
        bounds=[(f"{found.needed:.3g} decides", found.needed)],
        log=True,
        ends=ends,
    )
    means: list[tuple[str, Points]] = [
        (arm, [(point.requests, getattr(point, arm)) for point in points]) for arm in ARMS
    ]
    return [evidence, chart(f"Mean {found.metric} so far", means, high=1.0, ends=ends)]


async def _find(viewer: Viewer, number: int) -> RolloutView:
    """A rollout of this person's scope. Raises ApiError 404 for any other number."""
    found = None
    if 0 < number < 1 << 62:
        find = partial(rollouts.one_visible_to, viewer.store, viewer.user, number, judged=False)
        found = await viewer.run(find)
    if found is None:
        raise ApiError(404, f"There is no rollout {number}.", code="rollout_not_found")
    return found


def _field(said: dict[str, list[str]], name: str) -> str:
    return said.get(name, [""])[0].strip()

"""Rollouts: the list, and one rollout with its traffic, its evidence, and what a person may do with it."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Request, Response

from tunesmith.server.console.changes import changes_of
from tunesmith.server.console.evidence import lost
from tunesmith.server.console.parts.charts import BAD, CANARY, GOOD, STABLE, Chart, Line, chart
from tunesmith.server.console.parts.shared import Shared
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.rendering import private, rendered
from tunesmith.server.console.routing import router
from tunesmith.server.errors import ApiError
from tunesmith.services import rollout_course as courses
from tunesmith.services import rollouts
from tunesmith.services.rollout_course import Evidence, StartableVersion, StepView, Traffic
from tunesmith.services.rollouts import RolloutView

routes = router()
_ROOT = "/console/rollouts"
_COURSE_SECONDS = 3.0
_COURSES: WeakKeyDictionary[FastAPI, Shared[str]] = WeakKeyDictionary()
_LEAST = 1e-6  # that a logarithmic axis shows
ARMS = (("stable", STABLE), ("canary", CANARY))


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
        shares = {"traffic": found.traffic, "charts": charts, "evidence": shown, "number": number}
        return rendered("rollout_course.html.jinja", shares)

    seen = tuple(changes_of(request, viewer).numbers)
    shared = _COURSES.setdefault(request.app, Shared(_COURSE_SECONDS))
    return private(await shared.get((number, seen), made))


def traffic_charts(found: Traffic) -> list[Chart]:
    """Requests, failures and scores of both arms over time; [] without requests."""
    if not found.spans:
        return []
    times = [datetime.fromisoformat(span.at).timestamp() for span in found.spans]
    per = "minute" if found.minutes == 1 else f"{found.minutes} minutes"

    def lines(what: str) -> list[Line]:
        spans = list(zip(times, found.spans, strict=True))
        return [
            Line(arm, {at: getattr(getattr(span, arm), what) for at, span in spans}, colour, dashed=arm == "stable")
            for arm, colour in ARMS
        ]

    shown = [
        chart(f"{title} per {per}", lines(what), x="time", y=title.lower(), scale="count")
        for title, what in (("Requests", "requests"), ("Failed requests", "failed"))
    ]
    score = lines("score")
    scored = any(y is not None for line in score for y in line.points.values())
    return [*shown, chart(f"Mean {found.metric}", score, x="time", y=found.metric, scale="share")] if scored else shown


def evidence_charts(found: Evidence) -> list[Chart]:
    """The e-values against the one that decides, and both means, as the step's requests came; [] without requests."""
    points = found.points
    if not points:
        return []
    evidence = [
        Line("not worse", {point.requests: max(point.not_worse, _LEAST) for point in points}, GOOD),
        Line("worse", {point.requests: max(point.worse, _LEAST) for point in points}, BAD, dashed=True),
        Line(f"{found.needed:.3g} decides", {point.requests: found.needed for point in points}, 0, dashed=True),
    ]
    means = [
        Line(arm, {point.requests: getattr(point, arm) for point in points}, colour, dashed=arm == "stable")
        for arm, colour in ARMS
    ]
    return [
        chart("Evidence (e-values, logarithmic)", evidence, x="request", y="e-value", scale="log"),
        chart(f"Mean {found.metric} so far", means, x="request", y=found.metric, scale="share"),
    ]


async def _find(viewer: Viewer, number: int) -> RolloutView:
    """A rollout of this person's scope. Raises ApiError 404 for any other number."""
    found = None
    if 0 < number < 1 << 62:
        find = partial(rollouts.one_visible_to, viewer.store, viewer.user, number, judged=False)
        found = await viewer.run(find)
    if found is None:
        raise ApiError(404, f"There is no rollout {number}.", code="rollout_not_found")
    return found

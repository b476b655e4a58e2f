"""Versions with their lineage, records and decisions; rollouts with their traffic, evidence and what people may do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tunesmith.server.api.records import MEDIA, REPORT_POLICY
from tunesmith.server.api.routing import Digest, Name, Number, Page
from tunesmith.server.console.changes import changes_of
from tunesmith.server.console.evidence import lost
from tunesmith.server.console.rendering import BAD, CANARY, GOOD, PRIVATE, STABLE, Chart, Line, chart, private, rendered
from tunesmith.server.console.routing import Looking, Pages
from tunesmith.services import lineage, rollouts, versions

if TYPE_CHECKING:
    from tunesmith.rollout.course import Evidence, Traffic

routes = Pages()
Text = Annotated[str, Query(max_length=200)]
Value = TypeVar("Value")
_VERSION, _ROLLOUTS = "/console/versions/{name}/{number}", "/console/rollouts"
_COURSE_SECONDS = 3.0
_LEAST = 1e-6  # that a logarithmic axis shows
ARMS = (("stable", STABLE), ("canary", CANARY))
_COURSES: WeakKeyDictionary[FastAPI, Shared[str]] = WeakKeyDictionary()


@routes.shows("/console/versions")
def version_list(viewer: Looking, q: Text = "", state: Text = "", page: Page = 1) -> Response:
    """The versions that the person may see, the newest first."""
    listed = versions.page_of_versions(viewer, text=q, state=state, page=page)
    return viewer.page("versions.html.jinja", listed=listed, q=q, state=state, states=versions.STATES)


@routes.shows(_VERSION)
def one_version(viewer: Looking, request: Request, name: Name, number: Number) -> Response:
    """One version."""
    version = versions.find_version(viewer, name, number)
    return viewer.page(
        "version.html.jinja",
        details=versions.details(viewer, version),
        lineage=lineage.lineage(viewer.store, version),
        server=f"{request.url.scheme}://{request.url.netloc}",
        options=version.scope.options(),
        losses=lost(viewer, version.digest),
        at=viewer.path,
    )


@routes.shows(_VERSION + "/records/{digest}")
def record(
    viewer: Looking, name: Name, number: Number, digest: Digest, split: Text = "train", q: Text = "", page: Page = 1
) -> Response:
    """A record of a version's lineage; of a dataset also its rows with their licences."""
    version, rows = versions.find_version(viewer, name, number), None
    details = lineage.record_details(viewer, version, digest)
    if details.kind == "dataset":
        rows = lineage.dataset_rows(viewer, version, digest, split=split, text=q, page=page)
    at = viewer.path.rpartition("/records/")[0]
    return viewer.page("record.html.jinja", details=details, rows=rows, version=version, at=at, split=split, q=q)


@routes.shows(_VERSION + "/{document}")
def document(viewer: Looking, name: Name, number: Number, document: versions.Document) -> Response:
    """The evaluation report as a page of its own; or a file: the report, a paper, or what is said of the rows."""
    version = versions.find_version(viewer, name, number)
    text = versions.document_of(viewer, version, document)
    if document == "report.html":
        return HTMLResponse(text, headers={**PRIVATE, "Content-Security-Policy": REPORT_POLICY})
    headers = {**PRIVATE, "Content-Disposition": f'attachment; filename="{name}-v{number}-{document}"'}
    return PlainTextResponse(text, headers=headers, media_type=MEDIA.get(document, "text/markdown"))


@dataclass(eq=False)
class Shared(Generic[Value]):
    """Values by key, each made once for all who ask within some seconds. Used from one event loop."""

    seconds: float
    _kept: dict[Hashable, tuple[float, asyncio.Future[Value]]] = field(default_factory=dict)

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value of a key. Who asks while it is being made waits for it. What make raises is raised and not kept."""
        self._kept = {each: kept for each, kept in self._kept.items() if self._holds(*kept)}
        if key not in self._kept:
            self._kept[key] = time.monotonic(), asyncio.ensure_future(make())
        return await asyncio.shield(self._kept[key][1])

    def _holds(self, at: float, made: asyncio.Future[Value]) -> bool:
        if not made.done():
            return True
        return not made.cancelled() and made.exception() is None and time.monotonic() - at < self.seconds


@routes.shows(_ROLLOUTS)
def rollout_list(viewer: Looking, page: int = 1, version: str = "") -> Response:
    """The rollouts of this person's tenant and region, newest first. version: label of one to start with."""
    listed = rollouts.list_page(viewer, page)
    may = viewer.serving.project is not None and viewer.user.may("rollout.start")
    startable = rollouts.startable(viewer) if may else None
    return viewer.page("rollouts.html.jinja", listed=listed, startable=startable, chosen=version)


@routes.shows(_ROLLOUTS + "/{number}")
def one_rollout(viewer: Looking, number: int) -> Response:
    """One rollout: where it stands, its steps, what may be done, and who did what."""
    one = rollouts.one_visible_to(viewer, number, judged=False)
    before = one.stable.digest if one.stable else ""
    losses = lost(viewer, one.canary.digest, before) if one.canary else None
    progress = rollouts.progress(viewer, number)
    return viewer.page("rollout.html.jinja", one=one, progress=progress, losses=losses)


@routes.get(_ROLLOUTS + "/{number}/course")
async def course(request: Request, viewer: Looking, number: int) -> Response:
    """The part of a rollout's page that changes with traffic: made once for everybody who looks at it."""

    def made() -> str:
        rollout = rollouts.course(viewer, number)
        shown = [(each, evidence_charts(each)) for each in reversed(rollout.evidence)]
        charts = traffic_charts(rollout.traffic)
        shares = {"traffic": rollout.traffic, "charts": charts, "evidence": shown, "number": number}
        return rendered("rollout_course.html.jinja", shares)

    await viewer.run(partial(rollouts.one_visible_to, viewer, number, judged=False))
    seen = tuple(changes_of(request, viewer).numbers)
    shared = _COURSES.setdefault(request.app, Shared(_COURSE_SECONDS))
    return private(await shared.get((number, seen), partial(viewer.run, made)))


def traffic_charts(traffic: Traffic) -> list[Chart]:
    """Requests, failures and scores of both arms over time; [] without requests."""
    if not traffic.spans:
        return []
    times = [datetime.fromisoformat(span.at).timestamp() for span in traffic.spans]
    per = "minute" if traffic.minutes == 1 else f"{traffic.minutes} minutes"

    def lines(what: str) -> list[Line]:
        spans = list(zip(times, traffic.spans, strict=True))
        return [
            Line(arm, {at: getattr(getattr(span, arm), what) for at, span in spans}, colour, dashed=arm == "stable")
            for arm, colour in ARMS
        ]

    shown = [
        chart(f"{title} per {per}", lines(what), x="time", y=title.lower(), scale="count")
        for title, what in (("Requests", "requests"), ("Failed requests", "failed"))
    ]
    score = lines("score")
    if any(y is not None for line in score for y in line.points.values()):
        shown.append(chart(f"Mean {traffic.metric}", score, x="time", y=traffic.metric, scale="share"))
    return shown


def evidence_charts(step: Evidence) -> list[Chart]:
    """The e-values against the one that decides, and both means, as the step's requests came; [] without requests."""
    points = step.points
    if not points:
        return []
    evidence = [
        Line("not worse", {point.requests: max(point.not_worse, _LEAST) for point in points}, GOOD),
        Line("worse", {point.requests: max(point.worse, _LEAST) for point in points}, BAD, dashed=True),
        Line(f"{step.needed:.3g} decides", {point.requests: step.needed for point in points}, 0, dashed=True),
    ]
    means = [
        Line(arm, {point.requests: getattr(point, arm) for point in points}, colour, dashed=arm == "stable")
        for arm, colour in ARMS
    ]
    return [
        chart("Evidence (e-values, logarithmic)", evidence, x="request", y="e-value", scale="log"),
        chart(f"Mean {step.metric} so far", means, x="request", y=step.metric, scale="share"),
    ]

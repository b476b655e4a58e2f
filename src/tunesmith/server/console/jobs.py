"""Pages on jobs: the list, one job with its curves and log, and the form that starts a run."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlencode

from fastapi import Path, Query, Response

from tunesmith.core.errors import Forbidden
from tunesmith.server.api.routing import Page
from tunesmith.server.console.rendering import Chart, Line, chart, pages
from tunesmith.server.console.routing import Looking, Pages, Viewer
from tunesmith.server.errors import capital
from tunesmith.services import jobs, training
from tunesmith.services.jobs import CurvePoint, JobCurves, TrainingCurve
from tunesmith.services.training import Setting

routes = Pages()
_PAGE = 50  # jobs on a page
_LINES = 100  # of a log on a page
Number = Annotated[int, Path(ge=1, le=999_999_999)]
LineNumber = Annotated[int, Query(ge=1, le=999_999_999)]


@routes.shows("/console/jobs")
def listed(viewer: Looking, state: str = "", kind: str = "", by: str = "", page: Page = 1) -> Response:
    """The jobs of this person's tenant and region, newest first."""
    filters = {"state": state, "kind": kind, "by": by}
    given = {name: value for name, value in filters.items() if value}
    states, kinds, first = {state} - {""}, {kind} - {""}, (page - 1) * _PAGE
    listed = jobs.list_jobs(viewer, states=states, kinds=kinds, by=by or None, first=first, most=_PAGE)
    return viewer.page(
        "jobs.html.jinja",
        jobs=listed.jobs,
        total=listed.total,
        page=page,
        last=pages(listed.total, _PAGE),
        filters=filters,
        given=given,
        here="/console/jobs?" + (urlencode(given) + "&" if given else ""),
        states=jobs.STATES,
        kinds=jobs.KINDS,
        reason=no_start(viewer),
    )


@routes.shows("/console/jobs/start")
def start(viewer: Looking) -> Response:
    """The form that starts a run, with the project file's settings."""
    project = viewer.serving.project
    if (reason := no_start(viewer)) or project is None:
        return viewer.page("jobs_start.html.jinja", reason=reason)
    project.unchanged()
    return viewer.page(
        "jobs_start.html.jinja",
        reason="",
        candidates=training.changeable(project),
        shown=_shown,
        key=secrets.token_hex(16),  # the same form sent twice starts one run
    )


@routes.shows("/console/jobs/{number}")
def run(viewer: Looking, number: Number, lines: LineNumber | None = None) -> Response:
    """One job. lines: the log's lines before this one instead of the newest."""
    job, curves = jobs.show(viewer, number), jobs.curves(viewer, number)
    return viewer.page(
        "jobs_one.html.jinja",
        job=job,
        ended=job.ended is not None,
        curves=curves,
        charts=charts(curves),
        log=jobs.newest_lines(viewer, number, before=lines, most=_LINES).lines,
        may=viewer.user.may("job.change"),
        paged=lines is not None,
        numbers=numbers,
    )


def no_start(viewer: Viewer) -> str:
    """Why this person may start no run; "" where they may."""
    try:
        jobs.add.check(viewer.user)
    except Forbidden as error:
        return f"{capital(error.what)}."
    return "" if viewer.serving.project else "This server has no project."


def _shown(setting: Setting) -> str:
    """A setting's value as the form shows it, "" where a default applies."""
    if setting.value is None:
        return ""
    return f"{setting.value:g}s" if setting.key == "budget" else str(setting.value)


def charts(curves: JobCurves) -> list[Chart]:
    """A chart of the losses and, where answers were scored, one of the scores, for each training."""
    drawn = []
    for each in curves.trainings:
        metric = each.metric or "score"
        losses = (_line("training loss", each, "loss", 1), _line("validation loss", each, "validation_loss", 2))
        scores = _line(metric, each, "score", 1)
        if filled := [line for line in losses if line.points]:
            drawn.append(chart(f"{each.name}: loss", filled, x="step", y="loss"))
        if scores.points:
            title = f"{each.name}: {metric} on validation rows"
            ends = dict.fromkeys((0.0, float(each.points[-1].step)), each.rival_score)
            beside = [Line(f"{each.rival}, untuned", ends, 2, dashed=True)] if each.rival else []
            drawn.append(chart(title, [scores, *beside], x="step", y=metric, scale="share"))
    return drawn


def _line(label: str, training: TrainingCurve, field: str, colour: int) -> Line:
    points = {float(point.step): y for point in training.points if (y := getattr(point, field)) is not None}
    return Line(label, points, colour, dashed=colour > 1)


def numbers(points: Sequence[CurvePoint], most: int = 30) -> list[CurvePoint]:
    """The points that a table shows: the validated ones, and some of all."""
    some = {point.step for point in (*points[:: max(1, len(points) // most)], *points[-1:])}
    shown = {point.step: point for point in points if point.validation_loss is not None or point.step in some}
    return [shown[step] for step in sorted(shown)]

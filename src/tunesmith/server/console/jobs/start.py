"""The form that starts a run, or a forecast of one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response

from tunesmith.project import Project
from tunesmith.server.console.jobs.pages import no_start
from tunesmith.server.console.people.session import Changing, Looking, Viewer, field, form
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import bad_request, forbidden
from tunesmith.services import jobs, run_settings
from tunesmith.services.forecast import newest_forecast
from tunesmith.services.run_settings import Setting

routes = router()
Form = Mapping[str, Sequence[str]]


@routes.get("/console/jobs/start")
async def start(viewer: Looking) -> Response:
    """The form, with the project file's settings, and the newest forecast."""

    def read() -> dict[str, Any]:
        if reason := no_start(viewer):
            return {"reason": reason, "candidates": (), "forecast": None}
        project = _project(viewer)
        return {"reason": "", "candidates": run_settings.changeable(project), "forecast": newest_forecast(project)}

    key = secrets.token_hex(16)  # the same form sent twice starts one run
    return viewer.page("jobs_start.html.jinja", **await viewer.run(read), shown=_shown, key=key)


@routes.post("/console/jobs/start")
async def begin(request: Request, viewer: Changing) -> Response:
    """Queue a run."""
    given = await form(request)
    job = await viewer.run(partial(_queued, viewer, given))
    return gone_to(request, f"/console/jobs/{job}")


@routes.post("/console/jobs/forecast")
async def forecast(request: Request, viewer: Changing) -> Response:
    """Queue a forecast of a candidate's training with the form's settings."""
    given = await form(request)

    def queued() -> int:
        project = _may_start(viewer)
        name = field(given, "candidate") or None
        changes = _changes(project, given)
        return jobs.queue_forecast(
            project, name, changes=changes, priority=_priority(given), actor=viewer.user.name
        ).job

    return gone_to(request, f"/console/jobs/{await viewer.run(queued)}")


def _queued(viewer: Viewer, given: Form) -> int:
    project = _may_start(viewer)
    return jobs.queue_run(
        project,
        changes=_changes(project, given),
        priority=_priority(given),
        key=field(given, "key") or None,
        actor=viewer.user.name,
    ).job


def _may_start(viewer: Viewer) -> Project:
    """The project. Raises ApiError 403 where this person may start no run."""
    if reason := no_start(viewer):
        raise forbidden(reason)
    return _project(viewer)


def _project(viewer: Viewer) -> Project:
    """The project as its file says now, which is what a worker will read."""
    assert viewer.serving.project is not None
    return run_settings.read_again(viewer.serving.project)


def _changes(project: Project, given: Form) -> dict[str, dict[str, Any]]:
    """What the form changes: fields whose text is not the one that they had."""
    found: dict[str, dict[str, Any]] = {}
    for candidate in run_settings.changeable(project):
        for setting in candidate.settings:
            text = field(given, f"{candidate.name}.{setting.key}")
            if text and text != _shown(setting):
                found.setdefault(candidate.name, {})[setting.key] = run_settings.value_of(text)
    return found


def _priority(given: Form) -> int:
    text = field(given, "priority") or "0"
    try:
        return int(text)
    except ValueError as error:
        raise bad_request("The priority is a whole number.", param="priority") from error


def _shown(setting: Setting) -> str:
    """A setting's value as the form shows it, "" where a default applies."""
    if setting.value is None:
        return ""
    return f"{setting.value:g}s" if setting.key == "budget" else str(setting.value)

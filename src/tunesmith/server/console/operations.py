"""The first page, and operations: drift, recalls, webhooks, audit log, held answers, people, keys and tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.server.api.routing import Page, Text
from tunesmith.server.console.rendering import pages
from tunesmith.server.console.routing import Looking, Pages, gone_to
from tunesmith.server.control import parts_that_answer
from tunesmith.server.errors import ApiError
from tunesmith.services import audit, erasure, jobs, monitoring, review
from tunesmith.services import home as service
from tunesmith.services.monitoring import PartHealth
from tunesmith.services.users import is_admin, list_keys, list_tokens, list_users, proposed_keys
from tunesmith.store.people.roles import ROLES

routes = Pages()
_ROOT = "/console/operations"
_ENTRIES, _JOBS = 50, 5
Search = Annotated[str, Query(max_length=200)]


@routes.shows("/")
def home(viewer: Looking) -> Response:
    """What serves, rollouts in progress and what needs action, for this person's tenant and region."""
    overview = service.home(viewer, viewer.serving.project)
    newest = jobs.list_jobs(viewer, most=_JOBS)
    parts = parts_that_answer(viewer.serving).items()
    health = [PartHealth(part=part, ok=ok, says="answers" if ok else "does not answer") for part, ok in parts]
    health += overview.health
    return viewer.page("home.html.jinja", home=overview, jobs=newest.jobs, job_total=newest.total, health=health)


@routes.shows("/console/due")
def due(viewer: Looking) -> Response:
    """What measurements of traffic and files say is due. They may take seconds, so the page asks for them apart."""
    waiting = () if viewer.serving.project is None else service.due(viewer)
    return viewer.page("home_waiting.html.jinja", waiting=waiting)


@routes.shows(_ROOT)
def overview(viewer: Looking, request: Request) -> Response:
    """Recalls, retraining and webhooks at once; drift by a part of its own, since it takes long."""
    if not viewer.user.scope.unlimited:
        return gone_to(request, f"{_ROOT}/people")
    project = viewer.serving.project
    return viewer.page(
        "operations.html.jinja",
        recalls=monitoring.list_recalls(viewer.store).recalls,
        erasures=erasure.list_erasures(viewer.store).erasures,
        pending=monitoring.list_pending_retrains(viewer.store).pending_retrains,
        hooks=monitoring.list_webhooks(project) if project else None,
    )


@routes.shows(_ROOT + "/drift")
def drift(viewer: Looking) -> Response:
    """Whether requests drifted, and what retraining is due for."""
    viewer.require_everything()
    project = viewer.serving.project
    if project is None:
        raise ApiError(409, "This server runs without a project file, which says what drift is.")
    measured = monitoring.drift(viewer)
    due = None if project.settings.retraining is None else monitoring.look(project)
    return viewer.page("operations_drift.html.jinja", drift=measured, due=due)


@routes.shows(_ROOT + "/recall")
def recall_status(viewer: Looking, cause: Text) -> Response:
    """Whether something that was recalled is gone."""
    viewer.require_everything()
    kind, _, value = cause.partition(" ")
    status = monitoring.recall_status_of(viewer.store, kind, value)
    return viewer.page("operations_recall.html.jinja", status=status)


@routes.shows(_ROOT + "/impact")
def impact(viewer: Looking, base: Text) -> Response:
    """What depends on a base."""
    viewer.require_everything()
    return viewer.page("operations_impact.html.jinja", impact=monitoring.impact(viewer.store, base.strip()))


@routes.shows(_ROOT + "/audit")
def audit_log(viewer: Looking, search: Search = "", page: Page = 1) -> Response:
    """Who did what, the newest first."""
    viewer.require_everything()
    search, skip = search.strip(), (page - 1) * _ENTRIES
    log = audit.show_audit(viewer.store, containing=search, skip=skip, limit=_ENTRIES)
    last = pages(log.total, _ENTRIES)
    entries = log.entries[::-1]
    return viewer.page("audit.html.jinja", entries=entries, total=log.total, search=search, page=page, last=last)


@routes.shows(_ROOT + "/people")
def people(viewer: Looking) -> Response:
    """An admin sees everybody with their keys and tokens; others see themselves."""
    return viewer.page(
        "people.html.jinja",
        people=list_users(viewer).users,
        keys=list_keys(viewer).keys,
        tokens=list_tokens(viewer).tokens,
        roles=ROLES,
        admin=is_admin(viewer.user),
    )


@routes.shows("/console/keys")
def own_keys(viewer: Looking) -> Response:
    """The person's keys, and for admins those of others that wait."""
    waiting = proposed_keys(viewer)
    own = [key for key in waiting if key.user == viewer.actor]
    others = [key for key in waiting if key.user != viewer.actor] if is_admin(viewer.user) else None
    return viewer.page("keys.html.jinja", own=own, others=others)


@routes.shows(_ROOT + "/held")
def answers(viewer: Looking) -> Response:
    """Answers that wait for a reviewer, by deadline, and those that were decided, until they are deleted."""
    viewer.user.require("answer.review")  # others read theirs by /api/held
    held = review.list_held(viewer, everything=True).held
    return viewer.page("operations_held.html.jinja", held=held, most=review.LISTED)


@routes.shows(_ROOT + "/held/{identifier}")
def answer(viewer: Looking, identifier: str) -> Response:
    """One answer, with the conversation that it ends."""
    viewer.user.require("answer.review")
    return viewer.page("operations_held_one.html.jinja", one=review.show_held(viewer, identifier))

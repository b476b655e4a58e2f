"""Operations: drift, recalls, webhooks, the audit log, held answers, and people with their keys and tokens."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.core.scope import Scope
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import ApiError
from tunesmith.services import audit, held, monitoring, retraining, webhooks
from tunesmith.services.keys import visible_keys, waiting
from tunesmith.services.users import is_admin, visible_tokens, visible_users
from tunesmith.store.people.roles import ROLES

routes = router()
_ROOT = "/console/operations"
_ENTRIES = 50


@routes.get(_ROOT)
async def overview(request: Request, viewer: Looking) -> Response:
    """Recalls, retraining and webhooks at once; drift by a part of its own, since it takes long."""
    if viewer.user.scope != Scope():
        return gone_to(request, f"{_ROOT}/people")
    project, store = viewer.serving.project, viewer.store
    recalls = await viewer.run(partial(monitoring.list_recalls, store))
    pending = await viewer.run(partial(monitoring.list_pending_retrains, store))
    hooks = await viewer.run(partial(webhooks.list_webhooks, project)) if project else None
    return viewer.page("operations.html.jinja", recalls=recalls.recalls, pending=pending.pending_retrains, hooks=hooks)


@routes.get(_ROOT + "/drift")
async def drift(viewer: Looking) -> Response:
    """Whether requests drifted, and what retraining is due for."""
    _whole(viewer)
    project = viewer.serving.project
    if project is None:
        raise ApiError(409, "This server runs without a project file, which says what drift is.", code="no_project")
    found = await viewer.run(partial(monitoring.drift, project, texts=viewer.user.may("row.review")))
    due = None
    if project.settings.retraining is not None:
        due = await viewer.run(partial(retraining.look, project))
    return viewer.page("operations_drift.html.jinja", found=found, due=due)


@routes.get(_ROOT + "/recall")
async def recall_status(viewer: Looking, cause: Annotated[str, Query(max_length=300)]) -> Response:
    """Whether something that was recalled is gone."""
    _whole(viewer)
    kind, _, value = cause.partition(" ")
    named = await viewer.run(partial(monitoring.cause_of, viewer.store, kind, value))
    found = await viewer.run(partial(monitoring.recall_status_of, viewer.store, named))
    return viewer.page("operations_recall.html.jinja", found=found)


@routes.get(_ROOT + "/impact")
async def impact(viewer: Looking, base: Annotated[str, Query(max_length=300)]) -> Response:
    """What depends on a base."""
    _whole(viewer)
    found = await viewer.run(partial(monitoring.impact, viewer.store, base.strip()))
    return viewer.page("operations_impact.html.jinja", found=found)


@routes.get(_ROOT + "/audit")
async def audit_log(
    viewer: Looking,
    search: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
) -> Response:
    """Who did what, the newest first."""
    _whole(viewer)
    skip = (page - 1) * _ENTRIES
    look = partial(audit.show_audit, viewer.store, containing=search.strip(), skip=skip, limit=_ENTRIES)
    found = await viewer.run(look)
    return viewer.page(
        "audit.html.jinja",
        entries=found.entries[::-1],
        total=found.total,
        search=search.strip(),
        page=page,
        last=max(1, -(-found.total // _ENTRIES)),
    )


@routes.get(_ROOT + "/people")
async def people(viewer: Looking) -> Response:
    """An admin sees everybody with their keys and tokens; others see themselves."""
    store, admin = viewer.store, is_admin(viewer.user)
    known = (await viewer.run(partial(visible_users, store, viewer.user))).users
    keys = (await viewer.run(partial(visible_keys, store, viewer.user))).keys
    tokens = (await viewer.run(partial(visible_tokens, store, viewer.user))).tokens
    return viewer.page(
        "people.html.jinja",
        people=known,
        keys=keys,
        tokens=tokens,
        roles=ROLES,
        admin=admin,
    )


@routes.get("/console/keys")
async def own_keys(viewer: Looking) -> Response:
    """The person's keys, and for admins those of others that wait."""
    found = await viewer.run(partial(waiting, viewer.store))
    own = [key for key in found if key.user == viewer.user.name]
    others = [key for key in found if key.user != viewer.user.name] if is_admin(viewer.user) else None
    return viewer.page("keys.html.jinja", own=own, others=others)


@routes.get(_ROOT + "/held")
async def answers(viewer: Looking) -> Response:
    """Answers that wait for a reviewer, by deadline, and those that were decided, until they are deleted."""
    _reviewer(viewer)
    found = await viewer.run(partial(held.list_held, viewer.store, viewer.user, everything=True))
    return viewer.page("operations_held.html.jinja", held=found.held, most=held.LISTED)


@routes.get(_ROOT + "/held/{identifier}")
async def answer(viewer: Looking, identifier: str) -> Response:
    """One answer, with the conversation that it ends."""
    _reviewer(viewer)
    found = await viewer.run(partial(held.show, viewer.store, viewer.user, identifier))
    return viewer.page("operations_held_one.html.jinja", one=found)


def _reviewer(viewer: Viewer) -> None:
    """Raise ApiError 403 for who may not review answers."""
    if not viewer.user.may("answer.review"):
        raise ApiError(403, "Held answers are for approvers and stewards.", code="permission_denied")


def _whole(viewer: Viewer) -> None:
    """Raise ApiError 404 for a user of one tenant or region: these pages are about all of them."""
    if viewer.user.scope != Scope():
        raise ApiError(404, "This page is for users of all tenants and regions.", code="not_found")

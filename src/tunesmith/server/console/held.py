"""Held answers: what waits for a reviewer, with the conversation."""

from __future__ import annotations

from functools import partial

from fastapi import Response

from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.routing import router
from tunesmith.server.errors import ApiError
from tunesmith.services import held

routes = router()
_ROOT = "/console/operations/held"


@routes.get(_ROOT)
async def answers(viewer: Looking) -> Response:
    """What waits for a reviewer, by deadline, and what was decided, until it is deleted."""
    _check(viewer)
    found = await viewer.run(partial(held.list_held, viewer.store, viewer.user, everything=True))
    return viewer.page("operations_held.html.jinja", held=found.held, most=held.LISTED)


@routes.get(_ROOT + "/{identifier}")
async def answer(viewer: Looking, identifier: str) -> Response:
    """One answer, with the conversation that it ends."""
    _check(viewer)
    found = await viewer.run(partial(held.show, viewer.store, viewer.user, identifier))
    return viewer.page("operations_held_one.html.jinja", one=found)


def _check(viewer: Viewer) -> None:
    if not viewer.user.may("answer.review"):
        raise ApiError(403, "Held answers are for approvers and stewards.", code="permission_denied")

"""Held answers: what waits for a reviewer, with the conversation, and the reviewer's decision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from fastapi import Request, Response

from tunesmith.holding.queue import Decision, UnknownAnswer
from tunesmith.server.console.people.session import Changing, Looking, Viewer, field, form
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.services.traffic import held

routes = router()
_ROOT = "/console/operations/held"
_DECISIONS: dict[str, Decision] = {"release": "release", "replace": "replace", "refuse": "refuse"}


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
    with _known(identifier):
        found = await viewer.run(partial(held.show, viewer.store, viewer.user, identifier))
    return viewer.page("operations_held_one.html.jinja", one=found)


@routes.post(_ROOT + "/{identifier}")
async def decide(request: Request, viewer: Changing, identifier: str) -> Response:
    """Release, replace or refuse it. The request that waits for it is answered at once."""
    _check(viewer)
    fields = await form(request)
    decision = _DECISIONS.get(field(fields, "decision"))
    if decision is None:
        raise bad_request("Choose a decision.", "decision")
    edited = fields.get("answer", [""])[0].replace("\r\n", "\n") if decision == "replace" else None
    run = partial(
        held.decide,
        viewer.store,
        viewer.user,
        identifier,
        decision,
        reason=field(fields, "reason"),
        answer=edited,
    )
    with _known(identifier):
        found = await viewer.serving.noting.run(viewer.user.name, run)
    viewer.serving.metrics.held.labels(found.state).inc()
    viewer.serving.awaited.tell(identifier)
    return gone_to(request, _ROOT)


@contextlib.contextmanager
def _known(identifier: str) -> Iterator[None]:
    try:
        yield
    except UnknownAnswer as error:
        raise ApiError(404, f"There is no held answer {identifier[:80]!r}.", code="held_not_found") from error


def _check(viewer: Viewer) -> None:
    if not viewer.user.may("answer.review"):
        raise ApiError(403, "Held answers are for approvers and stewards.", code="permission_denied")

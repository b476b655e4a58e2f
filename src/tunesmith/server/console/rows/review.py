"""The review queue: rows and kept requests, one after the other, by keys."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Response

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.routing import router
from tunesmith.server.errors import ApiError, missing
from tunesmith.services import review

routes = router()
_STATES = ("waiting", "conflict", "accept", "edit", "reject", "all")


@routes.get("/console/rows/review")
async def review_queue(
    viewer: Looking, state: str = "waiting", page: int = 1, added: Annotated[int | None, Query(ge=0)] = None
) -> Response:
    """The items, how many wait, and how far reviewers agree."""
    _check(viewer)
    chosen = state if state in _STATES else "waiting"
    read = partial(review.list_items, viewer.store, state=chosen, page=page, actor=viewer.user.name)
    first = await viewer.run(partial(review.next_item, viewer.store, actor=viewer.user.name))
    found = await viewer.run(read)
    return viewer.page("review.html.jinja", found=found, state=chosen, states=_STATES, first=first, added=added)


@routes.get("/console/rows/review/{number}")
async def review_item(viewer: Looking, number: int) -> Response:
    """One item with its text, and what may be decided."""
    _check(viewer)
    who = viewer.user.name
    try:
        item = await viewer.run(partial(review.show, viewer.store, number, actor=who))
    except UsageError as error:
        raise missing("item to review") from error
    following = await viewer.run(partial(review.next_item, viewer.store, number, actor=who))
    before = await viewer.run(partial(review.next_item, viewer.store, number, actor=who, back=True))
    return viewer.page(
        "review_item.html.jinja",
        item=item,
        following=None if following == number else following,
        before=before,
        marked=review.marked,
    )


def _check(viewer: Viewer) -> None:
    """Raise ApiError 404 for a person of one tenant or region, 403 for one who may not review."""
    if viewer.user.scope != Scope():
        raise missing("page")
    if not viewer.user.may("row.review"):
        raise ApiError(403, "Engineers and stewards review rows.", code="forbidden")

"""The review queue: rows and kept requests, one after the other, by keys."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.server.console.jobs.pages import no_start
from tunesmith.server.console.people.session import Changing, Looking, Viewer, field, form
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import ApiError, bad_request, missing
from tunesmith.services.datasets import review

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


@routes.post("/console/rows/review")
async def fill(request: Request, viewer: Changing) -> Response:
    """Add what should be reviewed."""
    _check(viewer)
    fields = await form(request)
    reviewers = 2 if fields.get("reviewers") == ["2"] else 1
    search = field(fields, "search")[:200]
    call = partial(review.fill, viewer.store, reviewers=reviewers, pseudonyms="pseudonyms" in fields, search=search)
    done = await viewer.run(partial(call, actor=viewer.user.name))
    return gone_to(request, f"/console/rows/review?added={done.added}")


@routes.post("/console/rows/review/export")
async def export(request: Request, viewer: Changing) -> Response:
    """Write the decisions for the next build."""
    _check(viewer)
    project = viewer.serving.project
    if project is None:
        raise UsageError("this server has no project folder", fix="run `tunesmith review export` in the project's")
    done = await viewer.run(partial(review.export, project, actor=viewer.user.name))
    return viewer.page("review_exported.html.jinja", done=done, may_start=not no_start(viewer))


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


@routes.post("/console/rows/review/{number}")
async def decide(request: Request, viewer: Changing, number: int) -> Response:
    """Record a decision, and go to the next item."""
    _check(viewer)
    fields = {name: values[0] for name, values in (await form(request)).items()}
    contents = (await form(request)).get("content")
    choice = next((one for one in review.CHOICES if one == fields.get("decision")), None)
    revision = fields.get("revision", "")
    if choice is None or not (revision.isascii() and revision.isdecimal() and len(revision) < 9):
        raise bad_request("The form cannot be read.", code="invalid_form")
    call = partial(
        review.decide,
        viewer.store,
        number,
        choice,
        reason=fields.get("reason", "")[:2000],
        contents=contents if choice == "edit" else None,
        revision=int(revision),
        actor=viewer.user.name,
    )
    done = await viewer.run(call)
    return gone_to(request, "/console/rows/review" if done.next is None else f"/console/rows/review/{done.next}")


def _check(viewer: Viewer) -> None:
    """Raise ApiError 404 for a person of one tenant or region, 403 for one who may not review."""
    if viewer.user.scope != Scope():
        raise missing("page")
    if not viewer.user.may("row.review"):
        raise ApiError(403, "Engineers and stewards review rows.", code="forbidden")

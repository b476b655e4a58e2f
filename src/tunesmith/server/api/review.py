"""/api/review: the review queue, its items, what people decide on them, and the decisions for the next build."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.view import View
from tunesmith.data.review.decisions import Choice
from tunesmith.server.access import needs
from tunesmith.server.api.routing import Number, Page, Reason, Short, changes, router, shows, whole_call_of
from tunesmith.services.datasets import review

routes = router()
State = Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"]


class FillRequest(BaseModel):
    """What to add to the queue. dataset: a dataset version's digest or its start, by default the newest.

    reviewers: how many people decide on each item. pseudonyms: also rows that hold a pseudonym.
    search: also training and validation rows with this text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Annotated[str, Field(min_length=1, max_length=71)] | None = None
    reviewers: Annotated[int, Field(ge=1, le=2)] = 1
    pseudonyms: bool = False
    search: Short = ""


class ReviewDecision(BaseModel):
    """A decision on an item. contents: the text of every turn, for an edit. revision: of the item that was seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: Choice
    reason: Reason = ""
    contents: Annotated[tuple[str, ...], Field(max_length=2048)] | None = None
    revision: Annotated[int, Field(ge=0, le=2**31 - 1)]


class NextItem(View):
    """The next item that waits for the caller; null where there is none."""

    item: int | None


@routes.get("/review", dependencies=[needs("rows")], **shows(review.ReviewList))
async def items(request: Request, state: State = "waiting", page: Page = 1) -> Response:
    """Items of the queue without texts, 25 a page, how many are in each state, and how far reviewers agree."""
    call = whole_call_of(request, "row.review")
    return await call.answer(partial(review.list_items, call.store, state=state, page=page, **call.by))


@routes.get("/review/next", dependencies=[needs("rows")], **shows(NextItem))
async def following(request: Request, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0) -> Response:
    """The number of the next item that waits for the caller. after: the number to begin behind."""
    call = whole_call_of(request, "row.review")
    return await call.answer(lambda: NextItem(item=review.next_item(call.store, after, actor=call.user.name)))


@routes.get("/review/{number}", dependencies=[needs("rows")], **shows(review.ReviewItem))
async def item(request: Request, number: Number) -> Response:
    """One item with its text and decisions."""
    call = whole_call_of(request, "row.review")
    return await call.answer(partial(review.show, call.store, number, **call.by))


@routes.post("/review/fill", dependencies=[needs("rows")], **changes(review.FilledQueue, FillRequest))
async def fill(request: Request) -> Response:
    """Add flagged rows, conflicts, near duplicates and requests that failed in service to the queue."""
    call = whole_call_of(request, "row.review")
    given = await call.read(FillRequest)
    options = {"reviewers": given.reviewers, "pseudonyms": given.pseudonyms, "search": given.search}
    act = partial(review.fill, call.store, given.dataset, **options, **call.by)  # type: ignore[arg-type]
    return await call.answer(act, threads=call.serving.files)


@routes.post("/review/export", dependencies=[needs("rows")], **changes(review.ExportedReview))
async def export(request: Request) -> Response:
    """Write the decisions to the file that the next build applies."""
    call = whole_call_of(request, "row.review")
    return await call.answer(partial(review.export, call.project, **call.by), threads=call.serving.files)


@routes.post("/review/{number}/decide", dependencies=[needs("rows")], **changes(review.DecidedItem, ReviewDecision))
async def decide(request: Request, number: Number) -> Response:
    """Accept, edit or reject an item."""
    call = whole_call_of(request, "row.review")
    given = await call.read(ReviewDecision)
    act = partial(
        review.decide,
        call.store,
        number,
        given.decision,
        reason=given.reason,
        contents=given.contents,
        revision=given.revision,
        **call.by,
    )
    return await call.answer(act, threads=call.serving.files)

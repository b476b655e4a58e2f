"""/api/review: the review queue, its items, what people decide on them, and the decisions for the next build."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import Query, Request, Response

from tunesmith.core.view import View
from tunesmith.server.access import needs
from tunesmith.server.api.routing import Number, Page, router, shows, whole_call_of
from tunesmith.services import review

routes = router()
State = Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"]


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

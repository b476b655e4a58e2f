"""/api/datasets and /api/review: dataset versions, the account of their rows, their rows, differences and sign-offs.

A dataset version may hold rows of every tenant, so these routes are for users of all tenants and regions.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from fastapi import Query, Request, Response

from tunesmith.core.view import View
from tunesmith.data.building.summary import DatasetSummary
from tunesmith.data.governance.difference import Difference
from tunesmith.server.access import needs
from tunesmith.server.api.routing import (
    Call,
    Digest,
    Number,
    Page,
    Text,
    router,
    shows,
    whole_call_of,
)
from tunesmith.services import datasets, review

routes = router()
_AT = "/datasets/{digest}"


@routes.get("/datasets", dependencies=[needs("read")], **shows(datasets.DatasetPage))
async def listed(request: Request, page: Page = 1) -> Response:
    """Dataset versions, newest first, 25 a page."""
    call = whole_call_of(request)
    return await call.answer(partial(datasets.list_datasets, call.store, page))


@routes.get(_AT, dependencies=[needs("read")], **shows(DatasetSummary))
async def dataset(request: Request, digest: Digest) -> Response:
    """The account of a dataset version: what happened to every row, splits, leakage, licences and privacy."""
    call = await _of(request, digest)
    return await call.answer(partial(datasets.summary, call.store, digest))


@routes.get(_AT + "/difference/{other}", dependencies=[needs("read")], **shows(Difference))
async def difference(request: Request, digest: Digest, other: Digest) -> Response:
    """What changed from this dataset version to the other one: ids of rows, splits, licences, settings."""
    call = await _of(request, digest, other)
    return await call.answer(partial(datasets.difference, call.store, digest, other))


@routes.get(_AT + "/rows", dependencies=[needs("rows")], **shows(datasets.RowPage))
async def rows(
    request: Request,
    digest: Digest,
    split: Literal["train", "validation", "test", "removed"] = "train",
    reason: Text = "",
    search: Text = "",
    page: Page = 1,
) -> Response:
    """Rows of a split with their texts, or where rows that were left out came from, 25 a page.

    reason: only rows left out for it. search: only rows with this text.
    """
    call = await _of(request, digest)
    call.user.require("row.read")
    choice = {"split": split, "reason": reason, "search": search, **call.by}
    return await call.answer(partial(datasets.list_rows, call.store, digest, page=page, **choice))


@routes.get(_AT + "/sign-offs", dependencies=[needs("read")], **shows(datasets.SignOffList))
async def sign_offs(request: Request, digest: Digest) -> Response:
    """The stewards' sign-offs of a dataset version."""
    call = await _of(request, digest)
    return await call.answer(partial(datasets.list_sign_offs, call.store, digest))


async def _of(request: Request, *digests: str) -> Call:
    """The call. Raises NotThere where one of the digests is no dataset version's."""
    call = whole_call_of(request)
    for digest in digests:
        await call.run(partial(datasets.find_dataset, call.store, digest))
    return call


State = Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"]


class NextItem(View):
    """The next item that waits for the caller; null where there is none."""

    item: int | None


@routes.get("/review", dependencies=[needs("rows")], **shows(review.ReviewList))
async def review_items(request: Request, state: State = "waiting", page: Page = 1) -> Response:
    """Items of the queue without texts, 25 a page, how many are in each state, and how far reviewers agree."""
    call = whole_call_of(request, "row.review")
    return await call.answer(partial(review.list_items, call.store, state=state, page=page, **call.by))


@routes.get("/review/next", dependencies=[needs("rows")], **shows(NextItem))
async def following(request: Request, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0) -> Response:
    """The number of the next item that waits for the caller. after: the number to begin behind."""
    call = whole_call_of(request, "row.review")
    return await call.answer(lambda: NextItem(item=review.next_item(call.store, after, actor=call.user.name)))


@routes.get("/review/{number}", dependencies=[needs("rows")], **shows(review.ReviewItem))
async def review_item(request: Request, number: Number) -> Response:
    """One item with its text and decisions."""
    call = whole_call_of(request, "row.review")
    return await call.answer(partial(review.show, call.store, number, **call.by))

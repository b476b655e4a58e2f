"""Rows: dataset versions with what happened to every row and their differences, and the review queue."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import Query, Response

from tunesmith.server.console.routing import Looking, Pages, Viewer
from tunesmith.services import datasets, review

routes = Pages()
_SPLITS = ("train", "validation", "test", "removed")
_STATES = ("waiting", "conflict", "accept", "edit", "reject", "all")
_SHOWN = 50  # rows of each kind of difference


@routes.shows("/console/rows")
def listed(viewer: Looking, page: int = 1) -> Response:
    """All dataset versions, newest first."""
    if not viewer.user.scope.unlimited:
        return viewer.page("rows_none.html.jinja")
    return viewer.page("rows.html.jinja", listed=datasets.list_datasets(viewer.store, page))


@routes.shows("/console/rows/compare")
def compare(viewer: Looking, before: str = "", after: str = "") -> Response:
    """What differs between two dataset versions."""
    first, second = _digest(viewer, before), _digest(viewer, after)
    difference = datasets.difference(viewer.store, first, second)
    texts: dict[str, dict[str, datasets.FoundRow]] = {"before": {}, "after": {}}
    if viewer.user.may("row.read"):
        gone = [*(one.before for one in difference.changed[:_SHOWN]), *difference.removed[:_SHOWN]]
        come = [*(one.after for one in difference.changed[:_SHOWN]), *difference.added[:_SHOWN]]
        for side, digest, ids in (("before", first, gone), ("after", second, come)):
            texts[side] = datasets.rows_by_id(viewer, digest, ids)
    return viewer.page("rows_compare.html.jinja", difference=difference, texts=texts, most=_SHOWN)


@routes.shows("/console/rows/review")
def review_queue(
    viewer: Looking, state: str = "waiting", page: int = 1, added: Annotated[int | None, Query(ge=0)] = None
) -> Response:
    """The items, how many wait, and how far reviewers agree."""
    viewer.require_everything()
    chosen = state if state in _STATES else "waiting"
    first = review.next_item(viewer)
    listed = review.list_items(viewer, state=chosen, page=page)
    return viewer.page("review.html.jinja", listed=listed, state=chosen, states=_STATES, first=first, added=added)


@routes.shows("/console/rows/review/{number}")
def review_item(viewer: Looking, number: int) -> Response:
    """One item with its text, and what may be decided."""
    viewer.require_everything()
    item, following = review.show(viewer, number), review.next_item(viewer, number)
    return viewer.page(
        "review_item.html.jinja",
        item=item,
        following=None if following == number else following,
        before=review.next_item(viewer, number, back=True),
        marked=review.marked,
    )


@routes.shows("/console/rows/{dataset}")
def dataset_version(
    viewer: Looking, dataset: str, split: str = "train", reason: str = "", search: str = "", page: int = 1
) -> Response:
    """One version: the account of its rows, its sign-offs, and the rows."""
    digest, store, rows = _digest(viewer, dataset), viewer.store, None
    choice = {"split": split if split in _SPLITS else "train", "reason": reason, "search": search[:200]}
    if viewer.user.may("row.read"):
        rows = datasets.list_rows(viewer, digest, page=page, **choice)
    return viewer.page(
        "rows_version.html.jinja",
        version=datasets.summary(store, digest),
        signed=datasets.list_sign_offs(store, digest).sign_offs,
        others=[one for one in datasets.list_datasets(store).datasets if one.dataset != digest and not one.unreadable],
        rows=rows,
        splits=_SPLITS,
        **choice,
        query=urlencode(choice),
    )


def _digest(viewer: Viewer, given: str) -> str:
    """The digest of a dataset version that this person may see. Raises NotThere for any other."""
    viewer.require_everything()
    return datasets.find_dataset(viewer.store, f"sha256:{given}")

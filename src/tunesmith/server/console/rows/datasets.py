"""Dataset versions: what happened to every row, their rows, their differences, and a steward's sign-off."""

from __future__ import annotations

from functools import partial
from urllib.parse import urlencode

from fastapi import Response

from tunesmith.core.scope import Scope
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.routing import router
from tunesmith.server.errors import missing
from tunesmith.services import datasets

routes = router()
_SPLITS = ("train", "validation", "test", "removed")
_SHOWN = 50  # rows of each kind of difference


@routes.get("/console/rows")
async def listed(viewer: Looking, page: int = 1) -> Response:
    """All dataset versions, newest first."""
    if viewer.user.scope != Scope():
        return viewer.page("rows_none.html.jinja")
    found = await viewer.run(partial(datasets.list_datasets, viewer.store, page))
    return viewer.page("rows.html.jinja", found=found)


@routes.get("/console/rows/compare")
async def compare(viewer: Looking, before: str = "", after: str = "") -> Response:
    """What differs between two dataset versions."""
    first, second = _digest(viewer, before), _digest(viewer, after)
    found = await viewer.run(partial(datasets.difference, viewer.store, first, second))
    texts: dict[str, dict[str, datasets.FoundRow]] = {"before": {}, "after": {}}
    if viewer.user.may("row.read"):
        gone = [*(one.before for one in found.changed[:_SHOWN]), *found.removed[:_SHOWN]]
        come = [*(one.after for one in found.changed[:_SHOWN]), *found.added[:_SHOWN]]
        for side, digest, ids in (("before", first, gone), ("after", second, come)):
            read = partial(datasets.rows_by_id, viewer.store, digest, ids, actor=viewer.user.name)
            texts[side] = await viewer.run(read)
    return viewer.page("rows_compare.html.jinja", found=found, texts=texts, most=_SHOWN)


@routes.get("/console/rows/{dataset}")
async def dataset_version(
    viewer: Looking, dataset: str, split: str = "train", reason: str = "", search: str = "", page: int = 1
) -> Response:
    """One version: the account of its rows, its sign-offs, and the rows."""
    digest = _digest(viewer, dataset)
    version = await viewer.run(partial(datasets.summary, viewer.store, digest))
    signed = await viewer.run(partial(datasets.list_sign_offs, viewer.store, digest))
    others = await viewer.run(partial(datasets.list_datasets, viewer.store))
    rows = None
    split = split if split in _SPLITS else "train"
    if viewer.user.may("row.read"):
        choice = {"split": split, "reason": reason, "search": search[:200]}
        read = partial(datasets.list_rows, viewer.store, digest, actor=viewer.user.name, page=page, **choice)
        rows = await viewer.run(read)
    return viewer.page(
        "rows_version.html.jinja",
        version=version,
        signed=signed.sign_offs,
        others=[one for one in others.datasets if one.dataset != digest],
        rows=rows,
        splits=_SPLITS,
        split=split,
        reason=reason,
        search=search,
        query=urlencode({"split": split, "reason": reason, "search": search}),
    )


def _digest(viewer: Viewer, given: str) -> str:
    """The digest of a dataset version that this person may see. Raises NotThere for any other."""
    if viewer.user.scope != Scope():
        raise missing("dataset version")
    return datasets.find_dataset(viewer.store, f"sha256:{given}")

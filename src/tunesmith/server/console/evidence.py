"""Evidence: evaluations, what one of them showed, its matrix of requests by candidates, and one request opened."""

from __future__ import annotations

from functools import partial
from typing import Final
from urllib.parse import urlencode

from fastapi import Request, Response

from tunesmith.server.api.routing import Page
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.rendering import private
from tunesmith.server.console.routing import router
from tunesmith.services import evaluation_lookups, held_out_requests
from tunesmith.services.evaluation_lookups import EvaluationPage
from tunesmith.services.evaluations import READ_PERMISSION, report_sections

routes = router()
_AT: Final = "/console/evidence"
_ROWS: Final = 50  # requests on a page of the matrix
_FILTER: Final = ("focus", "rival", "metric", "show", "group", "label", "search")
SHOWN: Final = {
    "all": "all requests",
    "flips": "wins and losses",
    "losses": "losses",
    "wins": "wins",
    "invalid": "answer not valid",
    "long": "long, or cut off",
}
CHANGES: Final = {"loss": "loss", "win": "win", "differs": "others differ", "same": "all alike"}

Digest = str


@routes.get(_AT)
async def listed(viewer: Looking, page: Page = 1) -> Response:
    """The evaluations that this person may see, newest first."""
    found = await viewer.run(partial(evaluation_lookups.list_evaluations, viewer.store, viewer.user, page))
    pages = max(1, -(-found.total // evaluation_lookups.LISTED))
    return viewer.page("evidence.html.jinja", found=found, page=page, last=pages)


@routes.get(_AT + "/{digest}")
async def one(viewer: Looking, digest: Digest, verdict: str = "") -> Response:
    """One evaluation. What it showed is fetched by the page: computing it for the first time takes seconds."""
    found = await shown(viewer, digest, verdict)
    return viewer.page("evidence_evaluation.html.jinja", found=found, digest=digest)


@routes.get(_AT + "/{digest}/findings")
async def findings(viewer: Looking, digest: Digest, verdict: str = "") -> Response:
    """The sections of the report, without requests and answers. Computing them takes seconds."""
    show = partial(
        evaluation_lookups.show_findings, viewer.store, viewer.user, _full(digest), verdict and _full(verdict)
    )
    found = await viewer.run(show)
    chosen = urlencode({"focus": found.focus, "rival": found.rival or ""})
    return private(await viewer.run(partial(report_sections, found, f"{_AT}/{digest}/requests?{chosen}")))


@routes.get(_AT + "/{digest}/requests")
async def requests(request: Request, viewer: Looking, digest: Digest, page: Page = 1) -> Response:
    """The page of the matrix. What it shows is fetched by it: reading many rows for the first time takes seconds."""
    viewer.user.require(READ_PERMISSION)
    found = await shown(viewer, digest)
    query = urlencode({**_chosen(request), "page": page})
    return viewer.page("evidence_requests.html.jinja", found=found, digest=digest, query=query)


@routes.get(_AT + "/{digest}/matrix")
async def matrix(request: Request, viewer: Looking, digest: Digest, page: Page = 1) -> Response:
    """The filters, and a page of the requests with every candidate's answer."""
    region, first = viewer.serving.settings.region, (page - 1) * _ROWS
    look = partial(held_out_requests.show_requests, viewer.store, viewer.user, region, _full(digest))
    found = await viewer.run(partial(look, _chosen(request), first, _ROWS))
    query = urlencode({key: value for key, value in found.filter.items() if value})
    response = viewer.page(
        "evidence_matrix.html.jinja",
        found=found,
        digest=digest,
        query=query,
        shown=SHOWN,
        changes=CHANGES,
        page=page,
        pages=max(1, -(-found.chosen // _ROWS)),
    )
    response.headers["HX-Replace-Url"] = f"{_AT}/{digest}/requests?{query}&page={page}"
    return response


@routes.get(_AT + "/{digest}/requests/{row}")
async def opened(
    request: Request, viewer: Looking, digest: Digest, row: str, compared: str = held_out_requests.REFERENCE
) -> Response:
    """One request: answers side by side, their differences, and what was retrieved."""
    chosen = _chosen(request)
    region = viewer.serving.settings.region
    found = await viewer.run(
        partial(held_out_requests.show_request, viewer.store, viewer.user, region, _full(digest), row, chosen, compared)
    )
    query = urlencode(chosen)
    page = (found.place or 0) // _ROWS + 1
    return viewer.page("evidence_request.html.jinja", found=found, digest=digest, query=query, chosen=chosen, page=page)


async def lost(viewer: Viewer, version: str, before: str = "") -> dict[str, str] | None:
    """The address of the requests that a version lost, what it says, and the address of its evaluation.

    version, before: digests. None where this person may not read them.
    """
    if not viewer.user.may(READ_PERMISSION):
        return None
    found = await viewer.run(partial(evaluation_lookups.compare_versions, viewer.store, viewer.user, version, before))
    if found is None or not found.rival:
        return None
    chosen = urlencode({"focus": found.focus, "rival": found.rival, "show": "losses"})
    here = f"{_AT}/{found.evaluation[7:]}"
    return {
        "requests": f"{here}/requests?{chosen}",
        "against": f"{found.against} ({found.rival})" if found.against else found.rival,
        "evaluation": f"{here}?verdict={found.verdict[7:]}",
    }


async def shown(viewer: Viewer, digest: str, verdict: str = "") -> EvaluationPage:
    """The evaluation of an address. Raises NotThere where this person sees none."""
    show = partial(
        evaluation_lookups.show_evaluation, viewer.store, viewer.user, _full(digest), verdict and _full(verdict)
    )
    return await viewer.run(show)


def _chosen(request: Request) -> dict[str, str]:
    return {key: value for key in _FILTER if (value := request.query_params.get(key, ""))}


def _full(hexadecimal: str) -> str:
    return f"sha256:{hexadecimal}"

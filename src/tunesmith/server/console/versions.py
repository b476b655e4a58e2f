"""The pages of versions: the list, one version with its lineage and decisions, its records and documents."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tunesmith.server.api.routing import Digest, Name, Number, Page
from tunesmith.server.api.versions import REPORT_POLICY
from tunesmith.server.console.evidence import lost
from tunesmith.server.console.people.session import Looking, Viewer
from tunesmith.server.console.rendering import PRIVATE
from tunesmith.server.console.routing import router
from tunesmith.services import lineage as lineages
from tunesmith.services import versions as service

routes = router()
Text = Annotated[str, Query(max_length=200)]


@routes.get("/console/versions")
async def listed(viewer: Looking, q: Text = "", state: Text = "", page: Page = 1) -> Response:
    """The versions that the person may see, the newest first."""
    found = await viewer.run(
        partial(service.page_of_versions, viewer.store, viewer.user, text=q, state=state, page=page)
    )
    return viewer.page("versions.html.jinja", found=found, q=q, state=state, states=service.STATES)


@routes.get("/console/versions/{name}/{number}")
async def one(request: Request, viewer: Looking, name: Name, number: Number) -> Response:
    """One version."""
    version = await _version(viewer, name, number)

    def look() -> dict[str, Any]:
        return {
            "found": service.details(viewer.store, viewer.user, version),
            "lineage": lineages.lineage(viewer.store, version),
        }

    server = f"{request.url.scheme}://{request.url.netloc}"
    shown = {**await viewer.run(look), "server": server, "options": version.scope.options()}
    shown["losses"] = await lost(viewer, version.digest)
    return viewer.page("version.html.jinja", **shown, at=_at(name, number))


@routes.get("/console/versions/{name}/{number}/records/{digest}")
async def record(
    viewer: Looking, name: Name, number: Number, digest: Digest, split: Text = "train", q: Text = "", page: Page = 1
) -> Response:
    """A record of a version's lineage; of a dataset also its rows with their licences."""
    version = await _version(viewer, name, number)

    def look() -> dict[str, Any]:
        found, rows = lineages.record_details(viewer.store, viewer.user, version, digest), None
        if found.kind == "dataset":
            options: dict[str, Any] = {"split": split, "text": q, "page": page}
            rows = lineages.dataset_rows(viewer.store, viewer.user, version, digest, **options)
        return {"found": found, "rows": rows}

    found = await viewer.run(look)
    return viewer.page("record.html.jinja", **found, version=version, at=_at(name, number), split=split, q=q)


@routes.get("/console/versions/{name}/{number}/{document}")
async def document(viewer: Looking, name: Name, number: Number, document: service.Document) -> Response:
    """The evaluation report as a page of its own; or a file: the report, the datasheet of the rows, or their notice."""
    version = await _version(viewer, name, number)
    text = await viewer.run(partial(service.document_of, viewer.store, viewer.user, version, document))
    if document == "report.html":
        return HTMLResponse(text, headers={**PRIVATE, "Content-Security-Policy": REPORT_POLICY})
    headers = {**PRIVATE, "Content-Disposition": f'attachment; filename="{name}-v{number}-{document}"'}
    return PlainTextResponse(text, headers=headers, media_type="text/markdown")


async def _version(viewer: Viewer, name: str, number: int) -> service.RegisteredVersion:
    return await viewer.run(partial(service.find_version, viewer.store, viewer.user, name, number))


def _at(name: str, number: int) -> str:
    return f"/console/versions/{name}/{number}"

"""The pages of versions: the list, one version with its lineage and decisions, its records and documents."""

from __future__ import annotations

from collections.abc import Callable
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
from tunesmith.services import evaluations
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


@routes.get("/console/versions/{name}/{number}/report.html")
async def report(viewer: Looking, name: Name, number: Number) -> Response:
    """The evaluation report as a page of its own."""
    page = await _written(viewer, name, number, evaluations.report_html)
    return HTMLResponse(page, headers={**PRIVATE, "Content-Security-Policy": REPORT_POLICY})


@routes.get("/console/versions/{name}/{number}/report.md")
async def report_text(viewer: Looking, name: Name, number: Number) -> Response:
    """The evaluation report as a file, to put beside the model."""
    return _file(await _written(viewer, name, number, evaluations.report_text), f"{name}-v{number}.md")


@routes.get("/console/versions/{name}/{number}/datasheet.md")
async def datasheet(viewer: Looking, name: Name, number: Number) -> Response:
    """The datasheet of the rows that a version was made from."""
    version = await _version(viewer, name, number)
    found = await viewer.run(partial(service.datasheet_of, viewer.store, version))
    return _file(found, f"{name}-v{number}-datasheet.md")


@routes.get("/console/versions/{name}/{number}/NOTICE.md")
async def notice(viewer: Looking, name: Name, number: Number) -> Response:
    """What the licences of a version's rows ask for."""
    version = await _version(viewer, name, number)
    found = await viewer.run(partial(service.notice_of, viewer.store, version))
    return _file(found, f"{name}-v{number}-NOTICE.md")


async def _version(viewer: Viewer, name: str, number: int) -> service.RegisteredVersion:
    return await viewer.run(partial(service.find_version, viewer.store, viewer.user, name, number))


async def _written(viewer: Viewer, name: str, number: int, write: Callable[[evaluations.EvidenceReport], str]) -> str:
    version = await _version(viewer, name, number)
    return await viewer.run(lambda: write(evaluations.version_report(viewer.store, viewer.user, version)))


def _at(name: str, number: int) -> str:
    return f"/console/versions/{name}/{number}"


def _file(text: str, name: str) -> Response:
    headers = {**PRIVATE, "Content-Disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, headers=headers, media_type="text/markdown")

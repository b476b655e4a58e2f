"""The pages of versions: the list, one version with its lineage, decisions, verification and documents."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.scope import Scope
from tunesmith.core.text.display import json_text
from tunesmith.server.api.routing import Digest, Name, Number, Page
from tunesmith.server.api.versions import REPORT_POLICY
from tunesmith.server.console.evidence import lost
from tunesmith.server.console.people.session import Changing, Looking, Viewer, field, form
from tunesmith.server.console.rendering import PRIVATE
from tunesmith.server.console.routing import gone_to, router
from tunesmith.server.errors import bad_request, missing
from tunesmith.services import evaluations, evidence, version_pages
from tunesmith.services import lineage as lineages
from tunesmith.services import versions as service

routes = router()
Result = TypeVar("Result")
Text = Annotated[str, Query(max_length=200)]


@routes.get("/console/versions")
async def listed(viewer: Looking, q: Text = "", state: Text = "", page: Page = 1) -> Response:
    """The versions that the person may see, the newest first."""
    found = await viewer.run(
        partial(version_pages.page_of_versions, viewer.store, viewer.user, text=q, state=state, page=page)
    )
    return viewer.page("versions.html.jinja", found=found, q=q, state=state, states=version_pages.STATES)


@routes.get("/console/versions/{name}/{number}")
async def one(request: Request, viewer: Looking, name: Name, number: Number) -> Response:
    """One version."""
    version = await _version(viewer, name, number)

    def look() -> dict[str, Any]:
        return {
            "found": version_pages.details(viewer.store, viewer.user, version),
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

    def look() -> dict[str, Any] | None:
        found = lineages.record_details(viewer.store, viewer.user, version, digest)
        if found is None:
            return None
        rows = None
        if found.kind == "dataset":
            options: dict[str, Any] = {"split": split, "text": q, "page": page}
            rows = lineages.dataset_rows(viewer.store, viewer.user, version, digest, **options)
        return {"found": found, "rows": rows}

    found = await viewer.run(look)
    if found is None:
        raise missing("version, or no such record of it")
    return viewer.page("record.html.jinja", **found, version=version, at=_at(name, number), split=split, q=q)


@routes.post("/console/versions/{name}/{number}/verification")
async def verify(viewer: Changing, name: Name, number: Number) -> Response:
    """Verify a version and what it was made from now."""
    version = await _version(viewer, name, number)
    found = await _slow(viewer, partial(service.verify, viewer.store, version.label, lineage_only=True))
    return viewer.page("version_verified.html.jinja", found=found)


@routes.post("/console/versions/{name}/{number}/statement")
async def prepare(request: Request, viewer: Changing, name: Name, number: Number) -> Response:
    """Verify a version, and say what its approver signs."""
    version = await _version(viewer, name, number)
    fields = await form(request)
    decision, reason = field(fields, "decision"), field(fields, "reason")
    if decision not in ("approve", "refuse") or len(reason) > 2000:
        raise bad_request("A decision is approve or refuse, with a reason of at most 2000 characters.")
    chosen: Any = decision
    ready = partial(service.prepare, viewer.store, version.label, chosen, reason, actor=viewer.user.name)
    prepared = await _slow(viewer, partial(ready, scope=version.scope))
    return viewer.page(
        "version_statement.html.jinja",
        prepared=prepared,
        version=version,
        at=_at(name, number),
        statement=json_text(prepared.statement),
        readable=json_text(prepared.statement, indent=2),
        signed=prepared.statement["predicate"],
    )


@routes.post("/console/versions/{name}/{number}/decisions")
async def decide(request: Request, viewer: Changing, name: Name, number: Number) -> Response:
    """Check and record a decision that was signed in the browser."""
    await _version(viewer, name, number)
    fields = await form(request)
    try:
        statement = parse_json(fields["statement"][0].encode())
        signature = base64.b64decode(fields["signature"][0], validate=True)
        key = fields["key"][0]
    except (UsageError, KeyError, ValueError, binascii.Error) as error:
        raise bad_request("The signed decision is incomplete. Prepare it again.") from error
    await _slow(viewer, partial(service.submit, viewer.store, statement, key, signature, actor=viewer.user.name))
    return gone_to(request, f"{_at(name, number)}#decisions")


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
    found = await viewer.run(partial(version_pages.datasheet_of, viewer.store, version))
    return _file(found, f"{name}-v{number}-datasheet.md")


@routes.get("/console/versions/{name}/{number}/NOTICE.md")
async def notice(viewer: Looking, name: Name, number: Number) -> Response:
    """What the licences of a version's rows ask for."""
    version = await _version(viewer, name, number)
    found = await viewer.run(partial(version_pages.notice_of, viewer.store, version))
    return _file(found, f"{name}-v{number}-NOTICE.md")


async def _version(viewer: Viewer, name: str, number: int) -> service.RegisteredVersion:
    found = await viewer.run(partial(version_pages.find_version, viewer.store, viewer.user, name, number))
    if found is None:
        raise missing("version, or no such record of it")
    return found


async def _written(viewer: Viewer, name: str, number: int, write: Callable[[evaluations.EvidenceReport], str]) -> str:
    version = await _version(viewer, name, number)
    everything = viewer.user.scope == Scope()
    texts = everything and viewer.user.may(evidence.READ_PERMISSION)
    report = partial(evaluations.version_report, viewer.store, version, everything=everything, texts=texts)
    return await viewer.run(lambda: write(report()))


async def _slow(viewer: Viewer, call: Callable[[], Result]) -> Result:
    """What a call returns that reads whole files, on the threads for that."""
    return await viewer.serving.files.run(viewer.user.name, call)


def _at(name: str, number: int) -> str:
    return f"/console/versions/{name}/{number}"


def _file(text: str, name: str) -> Response:
    headers = {**PRIVATE, "Content-Disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, headers=headers, media_type="text/markdown")

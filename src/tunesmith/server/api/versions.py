"""/api/versions: the list, one more, one version, its lineage and its records, its verification and its documents."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.scope import Scope
from tunesmith.registry.verification import Verification
from tunesmith.server.access import needs
from tunesmith.server.api.routing import (
    READ,
    Call,
    Digest,
    Name,
    Number,
    Page,
    Text,
    call_of,
    changes,
    router,
    shows,
)
from tunesmith.server.errors import missing
from tunesmith.server.openapi import BEARER, errors
from tunesmith.services import evaluations, evidence, version_pages
from tunesmith.services import lineage as lineages
from tunesmith.services import versions as service

routes = router()
_AT = "/versions/{name}/{number}"
_NONE = "version, or no such record of it"
# The report brings its own style and no script; a browser shows it as a page of nobody.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; sandbox"
Document = Literal["report.html", "report.md", "datasheet.md", "NOTICE.md"]
_WRITTEN: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        **errors(*READ),
        200: {"content": {"text/markdown": {}, "text/html": {}}, "description": "Its text."},
    },
    "openapi_extra": BEARER,
}


@routes.get("/versions", dependencies=[needs("read")], **shows(version_pages.VersionPage))
async def versions(request: Request, search: Text = "", state: Text = "", page: Page = 1) -> Response:
    """The versions that the caller may see, newest first, 50 a page, with their states.

    search: a part of the name, NAME@v3, or the start of a digest. state: only versions in it.
    """
    call = call_of(request)
    look = partial(version_pages.page_of_versions, call.store, call.user, text=search, state=state, page=page)
    return await call.answer(look)


class RegisterRequest(BaseModel):
    """A judged candidate that becomes the next version of the project's name, for the caller's tenant and region.

    verdict: the digest of its verdict. override: an admin's reason to register one that did not pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
    override: Annotated[str, Field(min_length=1, max_length=2000)] | None = None


@routes.post("/versions", dependencies=[needs("jobs")], **changes(service.RegisteredVersion, RegisterRequest))
async def register(request: Request) -> Response:
    """Sign a judged candidate and keep it as the next version of the project's name, as a run does."""
    call = call_of(request, "version.register")
    given = await call.read(RegisterRequest)
    if not await call.run(partial(evidence.may_see_verdict, call.store, call.user, given.verdict)):
        raise missing("verdict")
    made = partial(
        service.register, call.project, given.verdict, override=given.override, scope=call.user.scope, **call.by
    )
    return await call.answer(made, threads=call.serving.files)


@routes.get(_AT, dependencies=[needs("read")], **shows(version_pages.VersionDetails))
async def version(request: Request, name: Name, number: Number) -> Response:
    """One version: its gates, who approved or refused it and who is still needed."""
    call = call_of(request)
    found = await _version(call, name, number)
    return await call.answer(partial(version_pages.details, call.store, call.user, found))


@routes.get(_AT + "/lineage", dependencies=[needs("read")], **shows(lineages.Lineage))
async def lineage(request: Request, name: Name, number: Number) -> Response:
    """What a version was made from, and what was made from it: records, each with its parents."""
    call = call_of(request)
    found = await _version(call, name, number)
    return await call.answer(partial(lineages.lineage, call.store, found))


@routes.get(_AT + "/records/{digest}", dependencies=[needs("read")], **shows(lineages.RecordDetails))
async def record(request: Request, name: Name, number: Number, digest: Digest) -> Response:
    """One record of a version's lineage."""
    call = call_of(request)
    found = await _version(call, name, number)
    return await call.answer(partial(lineages.record_details, call.store, call.user, found, digest), none=_NONE)


@routes.get(_AT + "/records/{digest}/rows", dependencies=[needs("read")], **shows(lineages.OriginPage))
async def rows(
    request: Request,
    name: Name,
    number: Number,
    digest: Digest,
    split: Literal["train", "validation", "test"] = "train",
    search: Text = "",
    page: Page = 1,
) -> Response:
    """Where the rows of a dataset in a version's lineage come from, and under which licence; never their texts."""
    call = call_of(request)
    found = await _version(call, name, number)
    look = partial(lineages.dataset_rows, call.store, call.user, found, digest, split=split, text=search, page=page)
    return await call.answer(look, none=_NONE)


@routes.post(_AT + "/verification", dependencies=[needs("read")], **shows(Verification))
async def verification(request: Request, name: Name, number: Number) -> Response:
    """Verify a version and what it was made from now."""
    call = call_of(request)
    found = await _version(call, name, number)
    check = partial(service.verify, call.store, found.label, lineage_only=True)
    return await call.answer(check, threads=call.serving.files)


@routes.get(_AT + "/documents/{document}", dependencies=[needs("read")], **_WRITTEN)
async def document(request: Request, name: Name, number: Number, document: Document) -> Response:
    """The evaluation report, the datasheet of the rows, or the notice of their licences."""
    call = call_of(request)
    found = await _version(call, name, number)

    def written() -> str:
        if document == "datasheet.md":
            return version_pages.datasheet_of(call.store, found)
        if document == "NOTICE.md":
            return version_pages.notice_of(call.store, found)
        whole = call.user.scope == Scope()
        texts = whole and call.permits("rows", evidence.READ_PERMISSION)
        report = evaluations.version_report(call.store, found, everything=whole, texts=texts)
        return evaluations.report_html(report) if document == "report.html" else evaluations.report_text(report)

    text = await call.run(written)
    if document == "report.html":
        return HTMLResponse(text, headers={"cache-control": "no-store", "content-security-policy": REPORT_POLICY})
    return PlainTextResponse(text, headers={"cache-control": "no-store"}, media_type="text/markdown")


async def _version(call: Call, name: str, number: int) -> service.RegisteredVersion:
    found = await call.run(partial(version_pages.find_version, call.store, call.user, name, number))
    if found is None:
        raise missing("version")
    return found

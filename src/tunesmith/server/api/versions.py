"""/api/versions: the list, one version, its lineage, its records and its documents."""

from __future__ import annotations

from functools import partial
from typing import Literal

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.server.access import needs, token_of
from tunesmith.server.api.routing import (
    READ,
    Call,
    Digest,
    Name,
    Number,
    Page,
    Text,
    call_of,
    router,
    shows,
)
from tunesmith.server.openapi import BEARER, errors
from tunesmith.services import lineage as lineages
from tunesmith.services import versions as service

routes = router()
_AT = "/versions/{name}/{number}"
# The report brings its own style and no script; a browser shows it as a page of nobody.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; sandbox"
_WRITTEN: JsonObject = {
    "response_class": Response,
    "responses": {
        **errors(*READ),
        200: {"content": {"text/markdown": {}, "text/html": {}}, "description": "Its text."},
    },
    "openapi_extra": BEARER,
}


@routes.get("/versions", dependencies=[needs("read")], **shows(service.VersionPage))
async def versions(request: Request, search: Text = "", state: Text = "", page: Page = 1) -> Response:
    """The versions that the caller may see, newest first, 50 a page, with their states.

    search: a part of the name, NAME@v3, or the start of a digest. state: only versions in it.
    """
    call = call_of(request)
    look = partial(service.page_of_versions, call.store, call.user, text=search, state=state, page=page)
    return await call.answer(look)


@routes.get(_AT, dependencies=[needs("read")], **shows(service.VersionDetails))
async def version(request: Request, name: Name, number: Number) -> Response:
    """One version: its gates, who approved or refused it and who is still needed."""
    call = call_of(request)
    found = await _version(call, name, number)
    return await call.answer(partial(service.details, call.store, call.user, found))


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
    return await call.answer(partial(lineages.record_details, call.store, call.user, found, digest))


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
    return await call.answer(look)


@routes.get(_AT + "/documents/{document}", dependencies=[needs("read")], **_WRITTEN)
async def document(request: Request, name: Name, number: Number, document: service.Document) -> Response:
    """The evaluation report, the datasheet of the rows, or the notice of their licences."""
    call = call_of(request)
    found = await _version(call, name, number)
    texts = token_of(request).permits("rows")
    text = await call.run(partial(service.document_of, call.store, call.user, found, document, texts=texts))
    if document == "report.html":
        return HTMLResponse(text, headers={"cache-control": "no-store", "content-security-policy": REPORT_POLICY})
    return PlainTextResponse(text, headers={"cache-control": "no-store"}, media_type="text/markdown")


async def _version(call: Call, name: str, number: int) -> service.RegisteredVersion:
    return await call.run(partial(service.find_version, call.store, call.user, name, number))

"""All pages of the console, its static files, and the answer to an address that is none."""

from __future__ import annotations

import mimetypes

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from tunesmith.server.access import PUBLIC
from tunesmith.server.console import changes, evidence, forms, home, jobs, operations, playground, rollouts, versions
from tunesmith.server.console.people import login, oidc
from tunesmith.server.console.rendering import FILES, HEADERS
from tunesmith.server.console.routing import router
from tunesmith.server.console.rows import datasets, review
from tunesmith.server.errors import missing

_KEPT = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}

own = router()


@own.get("/console", dependencies=[PUBLIC])
async def console() -> Response:
    """The console begins at the root."""
    return RedirectResponse("/", 308)


@own.get("/console/static/{name}", dependencies=[PUBLIC])
async def static(name: str) -> Response:
    """A file that ships with the console. Pages name it with a digest, so that browsers may keep it."""
    if name not in FILES:
        raise missing("page")
    return FileResponse(FILES[name], media_type=mimetypes.guess_type(name)[0] or "text/plain", headers=_KEPT)


last = router()


@last.get("/console/{rest:path}", dependencies=[PUBLIC])
async def no_page(request: Request) -> Response:
    """Any other address of the console."""
    raise missing("page")


routes = APIRouter()
for part in (
    own,
    login.routes,
    oidc.routes,
    changes.routes,
    forms.routes,
    home.routes,
    jobs.routes,
    evidence.routes,
    playground.routes,
    versions.routes,
    rollouts.routes,
    review.routes,
    datasets.routes,
    operations.routes,
    last,
):
    routes.include_router(part)

"""Every route declares who may call it, and what it declares is enforced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.staticfiles import StaticFiles
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route

from tests.server.conftest import Served
from tunesmith.server.access import PUBLIC, decides, needs
from tunesmith.store.roles import TOKEN_SCOPES

DECISIONS = {"public", "session", "any token", *TOKEN_SCOPES}
OPEN = {"/healthz", "/readyz", "/metrics"}


def decided(dependant: Dependant) -> Iterator[str]:
    """What a route's dependencies, and theirs, decide."""
    if (decision := getattr(dependant.call, "decision", None)) is not None:
        yield decision
    for each in dependant.dependencies:
        yield from decided(each)


def decisions(routes: Iterable[BaseRoute], at: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """(path, methods, decisions) of each route, those of mounted applications included. Static files are public."""
    for found in iter_route_contexts(list(routes)):
        route, path = found.original_route, at + (found.path or "")
        if isinstance(route, Mount) and isinstance(route.app, StaticFiles):
            yield path, "GET", ["public"]
        elif isinstance(route, Mount):
            inner = list(route.routes)
            yield from decisions(inner, path) if inner else [(path, "*", [])]
        elif isinstance(route, APIRoute):
            yield path, " ".join(sorted(found.methods or ())), list(decided(found.dependant))
        else:
            yield path, "*", []


def undecided(routes: Iterable[BaseRoute]) -> list[str]:
    """The routes without exactly one decision that is known."""
    return [
        path
        for path, _, made in decisions(routes)
        if len(set(made)) != 1 or not set(made[0].split(" or ")) <= DECISIONS
    ]


async def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("")


@decides("session")
async def viewer() -> str:
    return "ann"


def test_every_route_of_the_application_declares_who_may_call_it(shared: Served) -> None:
    found = list(decisions(shared.app.routes))
    assert len(found) > 25
    assert undecided(shared.app.routes) == []
    assert {path for path, _, made in found if made == ["public"] and "static" not in path} >= OPEN


@pytest.mark.parametrize(
    ("add", "complaint"),
    [
        (lambda app: app.add_api_route("/a", plain), ["/a"]),
        (lambda app: app.add_route("/a", plain), ["/a"]),
        (lambda app: app.mount("/a", FastAPI(openapi_url=None)), ["/a"]),
        (lambda app: app.mount("/a", plain), ["/a"]),
        (lambda app: app.router.routes.append(Mount("/a", routes=[Route("/b", plain)])), ["/a/b"]),
        (lambda app: app.add_api_route("/a", plain, dependencies=[PUBLIC, needs("chat")]), ["/a"]),
        (lambda app: app.mount("/a", StaticFiles(directory="/")), []),
        (lambda app: app.add_api_route("/a", plain, dependencies=[needs("read", "jobs")]), []),
        (lambda app: app.add_api_route("/a", plain, dependencies=[needs()]), []),
        (lambda app: app.include_router(included()), ["/sub/a"]),
    ],
)
def test_a_route_without_one_decision_is_found(add: Any, complaint: list[str]) -> None:
    app = FastAPI(openapi_url=None)
    add(app)
    assert undecided(app.routes) == complaint


def included() -> APIRouter:
    """A router with a route that decides and one that does not."""
    router = APIRouter(prefix="/sub")
    router.add_api_route("/a", plain)
    router.add_api_route("/b", plain, dependencies=[Depends(viewer)])
    return router

"""Log in by a one-time link, and log out."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request, Response

from tunesmith.server.access import PUBLIC
from tunesmith.server.console.rendering import html
from tunesmith.server.console.routing import LOGIN, gone_to, router
from tunesmith.server.console.session import COOKIE, Changing, check_origin, form, set_cookie
from tunesmith.server.errors import ApiError
from tunesmith.server.serving import serving_of
from tunesmith.store import sessions

routes = router()


@routes.get(LOGIN, dependencies=[PUBLIC])
async def login(request: Request) -> Response:
    """Say how to log in."""
    return html("login.html.jinja", {"user": None, "link": "", "next": _local(request.query_params.get("next", ""))})


@routes.get("/console/login/{link}", dependencies=[PUBLIC])
async def show_link(request: Request, link: str) -> Response:
    """Ask before a link is used, so that a program that looks at links in messages does not use it up."""
    user = await asyncio.to_thread(sessions.link_user, serving_of(request).store, link)
    if user is None:
        raise _ended()
    return html("login.html.jinja", {"user": user, "link": link, "next": _local(request.query_params.get("next", ""))})


@routes.post("/console/login/{link}", dependencies=[PUBLIC])
async def follow_link(request: Request, link: str) -> Response:
    """Use the link."""
    check_origin(request)
    where = _local((await form(request)).get("next", [""])[0])
    opened = await asyncio.to_thread(sessions.follow_link, serving_of(request).store, link)
    if opened is None or opened.secret is None:
        raise _ended()
    response = gone_to(request, where)
    set_cookie(request, response, opened.secret)
    return response


@routes.post("/console/logout")
async def logout(request: Request, viewer: Changing) -> Response:
    """End the session."""
    await viewer.run(partial(sessions.end_session, viewer.store, viewer.session, actor=viewer.user.name))
    request.state.new_cookie = None
    response = gone_to(request, LOGIN)
    response.delete_cookie(COOKIE, path="/")
    return response


def _ended() -> ApiError:
    return ApiError(
        404, "This link was used or has ended. `tunesmith login-link` prints another one.", code="link_ended"
    )


def _local(where: str) -> str:
    """A page of this console to go to after the login."""
    inside = where.startswith("/") and not where.startswith(("//", "/\\")) and "\n" not in where
    return where if inside else "/"

"""Log in by a one-time link, and log out."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request, Response

from tunesmith.server.access import PUBLIC
from tunesmith.server.console.people.session import Changing, check_origin, drop_cookie, field, form, set_cookie
from tunesmith.server.console.rendering import html
from tunesmith.server.console.routing import LOGIN, gone_to, local_page, router
from tunesmith.server.errors import ApiError
from tunesmith.server.serving import serving_of
from tunesmith.store.people import sessions

routes = router()


@routes.get(LOGIN, dependencies=[PUBLIC])
async def login(request: Request) -> Response:
    """Say how to log in."""
    project = serving_of(request).project
    provider = project is not None and project.settings.login is not None
    where = local_page(request.query_params.get("next", ""))
    return html("login.html.jinja", {"user": None, "link": "", "next": where, "provider": provider})


@routes.get("/console/login/{link}", dependencies=[PUBLIC])
async def show_link(request: Request, link: str) -> Response:
    """Ask before a link is used, so that a program that looks at links in messages does not use it up."""
    user = await asyncio.to_thread(sessions.link_user, serving_of(request).store, link)
    if user is None:
        raise _ended()
    return html(
        "login.html.jinja", {"user": user, "link": link, "next": local_page(request.query_params.get("next", ""))}
    )


@routes.post("/console/login/{link}", dependencies=[PUBLIC])
async def follow_link(request: Request, link: str) -> Response:
    """Use the link."""
    check_origin(request)
    store = serving_of(request).store
    if await asyncio.to_thread(sessions.link_user, store, link) is None:  # before a stranger's form is read
        raise _ended()
    where = local_page(field(await form(request), "next"))
    opened = await asyncio.to_thread(sessions.follow_link, store, link)
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
    drop_cookie(response)
    return response


def _ended() -> ApiError:
    return ApiError(404, "This link was used or has ended. Ask for another one.", code="link_ended")

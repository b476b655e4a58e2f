"""What every page of the console shares: login when there is no session, and errors that a person can read."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from tunesmith.core.errors import Forbidden, Inconclusive, NotThere, Refused, TunesmithError, UsageError
from tunesmith.server.answering.recording import LOG
from tunesmith.server.console.people.session import NotLoggedIn, set_cookie
from tunesmith.server.console.rendering import html
from tunesmith.server.errors import ApiError, passes

LOGIN = "/console/login"


class ConsoleRoute(APIRoute):
    """A route that answers people: what it raises becomes a page, or a notice where htmx asked for a part of one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                if "\0" in request.url.path or "%00" in request.url.query:
                    raise ApiError(400, "This address is not valid.", code="invalid_address")
                response = await inner(request)
            except NotLoggedIn:
                response = _to_login(request)
            except (RequestValidationError, OverflowError, DataError):  # numbers that no column holds
                response = problem(request, 400, "This address is not valid.", "")
            except ApiError as error:
                response = problem(request, error.status, error.message, "")
            except HTTPException as error:
                response = problem(request, error.status_code, str(error.detail), "")
            except (Refused, UsageError, Inconclusive) as error:
                status = 403 if isinstance(error, Forbidden) else 404 if isinstance(error, NotThere) else 409
                response = problem(request, status, error.what, error.fix)
            except TunesmithError as error:
                # Not the request's own path: it may hold a link's secret.
                LOG.error("%s %s raised", request.method, self.path, exc_info=error)
                what = "The database or store cannot be used now." if passes(error) else error.what
                response = problem(request, 503, what, error.fix)
            if (secret := getattr(request.state, "new_cookie", None)) is not None:
                set_cookie(request, response, secret)
            return response

        return handler


def router() -> APIRouter:
    """A router for pages. They are for people and no part of the OpenAPI document."""
    return APIRouter(route_class=ConsoleRoute, include_in_schema=False)


def is_part(request: Request) -> bool:
    """Whether htmx asks for a part of a page."""
    return request.headers.get("hx-request") == "true"


def gone_to(request: Request, where: str) -> Response:
    """Send the browser to another page after a change."""
    if is_part(request):
        return Response(status_code=204, headers={"HX-Redirect": where})
    return RedirectResponse(where, 303, headers={"Cache-Control": "no-store"})


# What a browser takes for a path of this site. It drops tabs and line ends, and reads "\\" as "/": neither is allowed.
_OWN_PATH = re.compile(r"/(?!/)[!-\[\]-~]*")


def local_page(where: str) -> str:
    """A page of this console to go to after the login; the first one for any other address."""
    return where if _OWN_PATH.fullmatch(where) else "/"


def problem(request: Request, status: int, what: str, fix: str | None) -> Response:
    """What went wrong, and what to do next."""
    template = "notice.html.jinja" if is_part(request) else "problem.html.jinja"
    return html(template, {"status": status, "what": what, "fix": fix}, status)


def _to_login(request: Request) -> Response:
    if request.method != "GET" or is_part(request):
        return Response(status_code=401, headers={"HX-Redirect": LOGIN, "Cache-Control": "no-store"})
    where = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{LOGIN}?next={quote(where)}", 303, headers={"Cache-Control": "no-store"})

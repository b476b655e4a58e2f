"""What the pages of the console share: who looks, login where there is no session, and errors that a person can read.

A session's cookie says who looks, instead of a token. A page takes a `Looking`; a route that changes something takes a
`Changing`, which checks the form.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Forbidden, Inconclusive, NotThere, Refused, TunesmithError, UsageError
from tunesmith.server.answering.recording import LOG
from tunesmith.server.console.rendering import html
from tunesmith.server.errors import ApiError, bad_request, passes
from tunesmith.server.intake.body import read_bytes
from tunesmith.server.serving import Serving, decides, serving_of, taking
from tunesmith.services.actions import Acting
from tunesmith.store.people import sessions

LOGIN = "/console/login"
COOKIE = "tunesmith-session"
# Where people reach the server by https. Browsers send it by https only, and let no other host set it.
SECURE_COOKIE = f"__Host-{COOKIE}"
_MOST_FIELDS = 1000
Look = TypeVar("Look", bound=Callable[..., Any])
Result = TypeVar("Result")


class NotLoggedIn(Exception):
    """The request has no session that may go on."""


@dataclass(frozen=True, kw_only=True)
class Viewer(Acting):
    """A person at the console. csrf: what their forms and htmx's requests carry to be believed."""

    serving: Serving
    path: str

    @property
    def csrf(self) -> str:
        """Known to pages of this session only."""
        return digest_bytes(f"form {self.session}".encode())[7:]

    def require_everything(self) -> None:
        """Raise ApiError 404 for a user of one tenant or region, on a page that is about all of them."""
        if not self.user.scope.unlimited:
            raise ApiError(404, "This page is for users of all tenants and regions.")

    async def run(self, call: Callable[[], Result]) -> Result:
        """What a call returns that may take a while, on the threads that users share."""
        return await self.serving.pages.run(self.actor, call)

    def page(self, template: str, **data: Any) -> HTMLResponse:
        """A page for this person."""
        project = self.serving.project
        shared = {
            "viewer": self,
            "user": self.user,
            "csrf": self.csrf,
            "path": self.path,
            "project": project.settings.name if project else "",
        }
        return html(template, {**shared, **data})


@decides("session")
async def viewer(request: Request) -> Viewer:
    """Who looks. Raises NotLoggedIn without a session."""
    serving = serving_of(request)
    sent = request.cookies.get(SECURE_COOKIE) or request.cookies.get(COOKIE, "")
    session = await asyncio.to_thread(sessions.continue_session, serving.store, sent) if sent else None
    if session is None:
        raise NotLoggedIn
    region = serving.settings.region
    if session.user.region not in ("", region):
        where = f"the region {region}" if region else "no region"
        raise ApiError(403, f"You may act for the region {session.user.region}, this server is for {where}.")
    request.state.new_cookie = session.secret
    return Viewer(**serving.here, user=session.user, session=session.id, path=request.url.path)


@decides("session")
async def changing_viewer(request: Request) -> Viewer:
    """Who changes something. Raises NotLoggedIn without a session, ApiError 403 for a form that is not of its pages."""
    check_origin(request)
    person = await viewer(request)
    sent = request.headers.get("x-csrf") or field(await form(request), "csrf")
    if not hmac.compare_digest(sent.encode(), person.csrf.encode()):
        raise ApiError(403, "This form is not of your session. Load the page again.")
    return person


async def form(request: Request) -> dict[str, list[str]]:
    """The fields of a form, within the limits of a body. Raises ApiError as `read_bytes`, 400 for too many."""
    if not hasattr(request.state, "form"):
        serving = serving_of(request)
        data = await read_bytes(request, serving.settings, lambda _size: None)
        try:
            if b"%00" in data or b"\0" in data:
                raise ValueError("a character that no database keeps")
            request.state.form = parse_qs(data.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError as error:
            raise bad_request("The form cannot be read.", code="invalid_form") from error
    fields: dict[str, list[str]] = request.state.form
    return fields


def field(given: Mapping[str, Sequence[str]], name: str) -> str:
    """A field of a form without spaces at its ends; "" where it is not there."""
    return given.get(name, [""])[0].strip()


Looking = Annotated[Viewer, Depends(viewer)]
Changing = Annotated[Viewer, Depends(changing_viewer)]


def check_origin(request: Request) -> None:
    """Raise ApiError 403 for a request that a page of another site sent."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    foreign = site is not None and site not in ("same-origin", "none")
    if site is None and origin is not None:  # an older browser
        foreign = origin.partition("://")[2] != request.headers.get("host")
    if foreign:
        raise ApiError(403, "Another site sent this.")


def set_cookie(request: Request, response: Response, secret: str) -> None:
    """Give the browser the session's secret: out of reach of scripts, and of requests that other sites send.

    It goes over https only where this request came so, as the browser says when it sends a form, or had such a cookie.
    """
    origin = request.headers.get("origin", "")
    secure = request.url.scheme == "https" or origin.startswith("https://") or SECURE_COOKIE in request.cookies
    name = SECURE_COOKIE if secure else COOKIE
    response.set_cookie(name, secret, httponly=True, samesite="strict", secure=secure, path="/")


def drop_cookie(response: Response) -> None:
    """Let the browser forget the session's secret."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    response.delete_cookie(SECURE_COOKIE, path="/", httponly=True, samesite="strict", secure=True)


class ConsoleRoute(APIRoute):
    """A route that answers people: what it raises becomes a page, or a notice where htmx asked for a part of one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                if "\0" in request.url.path or "%00" in request.url.query:
                    raise ApiError(400, "This address is not valid.")
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


class Pages(APIRouter):
    """A router for pages. They are for people and no part of the OpenAPI document."""

    def __init__(self) -> None:
        super().__init__(route_class=ConsoleRoute, include_in_schema=False)

    def shows(self, at: str) -> Callable[[Look], Look]:
        """Make a page of a function of a `Looking` that returns the answer; a thread of those for pages runs it."""

        def added(look: Look) -> Look:
            self.get(at)(taking(look, Viewer.run))
            return look

        return added


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

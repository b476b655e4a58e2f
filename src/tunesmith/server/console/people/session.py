"""Who looks at the console: a session's cookie instead of a token, and the check of every form that changes something.

A page takes a `Looking`; a route that changes something takes a `Changing`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import parse_qs

from fastapi import Depends, Request, Response
from fastapi.responses import HTMLResponse

from tunesmith.core.digests import digest_bytes
from tunesmith.server.access import decides
from tunesmith.server.console.rendering import html
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.server.intake.body import read_bytes
from tunesmith.server.serving import Serving, serving_of
from tunesmith.store.people import sessions
from tunesmith.store.people.identities import User

if TYPE_CHECKING:
    from tunesmith.store.store import Store

COOKIE = "tunesmith-session"
# Where people reach the server by https. Browsers send it by https only, and let no other host set it.
SECURE_COOKIE = f"__Host-{COOKIE}"
_MOST_FIELDS = 1000
Result = TypeVar("Result")


class NotLoggedIn(Exception):
    """The request has no session that may go on."""


@dataclass(frozen=True)
class Viewer:
    """A person at the console. csrf: what their forms and htmx's requests carry to be believed."""

    user: User
    session: str
    serving: Serving
    path: str

    @property
    def store(self) -> Store:
        """The server's store."""
        return self.serving.store

    @property
    def csrf(self) -> str:
        """Known to pages of this session only."""
        return digest_bytes(f"form {self.session}".encode())[7:]

    async def run(self, call: Callable[[], Result]) -> Result:
        """What a call returns that may take a while, on the threads that users share."""
        return await self.serving.pages.run(self.user.name, call)

    def page(self, template: str, status: int = 200, **data: Any) -> HTMLResponse:
        """A page for this person."""
        project = self.serving.project
        shared = {
            "viewer": self,
            "user": self.user,
            "csrf": self.csrf,
            "path": self.path,
            "project": project.settings.name if project else "",
        }
        return html(template, {**shared, **data}, status)


@decides("session")
async def viewer(request: Request) -> Viewer:
    """Who looks. Raises NotLoggedIn without a session."""
    serving = serving_of(request)
    sent = request.cookies.get(SECURE_COOKIE) or request.cookies.get(COOKIE, "")
    found = await asyncio.to_thread(sessions.continue_session, serving.store, sent) if sent else None
    if found is None:
        raise NotLoggedIn
    region = serving.settings.region
    if found.user.region not in ("", region):
        where = f"the region {region}" if region else "no region"
        raise ApiError(
            403, f"You may act for the region {found.user.region}, this server is for {where}.", code="region"
        )
    request.state.new_cookie = found.secret
    return Viewer(found.user, found.id, serving, request.url.path)


@decides("session")
async def changing_viewer(request: Request) -> Viewer:
    """Who changes something. Raises NotLoggedIn without a session, ApiError 403 for a form that is not of its pages."""
    check_origin(request)
    found = await viewer(request)
    sent = request.headers.get("x-csrf") or field(await form(request), "csrf")
    if not hmac.compare_digest(sent.encode(), found.csrf.encode()):
        raise ApiError(403, "This form is not of your session. Load the page again.", code="form_refused")
    return found


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
    found: dict[str, list[str]] = request.state.form
    return found


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
        raise ApiError(403, "Another site sent this.", code="form_refused")


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

"""Log in by a one-time link or by the identity provider of the project's `login:`, and log out.

The provider is asked by OpenID Connect (authorization code with PKCE, by authlib). What has to be remembered while the
person is at the provider is in a cookie of ten minutes: state, nonce, PKCE's verifier, and the page that they wanted.
The provider says who somebody is; what they may do, the store's users say.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from tunesmith.core.errors import TunesmithError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.server.answering.recording import LOG
from tunesmith.server.console.rendering import html
from tunesmith.server.console.routing import (
    LOGIN,
    Changing,
    Pages,
    check_origin,
    drop_cookie,
    field,
    form,
    gone_to,
    local_page,
    set_cookie,
)
from tunesmith.server.errors import ApiError, missing
from tunesmith.server.serving import PUBLIC, serving_of
from tunesmith.store.people import sessions

if TYPE_CHECKING:
    from authlib.integrations.starlette_client import StarletteOAuth2App

    from tunesmith.store.people.login_settings import LoginSettings

_COOKIE, _SECONDS = "tunesmith-login", 600
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA", "Ed25519")
_ANSWER_SECONDS = 15.0  # for each answer of the provider

routes = Pages()


@routes.get(LOGIN, dependencies=[PUBLIC])
async def login(request: Request) -> Response:
    """Say how to log in."""
    project = serving_of(request).project
    return _login_page(request, provider=project is not None and project.settings.login is not None)


@routes.get("/console/login/{link}", dependencies=[PUBLIC])
async def show_link(request: Request, link: str) -> Response:
    """Ask before a link is used, so that a program that looks at links in messages does not use it up."""
    user = await asyncio.to_thread(sessions.link_user, serving_of(request).store, link)
    if user is None:
        raise _ended()
    return _login_page(request, user=user, link=link)


def _login_page(request: Request, **data: Any) -> Response:
    where = local_page(request.query_params.get("next", ""))
    return html("login.html.jinja", {"user": None, "next": where, **data})


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
    await viewer.run(partial(sessions.end_session, viewer.store, viewer.session, actor=viewer.actor))
    request.state.new_cookie = None
    response = gone_to(request, LOGIN)
    drop_cookie(response)
    return response


def _ended() -> ApiError:
    return ApiError(404, "This link was used or has ended. Ask for another one.")


@routes.get("/console/oidc", dependencies=[PUBLIC])
async def begin(request: Request) -> Response:
    """Send the person to the provider."""
    login, client = await _client(request)
    request.scope["session"] = {}
    with _provider_asked():
        response: Response = await client.authorize_redirect(request, f"{login.url}/console/oidc/done")
    remembered = {**request.session, "next": local_page(request.query_params.get("next", ""))}
    response.set_cookie(
        _name(login),
        base64.urlsafe_b64encode(json.dumps(remembered).encode()).decode(),
        max_age=_SECONDS,
        httponly=True,
        samesite="lax",  # the provider sends the person back from another site
        secure=login.url.startswith("https:"),
        path="/",
    )
    response.headers["Cache-Control"] = "no-store"
    return response


@routes.get("/console/oidc/done", dependencies=[PUBLIC])
async def done(request: Request) -> Response:
    """Open a session for the person whom the provider names."""
    login, client = await _client(request)
    request.scope["session"] = remembered = _remembered(request.cookies.get(_name(login), ""))
    with _provider_asked():
        token = await client.authorize_access_token(request)
        claims = dict(token.get("userinfo") or {})
        if login.claim not in claims:
            more = dict(await client.userinfo(token=token))
            claims |= more if more.get("sub") == claims.get("sub") else {}
    who = claims.get(login.claim)
    if login.claim == "email" and claims.get("email_verified") is not True:
        raise ApiError(403, "The provider has not verified your e-mail address.")
    user = login.users.get(who) if isinstance(who, str) else None
    if user is None:
        what = "The provider knows you, but you are no user here. Ask an admin to add you to `login: users:`."
        raise ApiError(403, what)
    opened = await asyncio.to_thread(sessions.open_session, serving_of(request).store, user, how="oidc")
    assert opened is not None
    assert opened.secret is not None
    request.scope["scheme"] = login.url.partition(":")[0]
    # A page and no redirection: a browser sends the session's cookie only to where a page of this site leads.
    response = html("logged_in.html.jinja", {"next": local_page(str(remembered.get("next", "")))})
    set_cookie(request, response, opened.secret)
    response.delete_cookie(_name(login), path="/")
    return response


@contextlib.contextmanager
def _provider_asked() -> Iterator[None]:
    """Turn what goes wrong between this server and the provider into pages."""
    import httpx2
    from authlib.common.errors import AuthlibBaseError
    from joserfc.errors import JoseError

    try:
        yield
    except httpx2.HTTPError as error:
        LOG.error("the identity provider: %s", error)
        raise ApiError(503, "The identity provider does not answer. Try again.") from error
    except (AuthlibBaseError, JoseError, ValueError, KeyError, RuntimeError) as error:
        LOG.warning("a login by the identity provider failed: %s", error)
        raise ApiError(403, "The identity provider did not confirm who you are. Log in again.") from error


async def _client(request: Request) -> tuple[LoginSettings, StarletteOAuth2App]:
    """The settings, and authlib's client with the provider's metadata. Raises ApiError 404 where there is no provider,
    503 where it does not answer."""
    serving = serving_of(request)
    login = serving.project.settings.login if serving.project else None
    if login is None:
        raise missing("page")
    if serving.oidc is None:
        from authlib.integrations.starlette_client import OAuth

        serving.oidc = OAuth().register(
            "login",
            client_id=login.client,
            client_secret=client_secret(login),
            server_metadata_url=f"{login.issuer}/.well-known/openid-configuration",
            client_kwargs={"scope": "openid email", "code_challenge_method": "S256", "timeout": _ANSWER_SECONDS},
        )
    client: StarletteOAuth2App = serving.oidc
    with _provider_asked():
        metadata = await client.load_server_metadata()
        if metadata.get("issuer", "").rstrip("/") != login.issuer:
            raise ValueError(f"the provider calls itself {metadata.get('issuer')!r}")
        stated = metadata.get("id_token_signing_alg_values_supported") or ["RS256"]
        metadata["id_token_signing_alg_values_supported"] = [each for each in stated if each in _ALGORITHMS]
    return login, client


def client_secret(login: LoginSettings) -> str:
    """The client's secret. Raises TunesmithError where its environment variable is not set."""
    secret = os.environ.get(login.secret, "")
    if not secret:
        raise TunesmithError(
            f"${login.secret} is not set", where="tunesmith.yaml, login.secret", fix="set it to the client's secret"
        )
    return secret


def _remembered(cookie: str) -> JsonObject:
    try:
        remembered = json.loads(base64.urlsafe_b64decode(cookie))
    except ValueError:
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _name(login: LoginSettings) -> str:
    """The cookie's name. Browsers let only this very host set one that begins with __Host-."""
    return f"__Host-{_COOKIE}" if login.url.startswith("https:") else _COOKIE

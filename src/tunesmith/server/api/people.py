"""/api/status, audit, users, keys and tokens: what waits for whom, who did what, and who may do what."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response

from tunesmith.server.access import needs
from tunesmith.server.api.routing import Text, call_of, router, shows, whole_call_of
from tunesmith.services import audit, home, users
from tunesmith.services import keys as service

routes = router()
_MOST = 1000  # entries of an answer


@routes.get("/status", dependencies=[needs("read")], **shows(home.Home))
async def status(request: Request) -> Response:
    """What serves, what moves, what waits for whom, and health, for the caller's tenant and region."""
    call = call_of(request)
    if call.serving.project is None:
        return await call.answer(partial(home.home, call.store, call.user.name))
    return await call.answer(partial(home.status, call.project, call.user.name), threads=call.serving.files)


@routes.get("/audit", dependencies=[needs("read")], **shows(audit.AuditLog))
async def audit_log(
    request: Request,
    subject: Text = "",
    action: Text = "",
    search: Text = "",
    before: Annotated[int | None, Query(ge=0, lt=2**62)] = None,
    most: Annotated[int, Query(ge=1, le=_MOST)] = 50,
) -> Response:
    """The newest entries of the audit log that match, oldest first. search: in names, actions, subjects and details.

    before: only entries with a smaller number; total counts the others too.
    """
    call = whole_call_of(request)
    wanted = partial(audit.show_audit, call.store, subject=subject or None, action=action or None, containing=search)
    return await call.answer(partial(wanted, before=before, limit=most))


@routes.get("/users", dependencies=[needs("read")], **shows(users.UserList))
async def everybody(request: Request) -> Response:
    """For an admin of all tenants and regions everybody, for others themselves."""
    call = call_of(request)
    return await call.answer(partial(users.visible_users, call.store, call.user))


@routes.get("/keys", dependencies=[needs("read")], **shows(service.KeyList))
async def keys(request: Request) -> Response:
    """Enrolled and proposed keys: for an admin of all tenants and regions everybody's, for others their own.

    Keys are proposed and confirmed in the console or on the command line, where the log knows who opened the session.
    """
    call = call_of(request)
    return await call.answer(partial(service.visible_keys, call.store, call.user))


@routes.get("/tokens", dependencies=[needs("tokens")], **shows(users.TokenList))
async def tokens(request: Request, user: str | None = None) -> Response:
    """The caller's tokens, and for an admin everybody's. user: only that user's."""
    call = call_of(request)
    return await call.answer(partial(users.visible_tokens, call.store, call.user, user))

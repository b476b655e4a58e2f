"""/api/status, /api/audit, /api/users and /api/keys: what waits for whom, who did what, and who may do what."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.core.scope import Scope
from tunesmith.server.access import needs
from tunesmith.server.api.routing import Name, Short, Text, call_of, changes, router, shows, whole_call_of
from tunesmith.services import audit, home
from tunesmith.services.accounts import people, users
from tunesmith.store.people.roles import Role

routes = router()
Roles = Annotated[tuple[Role, ...], Field(min_length=1, max_length=5)]
_MOST = 1000  # entries of an answer


class UserRequest(BaseModel):
    """A user to add. tenant, region: empty for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    roles: Roles
    tenant: Short = ""
    region: Short = ""


class RolesRequest(BaseModel):
    """The roles that a user has from now on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    roles: Roles


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


@routes.post("/audit/verification", dependencies=[needs("read")], **shows(audit.AuditVerification))
async def verification(request: Request) -> Response:
    """Verify the audit log now: its own digests, signed records and the state that it describes."""
    call = whole_call_of(request)
    return await call.answer(partial(audit.verify_audit, call.store), threads=call.serving.files)


@routes.get("/users", dependencies=[needs("read")], **shows(users.UserList))
async def everybody(request: Request) -> Response:
    """For an admin of all tenants and regions everybody, for others themselves."""
    call = call_of(request)
    return await call.answer(partial(people.visible_users, call.store, call.user))


@routes.get("/keys", dependencies=[needs("read")], **shows(users.KeyList))
async def keys(request: Request) -> Response:
    """Enrolled and proposed keys: for an admin of all tenants and regions everybody's, for others their own.

    Keys are proposed and confirmed in the console or on the command line, where the log knows who opened the session.
    """
    call = call_of(request)
    return await call.answer(partial(people.visible_keys, call.store, call.user))


@routes.post("/users", dependencies=[needs("all")], **changes(users.UserView, UserRequest))
async def add(request: Request) -> Response:
    """Add a user."""
    call = whole_call_of(request, "user.change")
    given = await call.read(UserRequest)
    scope = Scope(given.tenant, given.region)
    act = partial(users.add_user, call.store, given.name, list(given.roles), scope=scope, actor=call.user.name)
    return await call.answer(act)


@routes.post("/users/{name}/roles", dependencies=[needs("all")], **changes(users.UserView, RolesRequest))
async def roles(request: Request, name: Name) -> Response:
    """Replace a user's roles."""
    call = whole_call_of(request, "user.change")
    given = await call.read(RolesRequest)
    return await call.answer(partial(users.set_roles, call.store, name, list(given.roles), **call.by))


@routes.post("/users/{name}/deactivate", dependencies=[needs("all")], **changes(users.UserView))
async def deactivate(request: Request, name: Name) -> Response:
    """Deactivate a user for good: their tokens, sessions, approvals and signatures no longer count."""
    call = whole_call_of(request, "user.change")
    return await call.answer(partial(users.deactivate, call.store, name, **call.by))

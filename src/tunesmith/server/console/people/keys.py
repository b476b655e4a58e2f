"""The page My keys: make a key in the browser, see which ones count; admins confirm the keys of others here."""

from __future__ import annotations

from functools import partial

from fastapi import Request, Response

from tunesmith.server.console.people.session import Changing, Looking, Viewer, field, form
from tunesmith.server.console.routing import gone_to, router
from tunesmith.services.accounts import proposed_keys
from tunesmith.services.accounts.people import is_admin

routes = router()
_PAGE = "/console/keys"


@routes.get(_PAGE)
async def keys(viewer: Looking) -> Response:
    """The person's keys, and for admins those of others that wait."""
    waiting = await viewer.run(partial(proposed_keys.waiting, viewer.store))
    own = [key for key in waiting if key.user == viewer.user.name]
    others = [key for key in waiting if key.user != viewer.user.name] if is_admin(viewer.user) else None
    return viewer.page("keys.html.jinja", own=own, others=others)


@routes.post(_PAGE)
async def propose(request: Request, viewer: Changing) -> Response:
    """Propose a public key whose private half is in the person's browser."""
    public_key = field(await form(request), "public_key")
    await viewer.run(partial(proposed_keys.propose, viewer.store, public_key, **_by(viewer)))
    return gone_to(request, _PAGE)


@routes.post(f"{_PAGE}/confirm")
async def confirm(request: Request, viewer: Changing) -> Response:
    """Let another person's key count, by the fingerprint that they told."""
    user, fingerprint = await _named(request)
    await viewer.run(partial(proposed_keys.confirm, viewer.store, user, fingerprint, **_by(viewer)))
    return gone_to(request, _PAGE)


@routes.post(f"{_PAGE}/reject")
async def reject(request: Request, viewer: Changing) -> Response:
    """End a proposal, the person's own or as an admin."""
    user, fingerprint = await _named(request)
    await viewer.run(partial(proposed_keys.reject, viewer.store, user, fingerprint, actor=viewer.user.name))
    return gone_to(request, _PAGE)


async def _named(request: Request) -> tuple[str, str]:
    fields = await form(request)
    return field(fields, "user"), field(fields, "fingerprint")


def _by(viewer: Viewer) -> dict[str, str]:
    """Who acts, and in which session: its link's maker has a hand in it."""
    return {"actor": viewer.user.name, "session": viewer.session}

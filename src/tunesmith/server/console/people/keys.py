"""The page My keys: which ones count, and those that wait; its forms make, confirm and reject them."""

from __future__ import annotations

from functools import partial

from fastapi import Response

from tunesmith.server.console.people.session import Looking
from tunesmith.server.console.routing import router
from tunesmith.services import keys as service
from tunesmith.services.users import is_admin

routes = router()


@routes.get("/console/keys")
async def keys(viewer: Looking) -> Response:
    """The person's keys, and for admins those of others that wait."""
    waiting = await viewer.run(partial(service.waiting, viewer.store))
    own = [key for key in waiting if key.user == viewer.user.name]
    others = [key for key in waiting if key.user != viewer.user.name] if is_admin(viewer.user) else None
    return viewer.page("keys.html.jinja", own=own, others=others)

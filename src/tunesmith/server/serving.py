"""What the routes share: the parts of a running server, and the authentication of callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastapi import Request

from tunesmith.server.errors import forbidden, unauthorised
from tunesmith.server.intake.draining import Drain
from tunesmith.server.metrics import Metrics
from tunesmith.server.recording import Recorder
from tunesmith.server.routing import Router
from tunesmith.server.settings import ServerSettings
from tunesmith.server.work import Worker
from tunesmith.store.identities import User, authenticate
from tunesmith.store.store import Store


@dataclass(slots=True)
class Serving:
    """One server's parts. checked_at: monotonic time of the controller's last complete check.

    feedback: the one thread that scores feedback. Some scorers take seconds over long texts, and would hold up
    everybody in the threads that all requests share. scoring: the number of calls under way, by user.
    """

    store: Store
    settings: ServerSettings
    metrics: Metrics
    router: Router
    recorder: Recorder
    worker: Worker
    drain: Drain = field(default_factory=Drain)
    checked_at: float = 0.0
    feedback: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tunesmith-feedback"))
    scoring: Counter[str] = field(default_factory=Counter)


def serving_of(request: Request) -> Serving:
    """The server that received a request."""
    found = request.app.state.serving
    assert isinstance(found, Serving)
    return found


async def caller(request: Request) -> tuple[User, Serving]:
    """The caller, by bearer token. Raises ApiError 401 without a valid token, 403 where they may not use models."""
    serving = serving_of(request)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    user = None
    if scheme.lower() == "bearer" and token.strip():
        user = await asyncio.to_thread(authenticate, serving.store, token.strip())
    if user is None:
        raise unauthorised()
    if not user.may("model.use"):
        raise forbidden(f"{user.name} may not use models.")
    return user, serving

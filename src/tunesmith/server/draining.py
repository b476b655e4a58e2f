"""Stopping without losing a request: what happens between SIGTERM and the end of the process.

From the signal on, new requests and those that wait in the queue are answered 503. Requests under way may finish within
`grace_seconds`. Then the rest receive an API error, and the process ends. The listening socket stays open meanwhile, so
that a new connection gets the 503 too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.server.errors import stopping

# Answered while the server drains too, so that it can be watched.
_WATCHED = frozenset({"/healthz", "/readyz", "/metrics"})
# How long the body of a refused request is read. A client that still sends when the connection closes sees a reset.
_DISCARD_SECONDS = 1.0


@dataclass(slots=True)
class Drain:
    """The requests that a server has begun to answer, and whether it takes new ones."""

    begun: bool = False
    under_way: set[asyncio.Task[object]] = field(default_factory=set)

    async def ended(self, until: float) -> None:
        """Wait until every request is answered, or the monotonic time `until` has come."""
        while self.under_way and (left := until - time.monotonic()) > 0:
            await asyncio.wait(self.under_way, timeout=left)


class DrainMiddleware:
    """Counts requests under way, refuses new ones while the server drains, and answers those that it cuts off."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _WATCHED:
            await self._app(scope, receive, send)
        elif self._drain.begun:
            await _discard(receive)
            await stopping().response()(scope, receive, self._closing(send))
        else:
            await self._answer(scope, receive, self._closing(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._drain.under_way.add(task)
        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if not self._drain.begun:
                raise
            task.uncancel()
            if not started:
                await stopping().response()(scope, receive, send)
        finally:
            self._drain.under_way.discard(task)

    def _closing(self, send: Send) -> Send:
        """Close the connection after an answer that leaves while the server drains."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.begun:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        return sending


async def _discard(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass

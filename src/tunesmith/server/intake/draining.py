"""Stopping without losing a request: what happens between SIGTERM and the end of the process.

From the signal on, new requests and those that wait in the queue are answered 503. Requests under way may finish within
`grace_seconds`. Then the rest receive an API error, and the process ends. The listening socket stays open meanwhile, so
that a new connection gets the 503 too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.server.answering.recording import LOG
from tunesmith.server.errors import stopping
from tunesmith.server.intake.connections import BoundedConnection, allow_open_files

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from tunesmith.server.serving import Serving

# Answered while the server drains too, so that it can be watched.
_WATCHED: Final = frozenset({"/healthz", "/readyz", "/metrics"})
# How long the body of a refused request is read. A client that still sends when the connection closes sees a reset.
_DISCARD_SECONDS: Final = 1.0


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


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains its application at the first SIGTERM or SIGINT, and ends at once at the second."""

    def __init__(self, app: FastAPI) -> None:
        self._serving: Serving = app.state.serving
        allow_open_files()
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(BoundedConnection, settings=self._serving.settings),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen. From now on, garbage is looked for only among what requests make: a search through all that
        was loaded until now keeps every request waiting."""
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():  # the process is this server's
            gc.collect()
            gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no new requests from now on. The work that is left is waited for in `shutdown`."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._serving.drain.begun = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the application, then close the sockets."""
        await drain(self._serving)
        await super().shutdown(sockets)


async def drain(serving: Serving) -> None:
    """Refuse new and waiting requests, and wait for those under way. Returns within `grace_seconds`."""
    grace = serving.settings.grace_seconds
    last_words = min(1.0, grace / 10)
    end = time.monotonic() + grace
    serving.drain.begun = True
    serving.awaited.end()
    if under_way := len(serving.drain.under_way):
        LOG.info("stopping: %d requests may take up to %g s; a second signal ends at once", under_way, grace)
    await asyncio.to_thread(serving.worker.stop, grace - last_words)
    if serving.worker.answering():
        LOG.warning("stopping: %d requests took longer than the grace time", serving.worker.answering())
        serving.worker.abandon()
    else:
        await serving.drain.ended(end - last_words)
    await serving.drain.ended(end - last_words / 2)
    for task in serving.drain.under_way:
        task.cancel()
    await serving.drain.ended(end)


async def _discard(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass

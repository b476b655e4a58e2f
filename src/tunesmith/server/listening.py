"""The process that listens, and how it stops: the first SIGTERM drains it (draining.py), a second ends it."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from tunesmith.server.answering.recording import LOG
from tunesmith.server.intake.connections import BoundedConnection, allow_open_files

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from tunesmith.server.serving import Serving


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

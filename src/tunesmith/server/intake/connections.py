"""Connections that cost the server no more than a limited time: clients that send or read slowly, or stop.

uvicorn closes a connection that is silent between two requests. It has no limit for headers that do not come to an end,
for an answer that is not read, or for the number of connections that have sent no request.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.server.limits import ServerSettings

_OPEN_FILES = 65_536


class BoundedConnection(H11Protocol):
    """One connection, within the limits of the server's settings."""

    def __init__(self, *, settings: ServerSettings, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._settings = settings
        self._head: asyncio.TimerHandle | None = None  # runs while a request's headers are awaited
        self._unread: asyncio.TimerHandle | None = None  # runs while the client reads nothing of an answer
        self._since = self.loop.time()

    @property
    def idle(self) -> bool:
        """Whether the connection is open and no request is being answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request. Too many connections that wait cost the oldest of them its place."""
        _send_at_once(transport)
        super().connection_made(_GentleTransport(transport, self, self._settings))  # type: ignore[arg-type]
        self._limit_head()
        idle = [one for one in self.connections if isinstance(one, BoundedConnection) and one.idle]
        if len(idle) > self._settings.idle_connections:
            min(idle, key=lambda one: one._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for clock in (self._head, self._unread):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a piece of a request. After the last answer, what still comes is dropped."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._limit_head()

    def pause_writing(self) -> None:
        """Begin to wait for a client that reads too slowly."""
        super().pause_writing()
        self.limit_unread()

    def resume_writing(self) -> None:
        """The client has read. After the last answer, the rest of it still has to be read in time."""
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
        super().resume_writing()

    def limit_unread(self) -> None:
        """Abort if the client reads nothing of what waits for it for `unread_seconds`, now or later."""
        if self._unread is not None:
            self._unread.cancel()
        unread = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._settings.unread_seconds, self._still_read, unread)

    def _still_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self.limit_unread()
        else:
            self.transport.abort()

    def _limit_head(self) -> None:
        if not self.idle and self._head is not None:
            self._head.cancel()
            self._head = None
        elif self.idle and self._head is None:
            self._since = self.loop.time()
            self._head = self.loop.call_later(self._settings.headers_seconds, self.transport.close)


def _send_at_once(transport: asyncio.Transport) -> None:
    """Send small pieces at once. asyncio does so only where the listening socket names its protocol.

    Without it, an answer's body waits until the client has acknowledged its headers, which takes Linux 40 ms.
    """
    connected = transport.get_extra_info("socket")
    if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _GentleTransport:
    """A transport that closes so that the client can read the last answer.

    Closing a socket that holds unread bytes resets the connection, and the client may then lose the answer, such as a
    413 to a body that is still being sent. So the rest is read and dropped for a limited time (RFC 9112, 9.6).
    """

    def __init__(self, transport: asyncio.Transport, connection: BoundedConnection, settings: ServerSettings) -> None:
        self._transport, self._connection, self._settings = transport, connection, settings
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        if self._connection.conn.their_state in (h11.SEND_BODY, h11.ERROR) and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._connection.loop.call_later(self._settings.body_seconds, self._transport.abort)
        else:
            self._transport.close()
            self._connection.limit_unread()


def allow_open_files() -> None:
    """Let this process open as many files as the system permits it: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""HTTP clients for threads, each for one at a time; and which addresses are of this machine or its network."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    import httpx


class HttpClients:
    """Up to `most` clients that all go to the same servers. Thread-safe.

    Threads do not share one httpx.Client, although httpx allows that. httpcore 1.0.9 looks whether an idle connection
    was closed by its server (`has_expired`) without the connection's lock. Between its two questions another thread may
    send a request on the connection. The answer then looks like a closed connection, which httpcore closes under the
    thread that reads. That thread waits until its time limit, such as 300 s.
    """

    def __init__(self, make: Callable[[], httpx.Client], most: int) -> None:
        """make: called for each new client."""
        self._make = make
        self._places: queue.LifoQueue[httpx.Client | None] = queue.LifoQueue()
        for _ in range(most):
            self._places.put(None)

    @contextlib.contextmanager
    def one(self) -> Iterator[httpx.Client]:
        """A client that no other thread uses meanwhile. Waits where all are in use."""
        client = self._places.get()  # the one used last, whose connection is most likely still open
        try:
            client = client or self._make()
            yield client
        finally:
            self._places.put(client)


def api_key(variable: str | None, where: str) -> str | None:
    """The API key in an environment variable, None where none is named. where: the setting that names it.

    Raises UsageError where the variable is not set, and for a key that does not fit a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"the environment variable {variable} is not set", where=where, fix=f"export {variable}=...")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{variable} does not hold a key that fits a header", where=where)
    return key


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent to a URL: https, or http to this machine. False for any other."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        host = parts.hostname or ""
        return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and _is_here(host)))
    except ValueError:
        return False


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

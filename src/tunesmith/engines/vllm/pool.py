"""Several vLLM servers that answer as one: the least busy one gets a request, and another one if it fails."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.engines.vllm.http import Unavailable
from tunesmith.engines.vllm.model_server import ModelServer

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two checks of a server that failed


class Pool:
    """Shares requests over servers. Thread-safe.

    A request goes to each server at most once, and `restarts` times more, for servers that are started again. A server
    that failed is checked in the background until it may be used again.
    """

    def __init__(self, servers: Sequence[ModelServer], progress: Progress, restarts: int = 0) -> None:
        """Checks all servers. Raises Refused where one runs another model, Unavailable where none can be reached."""
        self._servers, self._progress = servers, progress
        self._tries = len(servers) + restarts
        self._busy = dict.fromkeys(servers, 0)  # requests under way
        self._lock = threading.Lock()
        self._checking = False  # whether a thread checks failed servers
        self._told: dict[ModelServer, str | None] = {}  # each server's problem, as it was last reported
        problem: Unavailable | None = None
        for server in servers:
            try:
                server.check()
            except Unavailable as error:
                self._failed(server, error)
                problem = error
        if problem is not None and not any(server.usable for server in servers):
            raise problem

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together: the shortest of the servers that were checked."""
        return min(server.context_length for server in self._servers if server.context_length)

    def ask(self, body: Mapping[str, Any], adapter: str | None) -> dict[str, Any]:
        """The choice that answers a completion request. adapter: its name on the servers; None for the base."""
        failed: list[ModelServer] = []
        while True:
            with self._chosen(failed) as server:
                try:
                    return server.ask(body, adapter)
                except (Unavailable, Refused) as error:
                    self._failed(server, error)
                    failed.append(server)
                    if len(failed) == self._tries:
                        raise

    def events(self, body: Mapping[str, Any], adapter: str | None) -> Iterator[dict[str, Any]]:
        """The choices of a streamed answer. Only what failed before its first choice is sent to another server."""
        failed: list[ModelServer] = []
        begun = False
        while True:
            with self._chosen(failed) as server:
                try:
                    for choice in server.events(body, adapter):
                        begun = True
                        yield choice
                    return
                except (Unavailable, Refused) as error:
                    self._failed(server, error)
                    failed.append(server)
                    if begun or len(failed) == self._tries:
                        raise

    def load(self, adapter: str, folder: str) -> None:
        """Load an adapter on all servers that can be used; the others load it when a request needs it there."""
        for server in self._servers:
            server.folders[adapter] = folder
        loaded, problem = False, TunesmithError("")
        for server in [each for each in self._servers if each.usable] or self._servers:
            try:
                server.load(adapter)
                loaded = True
            except Unavailable as error:
                self._failed(server, error)
                problem = error
        if not loaded:
            raise problem

    @contextmanager
    def _chosen(self, failed: Sequence[ModelServer]) -> Iterator[ModelServer]:
        """The server for a request: one that can be used, that did not fail it before, with the fewest requests."""
        with self._lock:
            server = min(self._servers, key=lambda one: (not one.usable, one in failed, self._busy[one]))
            self._busy[server] += 1
        try:
            yield server
        finally:
            with self._lock:
                self._busy[server] -= 1

    def _failed(self, server: ModelServer, error: TunesmithError) -> None:
        """Use a server no longer, until a thread has checked it."""
        server.fail()
        if len(self._servers) == 1:
            return  # the next request checks it
        self._tell(server, f"{error.what}; the other servers answer")
        with self._lock:
            start, self._checking = not self._checking, True
        if start:
            threading.Thread(target=_check_again, args=(weakref.ref(self),), daemon=True).start()

    def check_failed(self) -> bool:
        """Check the servers that failed. Returns whether all can be used."""
        for server in self._servers:
            try:
                server.check()
            except TunesmithError as error:
                self._tell(server, f"{error.what}; it is not used")
            else:
                self._tell(server, None)
        with self._lock:
            self._checking = not all(server.usable for server in self._servers)
            return not self._checking

    def _tell(self, server: ModelServer, problem: str | None) -> None:
        """Report a server's problem, or that it has none any more; once."""
        with self._lock:
            before = self._told.get(server)
            self._told[server] = problem
        if problem != before:
            self._progress.say(f"vLLM at {server.url}: {problem or 'it answers again'}")


def _check_again(found: weakref.ref[Pool]) -> None:
    """Check the servers of a pool that failed, until all can be used or the pool is gone."""
    wait = _FIRST_WAIT
    while True:
        time.sleep(wait)
        pool = found()
        if pool is None or pool.check_failed():
            return
        del pool
        wait = min(2 * wait, _LONGEST_WAIT)

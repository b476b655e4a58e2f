"""Requests that stay open while their answers wait for a reviewer."""

from __future__ import annotations

import asyncio
from typing import Any

from tunesmith.holding.queue import decided_among
from tunesmith.store.store import Store


class AwaitedDecisions:
    """The open requests of one server whose answers wait for a reviewer. Used from one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}

    async def wait(self, identifier: str, seconds: float, gone: asyncio.Future[None]) -> bool:
        """Whether an answer was decided on within so many seconds, and before the client left."""
        decided = self._waiting.setdefault(identifier, asyncio.Event())
        told = asyncio.ensure_future(decided.wait())
        try:
            waited: set[asyncio.Future[Any]] = {told, gone}
            await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return told.done()
        finally:
            told.cancel()
            self._waiting.pop(identifier, None)

    async def look(self, store: Store) -> None:
        """Wake the requests whose answers another process, or the deadline, decided on."""
        if self._waiting:
            for identifier in await asyncio.to_thread(decided_among, store, list(self._waiting)):
                self.tell(identifier)

    def tell(self, identifier: str) -> None:
        """Wake the request of an answer that was decided on here."""
        if (waiting := self._waiting.get(identifier)) is not None:
            waiting.set()

    def end(self) -> None:
        """Wake every request, because the server stops."""
        for waiting in self._waiting.values():
            waiting.set()

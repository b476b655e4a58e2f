"""Parts of pages that take long to make and are the same for everybody who may see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(eq=False)
class Shared(Generic[Value]):
    """Values by key, each made once for all who ask within some seconds. Used from one event loop."""

    seconds: float
    _kept: dict[Hashable, tuple[float, asyncio.Future[Value]]] = field(default_factory=dict)

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value of a key. Who asks while it is being made waits for it. What make raises is raised and not kept."""
        self._kept = {each: kept for each, kept in self._kept.items() if self._holds(*kept)}
        if key not in self._kept:
            self._kept[key] = time.monotonic(), asyncio.ensure_future(make())
        return await asyncio.shield(self._kept[key][1])

    def _holds(self, at: float, made: asyncio.Future[Value]) -> bool:
        if not made.done():
            return True
        return not made.cancelled() and made.exception() is None and time.monotonic() - at < self.seconds

"""Tell open pages that something has changed, by server-sent events.

One look at the database a second serves all viewers. An event says what kind of thing changed and nothing of its
content: the page asks for its parts again, as the person who looks at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import StreamingResponse

from tunesmith.server import limits
from tunesmith.server.console.rendering import PRIVATE
from tunesmith.server.console.routing import Looking, Pages, Viewer
from tunesmith.server.errors import ApiError
from tunesmith.server.serving import Serving
from tunesmith.services import home
from tunesmith.store.people import sessions

routes = Pages()
SECONDS = 1.0
_APART = 0.01  # seconds for each open page, over which a change is told
_ALIVE_SECONDS = 20.0  # a comment is sent this often, so that proxies keep the connection
TOPICS = ("state", "jobs", "traffic")


@dataclass(eq=False)
class Changes:
    """What was seen last of each topic, for those who wait. numbers: raised with each change of a topic.

    streams: how many each user has open. sessions: and each session. open: those that were when a change was told.
    """

    serving: Serving
    numbers: list[int] = field(default_factory=lambda: [0] * len(TOPICS))
    waiting: int = 0
    streams: Counter[str] = field(default_factory=Counter)
    sessions: Counter[str] = field(default_factory=Counter)
    open: frozenset[str] = frozenset()
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _task: asyncio.Task[None] | None = None

    async def after(self, numbers: list[int]) -> list[int]:
        """The numbers, once one of them differs from those given or a while has passed."""
        self.waiting += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            # Not asyncio.wait_for: it waits in another task, which kept the lock when this one was cancelled twice.
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ALIVE_SECONDS):
                        await self._changed.wait_for(lambda: self.numbers != numbers)
            return list(self.numbers)
        finally:
            self.waiting -= 1

    async def _watch(self) -> None:
        """Look until nobody has waited for a while."""
        seen: tuple[object, ...] | None = None
        idle = 0
        while idle < _ALIVE_SECONDS:
            idle = 0 if self.waiting else idle + 1
            now = await asyncio.to_thread(home.last_changes, self.serving.store)
            if seen is not None and now != seen:
                # One query for all viewers, and not one for each.
                self.open = await asyncio.to_thread(sessions.open_among, self.serving.store, tuple(+self.sessions))
                async with self._changed:
                    self.numbers = [n + (a != b) for n, a, b in zip(self.numbers, seen, now, strict=True)]
                    self._changed.notify_all()
            seen = now
            if self.serving.drain.begun:
                async with self._changed:
                    self.numbers = [n + 1 for n in self.numbers]
                    self._changed.notify_all()
                return
            await asyncio.sleep(SECONDS)


@routes.get("/console/changes")
async def changes(request: Request, viewer: Looking) -> StreamingResponse:
    """A stream of events: `state`, `jobs` or `traffic`, whenever that has changed."""
    news = changes_of(request, viewer)
    if news.streams[viewer.actor] >= limits.PAGES:
        raise ApiError(429, f"You have {limits.PAGES} pages open: close some.")
    headers = {**PRIVATE, "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(news, viewer), headers=headers, media_type="text/event-stream")


def changes_of(request: Request, viewer: Viewer) -> Changes:
    """What the server of a request has seen change."""
    state = request.app.state
    if not hasattr(state, "changes"):
        state.changes = Changes(viewer.serving)
    news: Changes = state.changes
    return news


async def _events(news: Changes, viewer: Viewer) -> AsyncIterator[str]:
    news.streams[viewer.actor] += 1
    news.sessions[viewer.session] += 1
    try:
        async for event in _told(news, viewer):
            yield event
    finally:
        news.streams[viewer.actor] -= 1
        news.sessions[viewer.session] -= 1


async def _told(news: Changes, viewer: Viewer) -> AsyncIterator[str]:
    known = list(news.numbers)
    yield ": open\n\n"
    while not news.serving.drain.begun:
        now = await news.after(known)
        if now != known:  # viewers fetch their pages again when they hear of it: not all at the same moment
            await asyncio.sleep(random.random() * _APART * news.streams.total())
        told = now != known and viewer.session in news.open
        if not told and not await asyncio.to_thread(sessions.open_among, viewer.store, [viewer.session]):
            return
        changed = [topic for topic, a, b in zip(TOPICS, known, now, strict=True) if a != b]
        known = now
        yield "".join(f"event: {topic}\ndata: changed\n\n" for topic in changed) or ": alive\n\n"

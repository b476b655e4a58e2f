"""A fine-tuning job's events while they come, by server-sent events. OpenAI's API has no such stream.

Each event is one of the list of events, oldest first, with its id; `data: [DONE]` follows the last one of a job that
has ended. So OpenAI's clients read it by the class with which they read streamed answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request
from fastapi.responses import StreamingResponse

from tunesmith.core.errors import TunesmithError
from tunesmith.server.access import bearer, caller
from tunesmith.server.errors import ApiError, stopping, unavailable
from tunesmith.server.serving import Serving
from tunesmith.services import fine_tuning as service
from tunesmith.services import jobs
from tunesmith.services.jobs import LogLine
from tunesmith.store.people.identities import User
from tunesmith.store.tables import JobRow

SECONDS = 1.0  # between two looks at the job
_ALIVE_SECONDS = 20.0  # a comment is sent this often, so that proxies keep the connection
_STREAMS = 16  # of one user at once


def stream(request: Request, job: JobRow, after: int, shown: Callable[[LogLine], str]) -> StreamingResponse:
    """The events of a job with a higher number than `after`, and those that follow until it ends.

    shown: an event as `id:` and `data:` lines. Raises ApiError 429 where the user has too many streams open.
    """
    user, serving = caller(request)
    if serving.streams[user.name] >= _STREAMS:
        raise ApiError(429, f"You have {_STREAMS} streams of events open: close some.", code="rate_limit_exceeded")

    async def counted() -> AsyncIterator[str]:
        serving.streams[user.name] += 1
        try:
            async for text in _told(request, serving, job.id, after, shown):
                yield text
        except (ApiError, TunesmithError) as error:
            said = error if isinstance(error, ApiError) else unavailable()
            yield f"data: {said.document().model_dump_json()}\n\n"
        finally:
            serving.streams[user.name] -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(counted(), media_type="text/event-stream", headers=headers)


async def _told(
    request: Request, serving: Serving, number: int, after: int, shown: Callable[[LogLine], str]
) -> AsyncIterator[str]:
    """What is sent. Raises ApiError once the caller may not read the job any more, and when the server stops."""
    sent = time.monotonic()
    while True:
        user = await _still_caller(request, serving)
        job, lines = await asyncio.to_thread(_look, serving, number, user, after)
        for line in lines:
            yield shown(line)
            after, sent = line.number, time.monotonic()
        if job.ended is not None:
            yield "data: [DONE]\n\n"
            return
        if serving.drain.begun:
            raise stopping()
        if time.monotonic() - sent > _ALIVE_SECONDS:
            yield ": alive\n\n"
            sent = time.monotonic()
        await asyncio.sleep(SECONDS)


async def _still_caller(request: Request, serving: Serving) -> User:
    """The user as they are now. Raises ApiError 401 or 403 where the token has ended or the user may not call."""
    token = bearer(request)
    found = serving.router.known_caller(token)
    if found is None:
        found = await asyncio.to_thread(serving.router.caller, token)
    return found.user


def _look(serving: Serving, number: int, user: User, after: int) -> tuple[JobRow, Sequence[LogLine]]:
    """The job and its new lines, read after it so that an ended job's are whole. Raises ApiError 404 if another's."""
    job = service.find(serving.store, number, user)
    if job is None:
        raise ApiError(404, "The job is not yours any more.", code="fine_tune_not_found")
    return job, jobs.log(serving.store, number, user, after=after).lines

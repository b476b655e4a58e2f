"""Answers that wait for a reviewer, while their request waits too. services/held.py has the reviewer's decision."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.clock import second
from tunesmith.core.errors import TunesmithError
from tunesmith.holding.queue import HeldAnswer, QueueFull, TooManyOfCaller, UnknownAnswer, get, put, response_of
from tunesmith.server.answering.recording import LOG
from tunesmith.server.errors import HeldNotice, answer_held, answer_refused, busy_for_user, not_stored, too_many_held
from tunesmith.server.serving import Serving
from tunesmith.store import database


async def decision_on(answer: HeldAnswer, serving: Serving, gone: asyncio.Future[None]) -> tuple[str, str]:
    """(text, state) of an answer that must wait, once a reviewer let it leave. gone: done once the client left.

    Puts it into the queue. Raises ApiError where the queue or database is full, nobody decided in time, or the answer
    was refused.
    """
    holding = serving.holding
    assert holding is not None
    try:
        deadline = await asyncio.to_thread(put, serving.store, answer, holding, serving.settings.per_user)
    except QueueFull as error:
        serving.metrics.held.labels("full").inc()
        raise too_many_held(holding.at_most) from error
    except TooManyOfCaller as error:
        serving.metrics.held.labels("full").inc()
        raise busy_for_user(serving.settings.per_user, "held answers") from error
    except (TunesmithError, SQLAlchemyError, OSError) as error:
        LOG.error("the answer to request %s could not be held: %s", answer.id, type(error).__name__)  # not its text
        raise not_stored(error) from error
    serving.metrics.held.labels("held").inc()
    notice = HeldNotice(id=answer.id, url=f"/api/held/{answer.id}", deadline=second(deadline))
    if serving.drain.begun or not await serving.awaited.wait(answer.id, holding.wait, gone):
        raise answer_held(notice)

    def read() -> tuple[str, str, str]:
        with database.reading(serving.store.engine) as session:
            row = get(session, answer.id)
            left = response_of(row)
            return "" if left is None else str(row.texts.get("edited", answer.text)), row.state, row.reason

    try:
        text, state, reason = await asyncio.to_thread(read)
    except UnknownAnswer as error:
        raise answer_refused(notice, "its time is over") from error
    if state == "refused":
        raise answer_refused(notice, reason)
    if state == "waiting":
        raise answer_held(notice)
    return text, state

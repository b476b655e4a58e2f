"""Threads for calls that may take seconds, so that one user's calls hold up nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tunesmith.server.errors import busy_for_user
from tunesmith.server.turns import Turns

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Call:
    user: str
    run: Callable[[], Any]
    result: asyncio.Future[Any]


class SharedThreads:
    """Threads on which users take turns (turns.py). Used from one event loop.

    most: calls of one user that wait or run; what: how the refusal of more names them.
    """

    def __init__(self, name: str, threads: int, most: int, what: str) -> None:
        self._threads = ThreadPoolExecutor(threads, f"tunesmith-{name}")
        self._turns: Turns[_Call] = Turns(threads)
        self._most, self._what = most, what

    async def run(self, user: str, call: Callable[[], Result]) -> Result:
        """What the call returns or raises, once it was the user's turn. Raises ApiError 429 for one call too many."""
        if self._turns.held_by(user) >= self._most:
            raise busy_for_user(self._most, self._what)
        one = _Call(user, call, asyncio.get_running_loop().create_future())
        self._turns.add(user, one)
        self._begin()
        try:
            result: Result = await one.result
            return result
        finally:
            self._turns.drop(lambda waiting: waiting is one)

    def stop(self) -> None:
        """Begin no more calls. Those under way end by themselves."""
        self._turns.drop(lambda _waiting: True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        while (one := self._turns.begin()) is not None:
            running = asyncio.get_running_loop().run_in_executor(self._threads, one.run)
            running.add_done_callback(partial(self._ended, one))

    def _ended(self, one: _Call, ran: asyncio.Future[Any]) -> None:
        self._turns.end(one.user)
        error = None if ran.cancelled() else ran.exception()
        if one.result.done() or ran.cancelled():
            one.result.cancel()
        elif error is not None:
            one.result.set_exception(error)
        else:
            one.result.set_result(ran.result())
        self._begin()

"""Whose request begins next: users take turns, and one user's requests never fill all places.

Calls that may take seconds have threads on which users take turns, so that one user's calls hold up nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from tunesmith.server.errors import busy_for_user

Job = TypeVar("Job")
Result = TypeVar("Result")

_KEPT = 8  # of so many places one is kept, but at least one, for users whose jobs fill none


class Turns(Generic[Job]):
    """Jobs that wait for a place, by user, and the number of places that each user fills. Not thread-safe.

    Of the users who wait, the one who fills the fewest places is next, and of equal ones the one whose last turn is the
    longest ago. An eighth of the places is kept for users who fill none: the job of one who comes later begins at once.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: dict[str, deque[Job]] = {}  # in the order of the turns
        self._filled: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def held_by(self, user: str) -> int:
        """How many of the user's jobs wait or have begun."""
        return len(self._waiting.get(user, ())) + self._filled[user]

    def add(self, user: str, job: Job) -> None:
        """Let a job wait."""
        self._waiting.setdefault(user, deque()).append(job)

    def begin(self) -> Job | None:
        """The next job, which fills a place until `end`. None if no job waits whose user may begin one."""
        user = min(self._waiting, key=self._filled.__getitem__, default=None)  # the first of equal ones
        if user is None or not self._may_begin(self._filled[user]):
            return None
        jobs = self._waiting.pop(user)
        job = jobs.popleft()
        if jobs:
            self._waiting[user] = jobs  # behind the others
        self._filled[user] += 1
        return job

    def end(self, user: str) -> None:
        """Free a place that a job of the user filled."""
        self._filled[user] -= 1
        if not self._filled[user]:
            del self._filled[user]

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Forget the waiting jobs for which unwanted is true."""
        if not any(unwanted(job) for jobs in self._waiting.values() for job in jobs):
            return
        kept = {user: deque(job for job in jobs if not unwanted(job)) for user, jobs in self._waiting.items()}
        self._waiting = {user: jobs for user, jobs in kept.items() if jobs}

    def waiting(self) -> list[Job]:
        """The jobs that wait, by user."""
        return [job for jobs in self._waiting.values() for job in jobs]

    def _may_begin(self, filled: int) -> bool:
        free = self._places - self._filled.total()
        return free > (0 if filled == 0 else max(1, self._places // _KEPT))


@dataclass(eq=False, slots=True)
class _Call:
    user: str
    run: Callable[[], Any]
    result: asyncio.Future[Any]


class SharedThreads:
    """Threads on which users take turns. Used from one event loop.

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

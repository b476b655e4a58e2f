"""One request from its acceptance to its record, and the events that its client receives."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.candidates.composing import PromptUsed
from tunesmith.core.messages import ToolCall
from tunesmith.engines.protocol import Completion, Streamed
from tunesmith.holding.queue import decided_among
from tunesmith.models.call_format import CallFormat
from tunesmith.server.answering.request import ChatRequest
from tunesmith.server.answering.routing import Route
from tunesmith.server.errors import ApiError
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store


@dataclass(frozen=True, slots=True)
class HeldCompletion:
    """An answer that must wait for a reviewer. schemas, grammar: what an edited one must fit."""

    completion: Completion
    reasons: tuple[str, ...]
    schemas: tuple[str, ...]
    grammar: str | None


class ToolAnswer:
    """What an answer to a request with tools says: text, and calls of the functions that it offers.

    form: how the base writes calls. names: of the functions that may be called.
    """

    def __init__(self, form: CallFormat, names: frozenset[str]) -> None:
        self._form, self._names = form, names
        self._text, self._sent = "", 0

    def feed(self, piece: str) -> str:
        """The text that is sure to be no call, after the next piece of a streamed answer."""
        self._text += piece
        start, self._sent = self._sent, max(self._sent, self._form.may_begin(self._text))
        return self._text[start : self._sent]

    def end(self, completion: Completion) -> tuple[str, tuple[ToolCall, ...], str]:
        """(text that was not sent yet, calls, finish_reason) of the whole answer."""
        text, calls = self._form.read(completion.text, self._names)
        finish = "tool_calls" if calls and completion.finish == "stop" else completion.finish
        return text[self._sent :], calls, finish


Event = Streamed | HeldCompletion | ApiError


@dataclass(eq=False, slots=True)
class ChatJob:
    """One request while it waits or is answered. route may change from canary to stable, but only before an event.

    token: the caller's, with which user is read again when the request's turn comes.
    events: what the client receives, in order: pieces of text (if it streams), then a Completion, Held or an ApiError.
    most_tokens: the request's own max_tokens where it is lower than the candidate's. sources: the retrieved texts that
    the prompt contains. began, ended: monotonic times at which a thread started to answer it, and at which it was
    recorded with its completion. shaped: its own format or tools rule the answer. answer: reads calls out of the
    answer, where the request offers tools. left: the client no longer waits, so that the engine can stop.
    """

    id: str
    token: str = field(repr=False)
    user: User
    request: ChatRequest
    route: Route
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    accepted: float = field(default_factory=time.monotonic)
    features: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    prompt_used: PromptUsed = "none"
    prompt_tokens: int = 0
    most_tokens: int | None = None
    began: float | None = None
    ended: float | None = None
    completion: Completion | None = None
    shaped: bool = False
    answer: ToolAnswer | None = None
    left: bool = False
    _claim: threading.Lock = field(default_factory=threading.Lock)

    def leave(self) -> None:
        """Note that the client no longer waits, so that the engine can stop."""
        self.left = True

    def claim(self) -> bool:
        """True for the first caller only, which must then record the request."""
        return self._claim.acquire(blocking=False)

    def send(self, event: Event) -> None:
        """Pass an event to the client's coroutine. May be called from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has stopped
            self.leave()

    def cut(self, completion: Completion) -> bool:
        """Whether the request's own max_tokens, stop text, format or tools shaped the answer.

        Then it says nothing about the version, so it is not scored.
        """
        most = self.most_tokens
        reached = most is not None and completion.finish == "length" and completion.completion_tokens >= most
        return self.shaped or reached or completion.by_stop_text


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
        for identifier in self._waiting:
            self.tell(identifier)

"""The one thread that talks to the engine, and the bounded queue before it.

Waiting requests of one version that do not stream are answered as one batch. Each request that was begun is recorded
exactly once, before its last word leaves: by this thread, or, where the engine hangs, by whoever gave up waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tunesmith.candidates.answering import Answerer
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.inference.engine import Completion, Generation
from tunesmith.monitoring.features import request_features
from tunesmith.server.chat_request import ChatRequest
from tunesmith.server.errors import ApiError, bad_request, busy, failed, not_available, stopping
from tunesmith.server.recording import LOG, Recorder, Served
from tunesmith.server.routing import ReadyVersions, Route
from tunesmith.server.settings import ServerSettings
from tunesmith.store.identities import User

Event = str | Completion | ApiError


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way. route may change from canary to stable before the first event, never after.

    events: what the client is to see, in order: pieces of text (of a stream), then a Completion or an ApiError.
    sources: what the answer was looked up in.
    """

    id: str
    user: User
    request: ChatRequest
    route: Route
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    accepted: float = field(default_factory=time.monotonic)
    features: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    prompt_tokens: int = 0
    begun: bool = False
    _left: threading.Event = field(default_factory=threading.Event)
    _claim: threading.Lock = field(default_factory=threading.Lock)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._left.set()

    @property
    def left(self) -> bool:
        """Whether its client is gone."""
        return self._left.is_set()

    def claim(self) -> bool:
        """True for the first who asks: they record it."""
        return self._claim.acquire(blocking=False)

    def send(self, event: Event) -> None:
        """Hand an event to the client's coroutine, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has stopped and nobody listens
            self.leave()

    def served(self, completion: Completion | None, *, whole: bool = True) -> Served:
        """Its record."""
        return Served(
            id=self.id,
            user=self.user,
            route=self.route,
            seconds=time.monotonic() - self.accepted,
            features=self.features,
            completion=completion,
            whole=whole,
            messages=self.request.conversation,
        )


class Worker:
    """Runs jobs one batch at a time. give_up: (rollout, reason), called where a canary cannot be made ready."""

    def __init__(
        self,
        versions: ReadyVersions,
        recorder: Recorder,
        settings: ServerSettings,
        give_up: Callable[[int, str], object],
    ) -> None:
        self._versions, self._recorder = versions, recorder
        self._settings, self._give_up = settings, give_up
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Answer what waits with 503 and let the batch under way end, for so long at most."""
        with self._change:
            self._stopping = True
            waiting, self._waiting = self._waiting, deque()
            self._change.notify_all()
        for job in waiting:
            job.send(stopping())
        self._thread.join(seconds)

    def submit(self, job: Job) -> None:
        """Let a job wait its turn. Raises ApiError 429 where too many wait."""
        with self._change:
            if self._stopping:
                raise stopping()
            if len(self._waiting) >= self._settings.waiting:
                raise busy()
            self._waiting.append(job)
            self._change.notify_all()

    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def hanging(self) -> bool:
        """Whether the batch under way has taken longer than any answer may, or the thread is gone."""
        since = self._busy_since
        late = since is not None and time.monotonic() - since > self._settings.answer_seconds
        return late or not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            batch = self._next()
            if not batch:
                return
            self._busy_since = time.monotonic()
            try:
                self._answer(batch)
            except Exception:  # noqa: BLE001 - whatever it was, the next batch must be answered
                LOG.exception("the engine's thread met an error that no request accounts for")
                for job in batch:
                    self._fail(job, failed())
            self._busy_since = None

    def _next(self) -> list[Job]:
        """The oldest job, and of the others those that can be answered with it. Empty when the server stops."""
        with self._change:
            while not self._waiting:
                if self._stopping:
                    return []
                self._change.wait()
            first = self._waiting.popleft()
            batch = [first]
            if not first.request.stream:
                self._gather()
                alike = [job for job in self._waiting if _together(first, job)][: self._settings.batch - 1]
                for job in alike:
                    self._waiting.remove(job)
                batch += alike
        return batch

    def _gather(self) -> None:
        """Wait a moment for company: those who were just answered together ask again together, a little apart."""
        until = time.monotonic() + self._settings.gather_seconds
        while (left := until - time.monotonic()) > 0 and not self._stopping:
            if len(self._waiting) + 1 >= self._settings.batch:
                return
            self._change.wait(left)

    def _answer(self, batch: Sequence[Job]) -> None:
        ready: list[tuple[Job, Answerer, Generation]] = []
        for job in batch:
            if job.left:
                continue
            job.begun = True
            try:
                answerer = self._ready(job)
                ready.append((job, answerer, self._generation(job, answerer)))
            except ApiError as error:
                self._refuse(job, error)
            except Exception:  # noqa: BLE001 - tokeniser, index or engine: this request alone fails
                LOG.exception("request %s could not be prepared", job.id)
                self._fail(job, failed())
        if batch[0].request.stream:
            for job, answerer, generation in ready:
                self._stream(job, answerer, generation)
            return
        by_answerer: dict[Answerer, list[tuple[Job, Generation]]] = {}
        for job, answerer, generation in ready:
            by_answerer.setdefault(answerer, []).append((job, generation))
        for answerer, asked in by_answerer.items():
            self._generate(asked, answerer)

    def _ready(self, job: Job) -> Answerer:
        """The route's answerer; a canary that cannot be made ready ends its rollout, and stable answers."""
        route = job.route
        try:
            return self._versions.answerer(route.version)
        except (TunesmithError, OSError) as error:
            LOG.exception("%s could not be made ready", route.version.label)
            if route.stable is None or route.rollout is None:
                raise not_available(job.request.model, f"{route.version.label} could not be loaded") from error
            what = error.what if isinstance(error, TunesmithError) else str(error)
            self._give_up(route.rollout, f"the canary could not be loaded: {what}")
            job.route = replace(route, version=route.stable, arm="stable", stable=None)
            return self._ready(job)

    def _generation(self, job: Job, answerer: Answerer) -> Generation:
        """What the engine is asked. Raises ApiError 400 for a prompt that leaves no room for an answer."""
        request = job.request
        messages = request.conversation
        try:
            job.features = request_features(messages, answerer.nearest)
        except UsageError:  # the candidate names no dataset
            job.features = request_features(messages, None)
        try:
            generation = answerer.generation(
                messages,
                max_tokens=request.max_completion_tokens or request.max_tokens,
                temperature=request.temperature or 0.0,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=request.seed or 0,
                stop=request.stops,
            )
            job.sources = answerer.sources(messages).sources
            tokens = job.prompt_tokens = answerer.responder.count_tokens(generation.messages)
        except UsageError as error:
            raise bad_request(error.what, "messages") from error
        room = answerer.responder.context_length
        if tokens >= room:
            raise bad_request(
                f"This model's maximum context length is {room} tokens, but the prompt, with "
                f"what the released behaviour puts before it, has {tokens} and leaves no room for an answer.",
                "messages",
                code="context_length_exceeded",
            )
        return generation

    def _generate(self, asked: Sequence[tuple[Job, Generation]], answerer: Answerer) -> None:
        try:
            completions = answerer.responder.generate([generation for _, generation in asked], answerer.adapter)
        except Exception:  # noqa: BLE001 - the engine may raise anything; one request must not fail the others
            if len(asked) == 1:
                LOG.exception("the engine failed on request %s", asked[0][0].id)
                self._fail(asked[0][0], failed())
                return
            for one in asked:
                self._generate([one], answerer)
            return
        done = [(job, completion) for (job, _), completion in zip(asked, completions, strict=True) if job.claim()]
        self._recorder.write([job.served(completion) for job, completion in done])
        for job, completion in done:
            job.send(completion)

    def _stream(self, job: Job, answerer: Answerer, generation: Generation) -> None:
        pieces: list[str] = []
        try:
            for event in answerer.responder.stream(generation, answerer.adapter):
                if isinstance(event, Completion):
                    if job.claim():
                        self._recorder.write([job.served(event)])
                        job.send(event)
                    return
                pieces.append(event)
                job.send(event)
                if job.left:
                    break
        except Exception:  # noqa: BLE001 - as above
            LOG.exception("the engine failed on request %s", job.id)
            self._fail(job, failed())
            return
        if job.left and job.claim():
            # How many tokens a piece is, only the engine knows: one at least.
            seen = Completion("".join(pieces), "stop", job.prompt_tokens, len(pieces))
            self._recorder.write([job.served(seen, whole=False)])
        elif not job.left:
            LOG.error("the engine ended the stream of request %s without a completion", job.id)
            self._fail(job, failed())

    def _fail(self, job: Job, error: ApiError) -> None:
        if job.claim():
            self._recorder.write([job.served(None)])
            job.send(error)

    def _refuse(self, job: Job, error: ApiError) -> None:
        """The request's own fault, or a version's that nobody should count as an arm's failure."""
        if job.claim():
            job.send(error)


def _together(first: Job, other: Job) -> bool:
    return not other.request.stream and other.route.version.digest == first.route.version.digest

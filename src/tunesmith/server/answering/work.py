"""The threads that send requests to the engine, and the bounded queue in front of them.

Each thread answers one request at a time. Users take turns, so that no caller keeps the others waiting (turns.py). The
engine decodes the requests of all threads as one batch, so a request joins the batch as soon as a thread is free.

Each request that a thread started is recorded exactly once, before the end of its answer is sent. Its thread records
it, or, if the engine hangs, the coroutine that waited for it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from tunesmith.candidates.answering import Answerer, NeedsGrammars, OtherBase
from tunesmith.candidates.composing import prompt_used
from tunesmith.core.access import Caller
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message, tools_of
from tunesmith.core.text.names import Scope
from tunesmith.engines.protocol import Completion, Generation, Scored
from tunesmith.holding.rules import Holder
from tunesmith.models.call_format import CallFormat
from tunesmith.monitoring.drift import request_features
from tunesmith.server.answering.job import ChatJob, Event, HeldCompletion, ToolAnswer
from tunesmith.server.answering.recording import LOG, Recorder
from tunesmith.server.answering.request import ChatRequest
from tunesmith.server.answering.routing import ReadyVersions, Router, TriedLately, load_may_pass
from tunesmith.server.errors import (
    INVALID_SCHEMA,
    ApiError,
    bad_request,
    busy,
    busy_for_user,
    failed,
    not_available,
    passes,
    stopping,
    unavailable,
)
from tunesmith.server.limits import ServerSettings
from tunesmith.server.turns import Turns

_CHARACTERS_A_TOKEN = 4  # a request with more has hardly ever so few tokens that it fits the context

# Why a version cannot be loaded here, as callers read it.
_NOT_HERE: Mapping[type[BaseException], str] = {
    OtherBase: "was made from another base than this server's",
    NeedsGrammars: "holds its answers to a grammar, which this server's engine cannot follow",
}


class Prompts(Protocol):
    """What the server needs of the base's Renderer."""

    @property
    def call_format(self) -> CallFormat:
        """How answers call functions. Raises Refused where the base's template does not know tools."""
        ...

    def count_prompt(self, messages: Sequence[Message], most: int | None = None) -> int:
        """Tokens of a prompt under the base's chat template; where there are more than most, some number above it."""
        ...


class AnsweringThreads:
    """Answers up to settings.together jobs at once.

    router: checks a job's caller and chooses its version once more when its turn comes, since both may have changed.
    give_up: called with (rollout, reason) if a canary can never be loaded. prompts: the Renderer of each base, by
    digest. holder: says which answers wait for a reviewer; None: none does.
    """

    def __init__(
        self,
        versions: ReadyVersions,
        router: Router,
        recorder: Recorder,
        settings: ServerSettings,
        give_up: Callable[[int, str], object],
        prompts: Mapping[str, Prompts],
        holder: Holder | None = None,
    ) -> None:
        self._prompts, self._holder = prompts, holder
        self._versions, self._router, self._recorder = versions, router, recorder
        self._settings, self._give_up = settings, give_up
        self._turns: Turns[ChatJob] = Turns(settings.together)
        self._change = threading.Condition()
        self._stopping = False
        self._busy_since: dict[ChatJob, float] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"tunesmith-asking-{number}", daemon=True)
            for number in range(settings.together)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> None:
        """Answer waiting jobs with 503, and wait up to this many seconds for those that have begun."""
        with self._change:
            self._stopping = True
            waiting = self._turns.waiting()
            self._turns.drop(waiting.__contains__)
            self._change.notify_all()
        for job in waiting:
            job.send(stopping())
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def abandon(self) -> None:
        """Answer the jobs that have begun with 503, and let the engine stop."""
        for job in list(self._busy_since):
            self._refuse(job, stopping())
            job.leave()

    def answering(self) -> int:
        """The number of jobs that have begun."""
        return len(self._busy_since)

    def submit(self, job: ChatJob) -> None:
        """Add a job to the queue. Raises ApiError 429 if the queue or the user's share of it is full, 503 if the server
        stops."""
        with self._change:
            if self._stopping:
                raise stopping()
            if self._full(job.user.name) is not None:
                self._turns.drop(lambda waiting: waiting.left)  # who left no longer waits
            if (full := self._full(job.user.name)) is not None:
                raise full
            self._turns.add(job.user.name, job)
            self._change.notify()  # one thread: to wake all of them for each request took most of the server's time

    def _full(self, user: str) -> ApiError | None:
        """The error for one more request of a user; None where there is room."""
        if self._turns.held_by(user) >= self._settings.per_user:
            return busy_for_user(self._settings.per_user)
        return busy() if len(self._turns) >= self._settings.waiting else None

    def held_by(self, user: str) -> int:
        """How many of the user's requests wait or are answered."""
        with self._change:
            self._turns.drop(lambda waiting: waiting.left)
            return self._turns.held_by(user)

    def waiting(self) -> int:
        """The number of jobs in the queue."""
        with self._change:
            return len(self._turns)

    def hanging(self) -> bool:
        """Whether a job has run for longer than answer_seconds, or a thread has died."""
        begun = min(list(self._busy_since.values()), default=None)
        late = begun is not None and time.monotonic() - begun > self._settings.answer_seconds
        return late or not all(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._change:
                while (job := self._turns.begin()) is None:
                    if self._stopping:
                        return
                    self._change.wait()
            self._busy_since[job] = time.monotonic()
            try:
                self._answer(job)
            except Exception:  # noqa: BLE001 - no error may keep the thread from the next job
                LOG.exception("request %s raised an unexpected error", job.id)
                self._fail(job)
            finally:
                del self._busy_since[job]
                with self._change:  # the place that is free now is this thread's, which takes the next job
                    self._turns.end(job.user.name)

    def _answer(self, job: ChatJob) -> None:
        if job.left:
            return
        job.began = time.monotonic()
        try:
            self._look_again(job)
            answerer = self._ready(job)
            generation = self._generation(job, answerer)
            self._decode(job, answerer, generation)
        except ApiError as error:
            self._refuse(job, error)
        except Exception as error:  # noqa: BLE001 - tokeniser, index or engine: this request alone fails
            if (own := _own_fault(error)) is not None:
                self._refuse(job, own)
                return
            LOG.exception("the engine failed on request %s", job.id)
            self._fail(job)

    def _look_again(self, job: ChatJob) -> None:
        """Read the caller and choose the version once more. Raises ApiError, 503 where the database is away."""
        try:
            job.user = self._router.caller(job.token).user
            job.route = self._router.route(job.user, job.request.model, job.request.user or job.id)
        except TunesmithError as error:
            if not passes(error):
                raise
            LOG.exception("request %s: its caller and version could not be read", job.id)
            raise unavailable() from error  # no arm's failure

    def _ready(self, job: ChatJob) -> Answerer:
        """The answerer of the job's version; stable's if a canary cannot be loaded.

        That ends the rollout, unless the error may pass by itself, so that a later request tries the canary again, or
        unless another server can load it.
        """
        route = job.route
        try:
            return self._versions.answerer(route.version)
        except (TunesmithError, OSError) as error:
            if not isinstance(error, TriedLately):  # the request that tried has logged the error
                LOG.exception("%s could not be loaded", route.version.label)
            if route.stable is None or route.rollout is None:
                if load_may_pass(error):
                    raise unavailable() from error
                why = _NOT_HERE.get(type(error), "could not be loaded")
                raise not_available(job.request.model, f"{route.version.label} {why}") from error
            if isinstance(error, TunesmithError) and not load_may_pass(error) and type(error) not in _NOT_HERE:
                self._give_up(route.rollout, f"the canary could not be loaded: {error.what}")
            job.route = replace(route, version=route.stable, arm="stable", stable=None, unloaded=True)
            return self._ready(job)

    def _generation(self, job: ChatJob, answerer: Answerer) -> Generation:
        """The engine's input. Raises ApiError 400 for a prompt that leaves no room for an answer."""
        request = job.request
        messages = request.conversation
        caller = Caller(Scope(job.user.tenant, self._settings.region), frozenset(job.user.groups))
        room = answerer.responder.context_length
        letters = sum(len(text) for message in messages for text in message.texts())
        if answerer.candidate.asks_base and letters > _CHARACTERS_A_TOKEN * room:
            self._require_room(answerer, messages)  # before anything else reads so much text
        scored = request.scored
        if scored is None and answerer.candidate.asks_base and self._holder is not None and self._holder.needs_scores:
            scored = 0
        generation = answerer.generation(
            messages,
            caller,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            schema=request.answer_schema,
        )
        generation = replace(
            generation,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed or 0,
            stop=request.stops,
            top_logprobs=scored,
        )
        job.shaped = generation.constrained_by == "response_format.json_schema"
        if request.offered:
            generation = self._with_calls(job, answerer, generation)
        if generation.max_tokens < answerer.candidate.max_tokens:
            job.most_tokens = generation.max_tokens
        job.prompt_tokens = self._require_room(answerer, generation.messages) if answerer.candidate.asks_base else 0
        job.sources = answerer.composer.retrieved(messages, caller).sources
        job.prompt_used = prompt_used(answerer.candidate, messages)
        try:
            job.features = request_features(messages, answerer.composer.nearest)
        except UsageError:  # the candidate has no dataset to compare the request with
            job.features = request_features(messages, None)
        if request.offered:  # nobody measured the version with these, unless its rows had them
            job.features = {**job.features, "tools": float(len(request.offered))}
        return generation

    def _with_calls(self, job: ChatJob, answerer: Answerer, generation: Generation) -> Generation:
        """The engine's input for a request that offers tools. Raises ApiError 400 where the base does not know them."""
        answerer.require_calls()
        try:
            form = self._prompts[answerer.candidate.base].call_format
        except Refused as error:
            raise bad_request(f"{error.what} ({error.fix})", "tools") from error
        job.shaped, job.answer = True, ToolAnswer(form, frozenset(each.name for each in job.request.callable))
        grammar = job.request.grammar_of_calls(form)
        return generation if grammar is None else replace(generation, grammar=grammar, constrained_by="tools")

    def _require_room(self, answerer: Answerer, messages: Sequence[Message]) -> int:
        """The prompt's tokens. Raises ApiError 400 where they leave no room for an answer."""
        room = answerer.responder.context_length
        try:
            tokens = self._prompts[answerer.candidate.base].count_prompt(messages, room)
        except Refused as error:
            brought = any(each.tools or each.tool_calls or each.role == "tool" for each in messages)
            if error.where != "chat_template" or not brought:
                raise
            raise bad_request(error.what, "tools" if tools_of(messages) else "messages") from error
        if tokens < room:
            return tokens
        raise bad_request(
            f"This model's maximum context length is {room} tokens. The prompt has {tokens} or more, including what "
            "the released version adds to it, and leaves no room for an answer.",
            "messages",
            code="context_length_exceeded",
        )

    def _decode(self, job: ChatJob, answerer: Answerer, generation: Generation) -> None:
        # Streamed in any case, so that decoding stops at the next token when the client leaves.
        streams = bool(job.request.stream) and self._holder is None
        sent, decoded = list[str](), 0
        for event in answerer.responder.stream(generation, answerer.candidate.training):
            if job.left and not sent:
                break
            if isinstance(event, Completion):
                last = self._held(job, generation, event) or event
                if job.claim():
                    if job.request.stream and not streams and isinstance(last, Completion) and event.text:
                        scored = job.request.scored is not None and event.scores
                        job.send(Scored(event.text, event.scores) if scored else event.text)
                    self._end(job, event, last)
                return
            decoded += 1
            if streams:
                sent.append(event.text if isinstance(event, Scored) else event)
                job.send(event)
                if job.left:
                    break
        if job.left:
            self._note_left(job, "".join(sent), decoded)
        else:
            LOG.error("the engine ended the stream of request %s without a completion", job.id)
            self._fail(job)

    def _held(self, job: ChatJob, generation: Generation, answer: Completion) -> HeldCompletion | None:
        """The answer as one that waits for a reviewer; None if it may leave."""
        if self._holder is None or not (reasons := self._holder.reasons(answer)):
            return None
        if job.request.offered:  # the grammar is of calls, and an edited answer is text
            return HeldCompletion(answer, reasons, (), None)
        own = None if job.shaped else self._holder.schema
        schemas = dict.fromkeys(schema for schema in (generation.schema, own) if schema is not None)
        return HeldCompletion(answer, reasons, tuple(schemas), generation.grammar)

    def _note_left(self, job: ChatJob, text: str, tokens: int) -> None:
        """Record a request whose client left. text: what it may have seen; tokens: at least so many were decoded."""
        if job.claim():  # only the engine knows the number of tokens in a piece
            self._recorder.write(job, Completion(text, "stop", job.prompt_tokens, tokens), whole=False)

    def _fail(self, job: ChatJob) -> None:
        if job.claim():
            self._end(job, None, failed())

    def _end(self, job: ChatJob, completion: Completion | None, event: Event) -> None:
        """Record a claimed request, then send its last event, which an error of the record must not withhold."""
        try:
            self._recorder.write(job, completion, partial(job.send, event))
        except BaseException:
            job.send(event)
            raise

    def _refuse(self, job: ChatJob, error: ApiError) -> None:
        """Send an error that is not the arm's failure, so the request is not recorded."""
        if job.claim():
            job.send(error)


def _own_fault(error: Exception) -> ApiError | None:
    """The answer to an error that the request caused, whichever version answers it: it counts against no arm.

    None for every other error, such as one of the version's schema.
    """
    field = re.match(r"\w+", error.where or "") if isinstance(error, UsageError) else None
    if field is None or field[0] not in ChatRequest.model_fields:
        return None
    assert isinstance(error, UsageError)
    if not str(error.where).startswith(("response_format", "tool")):
        return bad_request(error.what, error.where)
    code = INVALID_SCHEMA if error.where == "response_format.json_schema" else "invalid_value"
    return bad_request(f"{error.what} ({error.fix})" if error.fix else error.what, error.where, code=code)

"""/v1/models and /v1/chat/completions, compatible with OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from tunesmith.core.clock import now
from tunesmith.core.digests import short
from tunesmith.core.messages import ToolCall
from tunesmith.core.scope import Scope
from tunesmith.engines.protocol import Completion, Scored, TokenScore
from tunesmith.holding.queue import HeldAnswer
from tunesmith.registry.versions import Version
from tunesmith.server.access import PlainRoute, bearer, caller, needs
from tunesmith.server.answering.job import ChatJob, Event, HeldCompletion
from tunesmith.server.answering.request import ChatRequest
from tunesmith.server.chat.answer import (
    Alternative,
    AnswerCall,
    AnswerMessage,
    ApiObject,
    CalledFunction,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    DeltaCall,
    Logprobs,
    Model,
    ModelList,
    TokenLogprob,
    Usage,
)
from tunesmith.server.chat.held import decision_on
from tunesmith.server.errors import ApiError, no_such_model, timed_out
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.server.serving import CHAT_JOB, Serving

ID_PREFIX = "chatcmpl-"
_CHUNK: Final = "chat.completion.chunk"

routes = APIRouter(prefix="/v1", dependencies=[needs("chat")])
answering = APIRouter(prefix="/v1", dependencies=[needs("chat")], route_class=PlainRoute)


@routes.get("/models", response_model=ModelList, responses=errors(401, 403, 429), openapi_extra=BEARER)
async def models(request: Request) -> Response:
    """The models that the caller may use now."""
    user, serving = caller(request)
    found = await serving.listing.run(user.name, partial(serving.router.models, user))
    return _answer(ModelList(object="list", data=[_model(name, version) for name, version in found]))


@routes.get("/models/{model:path}", response_model=Model, responses=errors(401, 403, 404, 429), openapi_extra=BEARER)
async def model(request: Request, model: str) -> Response:
    """One of the models that the caller may use now."""
    user, serving = caller(request)
    for name, version in await serving.listing.run(user.name, partial(serving.router.models, user)):
        if name == model:
            return _answer(_model(name, version))
    raise no_such_model(model)


@answering.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **errors(400, 401, 403, 404, 408, 413, 429, 500, 503, 504),
    },
    openapi_extra=body(ChatRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or, with `stream`, as server-sent events of chat.completion.chunk objects."""
    user, serving = caller(request)
    with serving.arrives(user) as count:
        given = await read_body(request, ChatRequest, serving.settings, count, nul=True)
        identifier = uuid.uuid4().hex
        asked = (user, given.model, given.user or identifier)
        route = serving.router.known_route(*asked)
        if route is None:
            route = await asyncio.to_thread(serving.router.route, *asked)
        job = ChatJob(id=identifier, token=bearer(request), user=user, request=given, route=route)
        request.scope[CHAT_JOB] = job
        serving.worker.submit(job)
    try:
        first = await _first_event(job, request, serving)
        if isinstance(first, ApiError):
            raise first
    except BaseException:
        job.leave()
        raise
    build = _ResponseBuilder(job)
    headers = build.headers()
    if given.store and not serving.recorder.keeps:  # OpenAI's clients may send it always
        headers["x-tunesmith-store"] = "no"
    if isinstance(first, HeldCompletion):
        first, state = await _reviewed(job, build, first, request, serving)
        headers["x-tunesmith-review"] = state
    if isinstance(first, Completion) and not given.stream:
        return _answer(build.whole(first), headers)
    return StreamingResponse(_chunks(job, build, first, serving), media_type="text/event-stream", headers=headers)


async def _reviewed(
    job: ChatJob, build: _ResponseBuilder, held: HeldCompletion, request: Request, serving: Serving
) -> tuple[Event, str]:
    """The first event of an answer that a reviewer let leave, and the decision. Raises ApiError for other answers."""
    entry = HeldAnswer(
        id=job.id,
        name=job.route.name,
        version=job.route.version.digest,
        scope=Scope(job.user.tenant, serving.settings.region),
        caller=job.user.name,
        reasons=held.reasons,
        messages=job.request.conversation,
        text=held.completion.text,
        response=json.loads(build.whole(held.completion).json_text()),
        schemas=held.schemas,
        grammar=held.grammar,
    )
    gone = asyncio.ensure_future(_gone(request))
    try:
        answer, state = await decision_on(entry, serving, gone)
    finally:
        gone.cancel()
    await asyncio.to_thread(serving.router.caller, job.token)  # who was shut out meanwhile gets no answer
    completion = held.completion
    if state == "replaced":
        completion = replace(completion, text=answer, finish="stop", scores=())
        job.answer = None  # an edited answer calls no function
        build.scored = False
    if not job.request.stream:
        return completion, state
    job.events.put_nowait(completion)
    scores = completion.scores if job.request.logprobs else ()
    return (Scored(completion.text, scores) if scores else completion.text), state


async def _first_event(job: ChatJob, request: Request, serving: Serving) -> Event:
    """The job's first event, or an ApiError if the client left or the time is over."""
    leaving = asyncio.ensure_future(_leaving(job, request))
    try:
        async with asyncio.timeout(serving.settings.answer_seconds):
            return await job.events.get()
    except TimeoutError:
        return await _give_up_waiting(job, serving)
    finally:
        leaving.cancel()


async def _leaving(job: ChatJob, request: Request) -> None:
    await _gone(request)
    job.leave()
    job.events.put_nowait(ApiError(499, "The client left.", code="client_left"))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _give_up_waiting(job: ChatJob, serving: Serving) -> ApiError:
    """The error for a request without an answer in time. If it had begun, it is recorded as failed."""
    first = job.claim()  # before the engine hears of it, whose thread would record that the client left
    job.leave()
    if first and job.began is not None:
        await asyncio.to_thread(serving.recorder.write, job.served(None))
    return timed_out()


async def _chunks(job: ChatJob, build: _ResponseBuilder, first: Event, serving: Serving) -> AsyncIterator[str]:
    event = first
    try:
        yield build.chunk(Delta(role="assistant", content="", refusal=None))
        while True:
            if isinstance(event, str):
                if text := event if job.answer is None else job.answer.feed(event):
                    yield build.chunk(Delta(content=text))
            elif isinstance(event, Scored):
                yield build.chunk(Delta(content=event.text), scores=event.scores)
            elif isinstance(event, Completion):
                for chunk in build.ending(event):
                    yield chunk
                if job.request.include_usage:
                    yield build.usage_chunk(event)
                yield "data: [DONE]\n\n"
                return
            else:
                assert isinstance(event, ApiError)
                yield _event(event.document().model_dump_json())
                return
            try:
                async with asyncio.timeout(serving.settings.answer_seconds - (time.monotonic() - job.accepted)):
                    event = await job.events.get()
            except TimeoutError:
                event = await _give_up_waiting(job, serving)
    finally:
        # Also reached when the client leaves: the engine then stops at its next token.
        job.leave()


class _ResponseBuilder:
    """Builds the response objects of one job. scored: with the log-probabilities of the answer's tokens."""

    def __init__(self, job: ChatJob) -> None:
        self._job, self._version = job, job.route.version
        self.scored = bool(job.request.logprobs)
        self._common: dict[str, Any] = {
            "id": ID_PREFIX + job.id,
            "created": int(now().timestamp()),
            "model": self._version.label,
            "system_fingerprint": short(self._version.digest),
        }

    def headers(self) -> dict[str, str]:
        """The response headers: the version, its arm, and the retrieved sources (percent-encoded names)."""
        headers = {
            "x-request-id": self._job.id,
            "x-tunesmith-version": self._version.label,
            "x-tunesmith-arm": self._job.route.arm,
            "x-tunesmith-system-prompt": self._job.prompt_used,
        }
        if self._job.sources:
            headers["x-tunesmith-sources"] = ", ".join(quote(source, safe="/") for source in self._job.sources)
        return headers

    def whole(self, completion: Completion) -> ChatCompletion:
        """The answer as one object."""
        scores = completion.scores if self.scored else None
        text, calls, finish = self._said(completion)
        more: dict[str, Any] = {"tool_calls": [AnswerCall(**_call(call)) for call in calls]} if calls else {}
        content = None if calls and not text else text
        message = AnswerMessage(role="assistant", content=content, refusal=None, **more)
        choice = Choice(index=0, message=message, logprobs=_logprobs(scores), finish_reason=finish)
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[choice],
            usage=_usage(completion),
            **self._metadata(),
        )

    def chunk(self, delta: Delta, finish: str | None = None, scores: Sequence[TokenScore] | None = None) -> str:
        """A chunk as a server-sent event. The last one has the request's metadata."""
        choice = ChunkChoice(index=0, delta=delta, logprobs=_logprobs(scores), finish_reason=finish)
        more: dict[str, Any] = {"usage": None} if self._job.request.include_usage else {}
        more |= self._metadata() if finish else {}
        return _event(ChatCompletionChunk(**self._common, object=_CHUNK, choices=[choice], **more).json_text())

    def ending(self, completion: Completion) -> Iterator[str]:
        """The chunks that end a streamed answer: withheld text, each call whole, and the reason why it ends."""
        text, calls, finish = self._said(completion)
        if text and self._job.answer is not None:
            yield self.chunk(Delta(content=text))
        for place, call in enumerate(calls):
            yield self.chunk(Delta(tool_calls=[DeltaCall(index=place, **_call(call))]))
        yield self.chunk(Delta(), finish=finish)

    def _said(self, completion: Completion) -> tuple[str, tuple[ToolCall, ...], str]:
        """(text, calls, finish_reason). Without tools the text is the whole answer; with them, what was not sent."""
        if self._job.answer is None:
            return completion.text, (), completion.finish
        return self._job.answer.end(completion)

    def usage_chunk(self, completion: Completion) -> str:
        """The chunk without choices that stream_options.include_usage asks for."""
        return _event(
            ChatCompletionChunk(**self._common, object=_CHUNK, choices=[], usage=_usage(completion)).json_text()
        )

    def _metadata(self) -> dict[str, Any]:
        return {} if self._job.request.metadata is None else {"metadata": self._job.request.metadata}


def _usage(completion: Completion) -> Usage:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def _logprobs(scores: Sequence[TokenScore] | None) -> Logprobs | None:
    if scores is None:
        return None

    def one(score: TokenScore) -> dict[str, Any]:
        return {"token": score.token, "logprob": score.logprob, "bytes": list(score.data)}

    content = [
        TokenLogprob(**one(score), top_logprobs=[Alternative(**one(other)) for other in score.top]) for score in scores
    ]
    return Logprobs(content=content, refusal=None)


def _call(call: ToolCall) -> dict[str, Any]:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return {"id": call.id, "type": "function", "function": function}


def _event(text: str) -> str:
    return f"data: {text}\n\n"


def _answer(answer: ApiObject, headers: Mapping[str, str] | None = None) -> Response:
    return Response(answer.json_text(), media_type="application/json", headers=dict(headers or {}))


def _model(name: str, version: Version) -> Model:
    created = int(datetime.fromisoformat(version.created_at).timestamp())
    return Model(id=name, object="model", created=created, owned_by=version.tenant or "tunesmith")

"""/v1/models and /v1/chat/completions, as OpenAI's clients know them."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tunesmith.core.clock import now
from tunesmith.core.digests import short
from tunesmith.engines.protocol import Completion, Scored, TokenScore
from tunesmith.registry.versions import Version
from tunesmith.server.body import read_body
from tunesmith.server.chat_request import ChatRequest
from tunesmith.server.errors import ApiError, no_such_model, timed_out
from tunesmith.server.serving import Serving, caller
from tunesmith.server.work import Event, Job

ID_PREFIX = "chatcmpl-"

routes = APIRouter(prefix="/v1")


@routes.get("/models")
async def models(request: Request) -> Response:
    """What the caller may ask now."""
    user, serving = await caller(request)
    found = await asyncio.to_thread(serving.router.models, user)
    return JSONResponse({"object": "list", "data": [_model(name, version) for name, version in found]})


@routes.get("/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One of them."""
    user, serving = await caller(request)
    for name, version in await asyncio.to_thread(serving.router.models, user):
        if name == model:
            return JSONResponse(_model(name, version))
    raise no_such_model(model)


@routes.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    user, serving = await caller(request)
    asked = await read_body(request, ChatRequest, serving.settings)
    identifier = uuid.uuid4().hex
    route = await asyncio.to_thread(serving.router.route, user, asked.model, asked.user or identifier)
    job = Job(id=identifier, user=user, request=asked, route=route)
    serving.worker.submit(job)
    try:
        first = await _first_event(job, request, serving)
        if isinstance(first, ApiError):
            raise first
    except BaseException:
        job.leave()
        raise
    shape = _Shape(job)
    if isinstance(first, Completion) and not asked.stream:
        return JSONResponse(shape.whole(first), headers=shape.headers())
    return StreamingResponse(
        _chunks(job, shape, first, serving), media_type="text/event-stream", headers=shape.headers()
    )


async def _first_event(job: Job, request: Request, serving: Serving) -> Event:
    """The job's first event; a client that leaves before it is not answered for."""
    gone = asyncio.ensure_future(_gone(request))
    arrived = asyncio.ensure_future(job.events.get())
    try:
        await asyncio.wait(
            {gone, arrived}, timeout=serving.settings.answer_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if arrived.done():
            return arrived.result()
        if gone.done():
            job.leave()
            return ApiError(499, "The client left.", code="client_left")
        return await _give_up_waiting(job, serving)
    finally:
        gone.cancel()
        arrived.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _give_up_waiting(job: Job, serving: Serving) -> ApiError:
    """Answer in place of an engine that hangs; a request that it had begun counts as failed."""
    job.leave()
    if job.claim() and job.begun:
        await asyncio.to_thread(serving.recorder.write, [job.served(None)])
    return timed_out()


async def _chunks(job: Job, shape: _Shape, first: Event, serving: Serving) -> AsyncIterator[str]:
    event = first
    try:
        yield shape.chunk({"role": "assistant", "content": "", "refusal": None})
        while True:
            if isinstance(event, str):
                yield shape.chunk({"content": event})
            elif isinstance(event, Scored):
                yield shape.chunk({"content": event.text}, scores=event.scores)
            elif isinstance(event, Completion):
                yield shape.chunk({}, finish=event.finish)
                if job.request.include_usage:
                    yield shape.usage_chunk(event)
                yield "data: [DONE]\n\n"
                return
            else:
                yield _data(event.document())
                return
            try:
                async with asyncio.timeout(serving.settings.answer_seconds):
                    event = await job.events.get()
            except TimeoutError:
                event = await _give_up_waiting(job, serving)
    finally:
        # Reached too when the client leaves: the engine stops at its next token.
        job.leave()


class _Shape:
    """The documents of one answer."""

    def __init__(self, job: Job) -> None:
        self._job, self._version = job, job.route.version
        self._common: dict[str, Any] = {
            "id": ID_PREFIX + job.id,
            "created": int(now().timestamp()),
            "model": self._version.label,
            "system_fingerprint": short(self._version.digest),
        }

    def headers(self) -> dict[str, str]:
        """What says which version and arm answered, and what was looked up for it (percent-encoded names)."""
        said = {
            "x-request-id": self._job.id,
            "x-tunesmith-version": self._version.label,
            "x-tunesmith-arm": self._job.route.arm,
            "x-tunesmith-system-prompt": self._job.prompt_used,
        }
        if self._job.sources:
            said["x-tunesmith-sources"] = ", ".join(quote(source, safe="/") for source in self._job.sources)
        return said

    def whole(self, completion: Completion) -> dict[str, Any]:
        """A chat.completion."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        scores = completion.scores if self._job.request.logprobs else None
        choice = {"index": 0, "message": message, "logprobs": _logprobs(scores), "finish_reason": completion.finish}
        document = {**self._common, "object": "chat.completion", "choices": [choice], "usage": _usage(completion)}
        return {**document, **self._metadata()}

    def chunk(
        self, delta: dict[str, Any], finish: str | None = None, scores: Sequence[TokenScore] | None = None
    ) -> str:
        """A chat.completion.chunk as a server-sent event; the last one echoes the request's metadata."""
        choice = {"index": 0, "delta": delta, "logprobs": _logprobs(scores), "finish_reason": finish}
        document = {**self._common, "object": "chat.completion.chunk", "choices": [choice]}
        if self._job.request.include_usage:
            document["usage"] = None
        return _data({**document, **(self._metadata() if finish else {})})

    def usage_chunk(self, completion: Completion) -> str:
        """The chunk without choices that stream_options.include_usage asks for."""
        document = {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": _usage(completion)}
        return _data(document)

    def _metadata(self) -> dict[str, Any]:
        return {} if self._job.request.metadata is None else {"metadata": self._job.request.metadata}


def _usage(completion: Completion) -> dict[str, int]:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _logprobs(scores: Sequence[TokenScore] | None) -> dict[str, Any] | None:
    """As OpenAI has them: every token with its bytes, since a character may be spread over several."""
    if scores is None:
        return None

    def one(score: TokenScore) -> dict[str, Any]:
        return {"token": score.token, "logprob": score.logprob, "bytes": list(score.data)}

    content = [{**one(score), "top_logprobs": [one(other) for other in score.top]} for score in scores]
    return {"content": content, "refusal": None}


def _data(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _model(name: str, version: Version) -> dict[str, Any]:
    created = int(datetime.fromisoformat(version.created_at).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": version.tenant or "tunesmith"}

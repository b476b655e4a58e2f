"""/v1/models and /v1/chat/completions, compatible with OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.clock import second
from tunesmith.core.errors import TunesmithError
from tunesmith.core.text.names import Scope
from tunesmith.engines.protocol import Completion, Scored
from tunesmith.holding.queue import HeldAnswer, QueueFull, TooManyOfCaller, UnknownAnswer, get, put, response_of
from tunesmith.registry.versions import Version
from tunesmith.server.answering.job import ChatJob, Event, HeldCompletion
from tunesmith.server.answering.recording import LOG
from tunesmith.server.answering.request import ChatRequest
from tunesmith.server.chat.answer import ChatCompletion, Delta, Model, ModelList, ResponseBuilder, event_text
from tunesmith.server.errors import (
    ApiError,
    HeldNotice,
    answer_held,
    answer_refused,
    busy_for_user,
    no_such_model,
    not_stored,
)  # fmt: skip
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import answers, body, errors
from tunesmith.server.serving import CHAT_JOB, Calling, PlainRoute, Serving, bearer, in_turn, needs, serving_of
from tunesmith.store import database

routes = APIRouter(prefix="/v1", dependencies=[needs("chat")])
answering = APIRouter(prefix="/v1", dependencies=[needs("chat")], route_class=PlainRoute)


@routes.get("/models", **answers(ModelList))
@in_turn
def models(call: Calling) -> ModelList:
    """The models that the caller may use now."""
    available = call.serving.router.models(call.user)
    return ModelList(object="list", data=[_model(name, version) for name, version in available])


@routes.get("/models/{model:path}", **answers(Model, 404))
@in_turn
def model(call: Calling, model: str) -> Model:
    """One of the models that the caller may use now."""
    for name, version in call.serving.router.models(call.user):
        if name == model:
            return _model(name, version)
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
    user, serving = request.state.caller.user, serving_of(request)
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
    build = ResponseBuilder(job)
    headers = build.headers()
    if given.store and not serving.recorder.keeps:  # OpenAI's clients may send it always
        headers["x-tunesmith-store"] = "no"
    if isinstance(first, HeldCompletion):
        first, state = await _reviewed(job, build, first, request, serving)
        headers["x-tunesmith-review"] = state
    if isinstance(first, Completion) and not given.stream:
        return Response(build.whole(first).json_text(), media_type="application/json", headers=headers)
    return StreamingResponse(_chunks(job, build, first, serving), media_type="text/event-stream", headers=headers)


async def _reviewed(
    job: ChatJob, build: ResponseBuilder, held: HeldCompletion, request: Request, serving: Serving
) -> tuple[Event, str]:
    """The first event of an answer that a reviewer let leave, and the decision. Raises ApiError for other answers."""
    entry = HeldAnswer(
        id=job.id,
        name=job.route.version.name,
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
        answer, state = await _decision_on(entry, serving, gone)
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


async def _decision_on(answer: HeldAnswer, serving: Serving, gone: asyncio.Future[None]) -> tuple[str, str]:
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
        message = f"The answer is gone: {holding.at_most} wait for a reviewer already. Send the request again."
        raise ApiError(503, message, "held_queue_full", retry=60) from error
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
    job.events.put_nowait(ApiError(499, "The client left.", "client_left"))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _give_up_waiting(job: ChatJob, serving: Serving) -> ApiError:
    """The error for a request without an answer in time. If it had begun, it is recorded as failed."""
    first = job.claim()  # before the engine hears of it, whose thread would record that the client left
    job.leave()
    if first and job.began is not None:
        await asyncio.to_thread(serving.recorder.write, job, None)
    return ApiError(504, "No answer in time.", "timeout", retry=5)


async def _chunks(job: ChatJob, build: ResponseBuilder, first: Event, serving: Serving) -> AsyncIterator[str]:
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
                yield event_text(event.document().model_dump_json())
                return
            try:
                async with asyncio.timeout(serving.settings.answer_seconds - (time.monotonic() - job.accepted)):
                    event = await job.events.get()
            except TimeoutError:
                event = await _give_up_waiting(job, serving)
    finally:
        # Also reached when the client leaves: the engine then stops at its next token.
        job.leave()


def _model(name: str, version: Version) -> Model:
    created = int(datetime.fromisoformat(version.created_at).timestamp())
    return Model(id=name, object="model", created=created, owned_by=version.tenant or "tunesmith")

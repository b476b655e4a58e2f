"""/v1/fine_tuning/jobs, compatible with OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from tunesmith.core.errors import Forbidden, Refused, TunesmithError, UsageError
from tunesmith.server import limits
from tunesmith.server.errors import (
    ApiError,
    bad_request,
    forbidden,
    no_such_model,
    not_stored,
    sentence,
    stopping,
    unavailable,
)
from tunesmith.server.fine_tuning import objects
from tunesmith.server.fine_tuning.objects import FineTuningJob, FineTuningRequest, event_id, event_object, job_object
from tunesmith.server.openapi import answers, body
from tunesmith.server.serving import Call, Calling, Serving, document, in_turn, needs, read, who_has
from tunesmith.services import jobs as service
from tunesmith.services.actions import Action
from tunesmith.services.jobs import ChangeJob, JobView, LogLine
from tunesmith.store.tables import JobRow

routes = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[needs("jobs")])
_PAGE = {"jobs": 20, "events": 20, "checkpoints": 10}  # items of a page by default, as OpenAI's
_MOST = 100
SECONDS = 1.0  # between two looks at the job of a stream of events
_ALIVE_SECONDS = 20.0  # a comment is sent this often, so that proxies keep the connection
_STREAMS = 16  # of one user at once
_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


@routes.post("", **answers(FineTuningJob, 400, 404, 408, 409, 413, 503, 507, extra=body(FineTuningRequest)))
async def create(request: Request, call: Calling) -> Response:
    """Queue a job. The header Idempotency-Key gives the same job when the request is sent again."""
    user = call.user
    if not user.may("job.add"):
        raise forbidden(f"{user.name} may not add jobs.")
    given = await read(request, call, FineTuningRequest)
    project, key = call.serving.project, request.headers.get("idempotency-key")
    if project is None:
        raise no_such_model(given.model)

    def add() -> JobRow:
        try:
            return service.add_fine_tuning(call, given.arguments(), key=key)
        except service.UnknownModel:
            raise no_such_model(given.model) from None
        except UsageError as error:
            field = error.where if error.where in FineTuningRequest.model_fields else None
            raise bad_request(f"{error.what}.", field) from error
        except Refused as error:
            raise ApiError(409, sentence(error), error.code) if error.code else forbidden(f"{error.what}.") from error
        except TunesmithError as error:
            raise not_stored(error) from error

    return document(job_object(await call.serving.noting.run(user.name, add), project))


@routes.get("", **answers(objects.FineTuningJobList, 400, 404))
@in_turn
def jobs(
    call: Calling, request: Request, after: str | None = None, limit: str | None = None, metadata: str | None = None
) -> objects.FineTuningJobList:
    """The jobs of the caller's tenant and region, newest first. `metadata[KEY]=VALUE` filters them; `metadata=null`
    keeps those without any."""
    most = objects.page_limit(limit, _PAGE["jobs"], _MOST)
    before = None if after is None else _found(call, after).id
    if metadata not in (None, "null"):
        raise bad_request("metadata must be null, or be given as metadata[KEY]=VALUE.", "metadata")
    pairs = {hit[1]: value for name, value in request.query_params.multi_items() if (hit := _FILTER.fullmatch(name))}
    wanted = pairs if metadata is None else None
    listed = service.list_fine_tuning(call, before=before, most=most + 1, metadata=wanted)
    data = tuple(job_object(each, call.serving.project) for each in listed[:most])
    return objects.FineTuningJobList(object="list", data=data, has_more=len(listed) > most)


@routes.get("/{job}", **answers(FineTuningJob, 404))
@in_turn
def job(call: Calling, job: str) -> FineTuningJob:
    """One job. Another tenant's is answered like one that does not exist."""
    return job_object(_found(call, job), call.serving.project)


@routes.get("/{job}/events", **answers(objects.FineTuningEventList, 400, 404))
@in_turn
def events(
    call: Calling,
    request: Request,
    job: str,
    after: str | None = None,
    limit: str | None = None,
    stream: str | None = None,
) -> objects.FineTuningEventList | Response:
    """The events of a job, newest first. after: only those before this one.

    stream=true is an extension of OpenAI's API: server-sent events, oldest first and while they come, until the job has
    ended. The header Last-Event-ID continues a stream after that event.
    """
    most = objects.page_limit(limit, _PAGE["events"], _MOST)
    row = _found(call, job)
    if stream not in (None, "false", "true"):
        raise bad_request("stream must be true or false.", "stream")
    lines = service.log(call, row.id).lines
    if stream == "true":
        if after is not None or limit is not None:
            raise bad_request("stream=true takes no after and no limit: these are for pages.", "stream")
        known = request.headers.get("last-event-id")
        last = 0 if known is None else _number_of(row, lines, known, "Last-Event-ID")
        return _stream(request, call, job, last)
    if after is not None:
        before = _number_of(row, lines, after, "after")
        lines = tuple(line for line in lines if line.number < before)
    data = tuple(event_object(row, line) for line in lines[::-1][:most])
    return objects.FineTuningEventList(object="list", data=data, has_more=len(lines) > most)


@routes.get("/{job}/checkpoints", **answers(objects.CheckpointList, 400, 404))
@in_turn
def checkpoints(call: Calling, job: str, after: str | None = None, limit: str | None = None) -> objects.CheckpointList:
    """The step whose weights the job's model has, once it succeeded: the only ones that can be called."""
    objects.page_limit(limit, _PAGE["checkpoints"], _MOST)
    data = tuple(each for each in objects.checkpoint_objects(_found(call, job)) if each.id != after)
    return objects.CheckpointList(object="list", data=data, has_more=False, **objects.ends(data))


async def _changed(change: Action[ChangeJob, JobView], call: Calling, job: str) -> Response:
    user, serving = call.user, call.serving
    look = partial(_found, call, job)
    try:
        change.check(user)
        row = await serving.listing.run(user.name, look)
        await serving.perform(call, change, ChangeJob(job=row.id))
    except Forbidden as error:
        raise forbidden(sentence(error)) from error
    except Refused as error:
        raise ApiError(400, sentence(error), "invalid_job_state") from error
    except TunesmithError as error:
        raise not_stored(error) from error
    return document(job_object(await serving.listing.run(user.name, look), serving.project))


for each in (service.cancel, service.pause, service.resume):
    word = each.name.removeprefix("job.")
    described = {"name": word, "description": each.does.__doc__, **answers(FineTuningJob, 400, 404, 503, 507)}
    routes.post(f"/{{job}}/{word}", **described)(partial(_changed, each))


def _found(call: Call, identifier: str) -> JobRow:
    """A job of the caller's scope. Raises ApiError 404."""
    row = service.find_fine_tuning(call, identifier)
    if row is None:
        message = f"Could not find fine tune: {identifier[: limits.SHOWN]}"
        raise ApiError(404, message, "fine_tune_not_found", "fine_tuning_job_id")
    return row


def _number_of(job: JobRow, lines: Sequence[LogLine], event: str, field: str) -> int:
    """The number of the line with this id. Raises ApiError 400 where the job has none."""
    for line in lines:
        if event_id(job, line) == event:
            return line.number
    raise bad_request(f"There is no event {event[: limits.SHOWN]!r} of this job.", field)


def _stream(request: Request, call: Call, job: str, after: int) -> StreamingResponse:
    """A job's events with higher numbers than `after`, and those that follow until it ends, as server-sent events.

    OpenAI's API has no such stream. `data: [DONE]` follows the last event of a job that has ended, so OpenAI's clients
    read it by the class with which they read streamed answers. Raises ApiError 429 where the user has too many open.
    """
    streams, name = call.serving.streams, call.actor
    if streams[name] >= _STREAMS:
        raise ApiError(429, f"You have {_STREAMS} streams of events open: close some.", "rate_limit_exceeded")

    async def counted() -> AsyncIterator[str]:
        streams[name] += 1
        try:
            async for text in _told(request, call.serving, job, after):
                yield text
        except (ApiError, TunesmithError) as error:
            said = error if isinstance(error, ApiError) else unavailable()
            yield f"data: {said.document().model_dump_json()}\n\n"
        finally:
            streams[name] -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(counted(), media_type="text/event-stream", headers=headers)


async def _told(request: Request, serving: Serving, identifier: str, after: int) -> AsyncIterator[str]:
    """What is sent. Raises ApiError once the caller may not read the job any more, and when the server stops."""
    sent = time.monotonic()
    while True:
        who = await who_has(request)  # their token may have ended
        job, lines = await asyncio.to_thread(_look, Call.by(who, serving), identifier, after)
        for line in lines:
            event = json.dumps(event_object(job, line).document())
            yield f"id: {event_id(job, line)}\ndata: {event}\n\n"
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


def _look(call: Call, identifier: str, after: int) -> tuple[JobRow, Sequence[LogLine]]:
    """The job and its new lines, read after it so that an ended job's are whole. Raises ApiError 404 if another's."""
    job = _found(call, identifier)
    return job, service.log(call, job.id, after=after).lines

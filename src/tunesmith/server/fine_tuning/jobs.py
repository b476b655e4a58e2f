"""/v1/fine_tuning/jobs, compatible with OpenAI's clients."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tunesmith.core.errors import Forbidden, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.view import View
from tunesmith.server import limits
from tunesmith.server.access import caller, needs
from tunesmith.server.actions import perform
from tunesmith.server.errors import ApiError, bad_request, forbidden, no_such_model, not_stored, sentence
from tunesmith.server.fine_tuning import event_stream
from tunesmith.server.fine_tuning.request import FineTuningRequest, page_limit
from tunesmith.server.intake.body import read_body
from tunesmith.server.openapi import BEARER, body, errors
from tunesmith.server.serving import Serving
from tunesmith.services import fine_tuning as service
from tunesmith.services import jobs as changing
from tunesmith.services.actions import Action
from tunesmith.services.fine_tuning import JOB, KIND, Arguments, job_number, seed_of
from tunesmith.services.fine_tuning_jobs import VALIDATING
from tunesmith.services.jobs import ChangeJob, JobView, LogLine, for_client
from tunesmith.store.people.identities import User
from tunesmith.store.tables import JobRow

routes = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[needs("jobs")])
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
_PAGE = {"jobs": 20, "events": 20, "checkpoints": 10}  # items of a page by default, as OpenAI's
_MOST = 100
_EVENT = "ftevent-"
_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


class JobError(View):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class UsedHyperparameters(View):
    """What was used, or before the training what was asked for."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class UsedSupervised(View):
    """The settings of the method."""

    hyperparameters: UsedHyperparameters


class UsedMethod(View):
    """The method."""

    type: Literal["supervised"]
    supervised: UsedSupervised


class FineTuningJob(View):
    """A job, as OpenAI's clients read it. organization_id: the job's tenant. paused: also OpenAI's API says so."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: JobError | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: tuple[str, ...]
    trained_tokens: int | None
    hyperparameters: UsedHyperparameters
    method: UsedMethod
    seed: int
    metadata: dict[str, str] | None
    integrations: tuple[Any, ...]


class FineTuningJobList(View):
    """A page of jobs, newest first."""

    object: Literal["list"]
    data: tuple[FineTuningJob, ...]
    has_more: bool


class FineTuningEvent(View):
    """A line of a job's log."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"]
    data: dict[str, Any] | None


class FineTuningEventList(View):
    """A page of events, newest first."""

    object: Literal["list"]
    data: tuple[FineTuningEvent, ...]
    has_more: bool


class Checkpoint(View):
    """The step whose weights are the job's model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class CheckpointList(View):
    """A page of checkpoints."""

    object: Literal["list"]
    data: tuple[Checkpoint, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


@routes.post(
    "",
    response_model=FineTuningJob,
    responses=errors(400, 401, 403, 404, 408, 413, 429, 503, 507),
    openapi_extra=body(FineTuningRequest),
)
async def create(request: Request) -> Response:
    """Queue a job. The header Idempotency-Key gives the same job when the request is sent again."""
    user, serving = caller(request)
    if not user.may("job.add"):
        raise forbidden(f"{user.name} may not add jobs.")
    with serving.arrives(user) as count:
        given = await read_body(request, FineTuningRequest, serving.settings, count)
    project, key = serving.project, request.headers.get("idempotency-key")
    if project is None:
        raise no_such_model(given.model)

    def add() -> JobRow:
        try:
            return service.create(project, given.arguments(), user=user, key=key)
        except service.UnknownModel:
            raise no_such_model(given.model) from None
        except UsageError as error:
            field = error.where if error.where in FineTuningRequest.model_fields else None
            raise bad_request(f"{error.what}.", field) from error
        except Refused as error:
            raise forbidden(f"{error.what}.") from error
        except TunesmithError as error:
            raise not_stored(error) from error

    return _answer(await serving.noting.run(user.name, add), serving)


@routes.get("", response_model=FineTuningJobList, responses=errors(400, 401, 403, 404, 429), openapi_extra=BEARER)
async def jobs(
    request: Request, after: str | None = None, limit: str | None = None, metadata: str | None = None
) -> Response:
    """The jobs of the caller's tenant and region, newest first. `metadata[KEY]=VALUE` filters them; `metadata=null`
    keeps those without any."""
    user, serving = caller(request)
    most = page_limit(limit, _PAGE["jobs"], _MOST)
    before = None if after is None else (await _found(user, serving, after)).id
    if metadata not in (None, "null"):
        raise bad_request("metadata must be null, or be given as metadata[KEY]=VALUE.", "metadata")
    pairs = {
        matched[1]: value for name, value in request.query_params.multi_items() if (matched := _FILTER.fullmatch(name))
    }
    wanted = pairs if metadata is None else None
    listed = partial(service.list_jobs, serving.store, user, before=before, most=most + 1, metadata=wanted)
    found = await serving.listing.run(user.name, listed)
    data = tuple(_object(each, serving) for each in found[:most])
    return JSONResponse(FineTuningJobList(object="list", data=data, has_more=len(found) > most).document())


@routes.get("/{job}", response_model=FineTuningJob, responses=errors(401, 403, 404, 429), openapi_extra=BEARER)
async def job(request: Request, job: str) -> Response:
    """One job. Another tenant's is answered like one that does not exist."""
    user, serving = caller(request)
    return _answer(await _found(user, serving, job), serving)


_CHANGE: JsonObject = {
    "response_model": FineTuningJob,
    "responses": errors(400, 401, 403, 404, 429, 503, 507),
    "openapi_extra": BEARER,
}


@routes.post("/{job}/cancel", **_CHANGE)
async def cancel(request: Request, job: str) -> Response:
    """End a job for good. One that runs ends between two of its steps, and says running until then."""
    return await _changed(request, job, changing.cancel)


@routes.post("/{job}/pause", **_CHANGE)
async def pause(request: Request, job: str) -> Response:
    """Stop a job until it is resumed. One that runs stops between two of its steps, and says running until then."""
    return await _changed(request, job, changing.pause)


@routes.post("/{job}/resume", **_CHANGE)
async def resume(request: Request, job: str) -> Response:
    """Put a paused job back into the queue. Its training continues from the newest checkpoint."""
    return await _changed(request, job, changing.resume)


@routes.get(
    "/{job}/events", response_model=FineTuningEventList, responses=errors(400, 401, 403, 404, 429), openapi_extra=BEARER
)
async def events(
    request: Request, job: str, after: str | None = None, limit: str | None = None, stream: str | None = None
) -> Response:
    """The events of a job, newest first. after: only those before this one.

    stream=true is an extension of OpenAI's API: server-sent events, oldest first and while they come, until the job has
    ended. The header Last-Event-ID continues a stream after that event.
    """
    user, serving = caller(request)
    most = page_limit(limit, _PAGE["events"], _MOST)
    found = await _found(user, serving, job)
    if stream not in (None, "false", "true"):
        raise bad_request("stream must be true or false.", "stream")
    lines = (await serving.listing.run(user.name, partial(changing.log, serving.store, found.id, user))).lines
    if stream == "true":
        if after is not None or limit is not None:
            raise bad_request("stream=true takes no after and no limit: these are for pages.", "stream")
        known = request.headers.get("last-event-id")
        last = 0 if known is None else _number_of(found, lines, known, "Last-Event-ID")
        return event_stream.stream(request, found, last, partial(_sent, found))
    if after is not None:
        before = _number_of(found, lines, after, "after")
        lines = tuple(line for line in lines if line.number < before)
    data = tuple(_event(found, line) for line in lines[::-1][:most])
    return JSONResponse(FineTuningEventList(object="list", data=data, has_more=len(lines) > most).document())


@routes.get(
    "/{job}/checkpoints",
    response_model=CheckpointList,
    responses=errors(400, 401, 403, 404, 429),
    openapi_extra=BEARER,
)
async def checkpoints(request: Request, job: str, after: str | None = None, limit: str | None = None) -> Response:
    """The step whose weights the job's model has, once it succeeded: the only ones that can be called."""
    user, serving = caller(request)
    page_limit(limit, _PAGE["checkpoints"], _MOST)
    found = await _found(user, serving, job)
    data = tuple(each for each in _checkpoints(found) if after is None or after != each.id)
    ends = {"first_id": data[0].id, "last_id": data[-1].id} if data else {"first_id": None, "last_id": None}
    return JSONResponse(CheckpointList(object="list", data=data, has_more=False, **ends).document())


async def _changed(request: Request, identifier: str, change: Action[ChangeJob, JobView]) -> Response:
    user, serving = caller(request)
    try:
        change.check(user)
        found = await _found(user, serving, identifier)
        await perform(serving, user, change, ChangeJob(job=found.id))
    except Forbidden as error:
        raise forbidden(sentence(error)) from error
    except Refused as error:
        raise ApiError(400, sentence(error), code="invalid_job_state") from error
    except TunesmithError as error:
        raise not_stored(error) from error
    return _answer(await _found(user, serving, identifier), serving)


async def _found(user: User, serving: Serving, identifier: str) -> JobRow:
    """A job of the user's scope. Raises ApiError 404."""
    look = partial(service.find, serving.store, job_number(identifier), user)
    found = await serving.listing.run(user.name, look)
    if found is None:
        message = f"Could not find fine tune: {identifier[: limits.SHOWN]}"
        raise ApiError(404, message, code="fine_tune_not_found", param="fine_tuning_job_id")
    return found


def _answer(job: JobRow, serving: Serving) -> Response:
    return JSONResponse(_object(job, serving).document())


def _object(job: JobRow, serving: Serving) -> FineTuningJob:
    arguments, done = Arguments.model_validate(job.arguments), job.result.get(KIND, {})
    asked = {name: "auto" if value is None else value for name, value in arguments.hyperparameters.document().items()}
    used = UsedHyperparameters.model_validate(done.get("hyperparameters", asked))
    settings = None if serving.project is None else serving.project.settings
    takes = settings is not None and settings.fine_tuning is not None
    return FineTuningJob(
        id=f"{JOB}{job.id}",
        object="fine_tuning.job",
        created_at=int(job.created),
        finished_at=None if job.ended is None else int(job.ended),
        estimated_finish=None,
        status=_status(job),
        error=_error(job.error) if job.state == "failed" else None,
        model=arguments.model,
        fine_tuned_model=done.get("fine_tuned_model"),
        organization_id=job.tenant or "tunesmith",
        training_file=arguments.training_file,
        validation_file=arguments.validation_file,
        result_files=tuple(done.get("result_files", ())),
        trained_tokens=done.get("trained_tokens"),
        hyperparameters=used,
        method=UsedMethod(type="supervised", supervised=UsedSupervised(hyperparameters=used)),
        seed=seed_of(settings, arguments) if settings is not None and takes else arguments.seed or 0,
        metadata=arguments.metadata,
        integrations=(),
    )


def _status(job: JobRow) -> Status:
    if job.state == "running" and job.progress.get("step") == VALIDATING:
        return "validating_files"
    return job.state


def _error(error: Fields) -> JobError:
    said = [str(error[name]) for name in ("what", "where", "fix") if error.get(name)]
    message = "\n".join(for_client(each) for each in said if not each.startswith("/"))
    return JobError(code=str(error.get("code")), message=message, param=error.get("param"))


def _event_id(job: JobRow, line: LogLine) -> str:
    return f"{_EVENT}{job.id}-{line.number}"


def _number_of(job: JobRow, lines: Sequence[LogLine], event: str, field: str) -> int:
    """The number of the line with this id. Raises ApiError 400 where the job has none."""
    for line in lines:
        if _event_id(job, line) == event:
            return line.number
    raise bad_request(f"There is no event {event[: limits.SHOWN]!r} of this job.", field)


def _sent(job: JobRow, line: LogLine) -> str:
    """An event as a server-sent one."""
    return f"id: {_event_id(job, line)}\ndata: {json.dumps(_event(job, line).document())}\n\n"


def _event(job: JobRow, line: LogLine) -> FineTuningEvent:
    starts: Sequence[tuple[str, Literal["warn", "error"]]] = (("failed", "error"), ("to be tried again", "warn"))
    level = next((level for start, level in starts if line.message.startswith(start)), "info")
    return FineTuningEvent(
        id=_event_id(job, line),
        object="fine_tuning.job.event",
        created_at=int(line.at),
        level=level,  # type: ignore[arg-type]
        message=for_client(line.message),
        type="message",
        data=None,
    )


def _checkpoints(job: JobRow) -> list[Checkpoint]:
    done = job.result.get(KIND, {})
    if job.state != "succeeded" or not done:
        return []
    metrics = done["checkpoint"]
    found = Checkpoint(
        id=f"ftckpt-{job.id}-{metrics['step']}",
        object="fine_tuning.job.checkpoint",
        created_at=int(job.ended or job.created),
        fine_tuned_model_checkpoint=done["fine_tuned_model"],
        fine_tuning_job_id=f"{JOB}{job.id}",
        metrics=metrics,
        step_number=metrics["step"],
    )
    return [found]

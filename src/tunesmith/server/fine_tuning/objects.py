"""Fine-tuning jobs and files as OpenAI defines them: the body that creates a job, and what clients read.

What is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field, StrictInt, field_validator, model_validator

from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.values import Frozen, View
from tunesmith.jobs.fine_tuning import VALIDATING, Arguments, Hyperparameters, seed_of
from tunesmith.project import Project
from tunesmith.server import limits
from tunesmith.server.answering.request import MetadataKey, MetadataText, Number
from tunesmith.server.errors import bad_request
from tunesmith.services.jobs import LogLine, for_client
from tunesmith.store.tables import FINE_TUNING, FINE_TUNING_JOB, FileRow, JobRow

Item = TypeVar("Item", bound=View)
_NOT_SUPPORTED = "is not supported"
Auto: TypeAlias = Literal["auto"] | None


class AskedHyperparameters(Frozen):
    """null and "auto" leave a value to the project's settings."""

    n_epochs: Annotated[StrictInt, Field(ge=1, le=100)] | Auto = None
    batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] | Auto = None
    learning_rate_multiplier: Annotated[Number, Field(gt=0, le=1000)] | Auto = None


class Supervised(Frozen):
    """Settings of the method `supervised`."""

    hyperparameters: AskedHyperparameters | None = None


class Method(Frozen):
    """The method. Only `supervised` is there."""

    type: Literal["supervised"]
    supervised: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("dpo", "reinforcement"):
            raise ValueError(f"the method {value['type']} {_NOT_SUPPORTED}: use supervised")
        return value


class FineTuningRequest(Frozen):
    """Create a fine-tuning job.

    hyperparameters: deprecated, as with OpenAI; either it or method.supervised.hyperparameters is given. suffix:
    letters, digits, and `.`, `_`, `-`. integrations: only an empty list.
    """

    model: str = Field(min_length=1, max_length=limits.MODEL)
    training_file: str = Field(min_length=1, max_length=limits.FILE_ID)
    validation_file: str | None = Field(default=None, min_length=1, max_length=limits.FILE_ID)
    hyperparameters: AskedHyperparameters | None = None
    method: Method | None = None
    suffix: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**31)
    metadata: Annotated[dict[MetadataKey, MetadataText], Field(max_length=limits.METADATA)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("integrations", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        if isinstance(value, list) and value:
            kind = value[0].get("type") if isinstance(value[0], dict) else None
            raise ValueError(f"the integration {str(kind)[: limits.SHOWN]} {_NOT_SUPPORTED}")
        return value

    @model_validator(mode="after")
    def _once(self) -> FineTuningRequest:
        if self.hyperparameters is not None and self._inside() is not None:
            raise ValueError("give either hyperparameters or method.supervised.hyperparameters")
        return self

    def _inside(self) -> AskedHyperparameters | None:
        supervised = self.method.supervised if self.method else None
        return supervised.hyperparameters if supervised else None

    def arguments(self) -> Arguments:
        """What a job needs to know."""
        asked = self.hyperparameters or self._inside() or AskedHyperparameters()
        given = {name: None if value == "auto" else value for name, value in asked.model_dump().items()}
        return Arguments.of(self, settings="", hyperparameters=Hyperparameters(**given))


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
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
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


class Listed(View, Generic[Item]):
    """A page of a list."""

    object: Literal["list"]
    data: tuple[Item, ...]
    has_more: bool


class FineTuningJobList(Listed[FineTuningJob]):
    """A page of jobs, newest first."""


class FineTuningEvent(View):
    """A line of a job's log."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"]
    data: dict[str, Any] | None


class FineTuningEventList(Listed[FineTuningEvent]):
    """A page of events, newest first."""


class Checkpoint(View):
    """The step whose weights are the job's model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class ListedWithEnds(Listed[Item]):
    """A page that names its first and its last item; null where it has none."""

    first_id: str | None
    last_id: str | None


class CheckpointList(ListedWithEnds[Checkpoint]):
    """A page of checkpoints."""


class FileObject(View):
    """A file, as OpenAI's clients read it. status: deprecated there, always processed."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: str | None


class FileList(ListedWithEnds[FileObject]):
    """A page of files. has_more: whether there are more behind last_id."""


class FileDeleted(View):
    """A file was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


def page_limit(given: str | None, default: int, most: int) -> int:
    """How many items a page may have. Raises ApiError 400 for anything but a whole number from 1 to `most`."""
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
        raise bad_request(f"limit must be a whole number from 1 to {most}.", "limit")
    return int(given)


def ends(data: Sequence[Checkpoint | FileObject]) -> JsonObject:
    """The ids of the first and the last item of a page; null where it has none."""
    return {"first_id": data[0].id, "last_id": data[-1].id} if data else {"first_id": None, "last_id": None}


def job_object(job: JobRow, project: Project | None) -> FineTuningJob:
    """A job, as clients read it. project: the server's."""
    arguments, done = Arguments.model_validate(job.arguments), job.result.get(FINE_TUNING, {})
    asked = {name: "auto" if value is None else value for name, value in arguments.hyperparameters.document().items()}
    used = UsedHyperparameters.model_validate(done.get("hyperparameters", asked))
    validates = job.state == "running" and job.progress.get("step") == VALIDATING
    seed = arguments.seed or 0
    if project is not None and project.settings.fine_tuning is not None:
        seed = seed_of(project.settings, arguments)
    return FineTuningJob.of(
        arguments,
        id=f"{FINE_TUNING_JOB}{job.id}",
        object="fine_tuning.job",
        created_at=int(job.created),
        finished_at=None if job.ended is None else int(job.ended),
        estimated_finish=None,
        status="validating_files" if validates else job.state,
        error=_error(job.error) if job.state == "failed" else None,
        fine_tuned_model=done.get("fine_tuned_model"),
        organization_id=job.tenant or "tunesmith",
        result_files=tuple(done.get("result_files", ())),
        trained_tokens=done.get("trained_tokens"),
        hyperparameters=used,
        method=UsedMethod(type="supervised", supervised=UsedSupervised(hyperparameters=used)),
        seed=seed,
        integrations=(),
    )


def _error(error: Fields) -> JobError:
    said = [str(error[name]) for name in ("what", "where", "fix") if error.get(name)]
    message = "\n".join(for_client(each) for each in said if not each.startswith("/"))
    return JobError(code=str(error.get("code")), message=message, param=error.get("param"))


def event_id(job: JobRow, line: LogLine) -> str:
    """The id of a line of a job's log."""
    return f"ftevent-{job.id}-{line.number}"


def event_object(job: JobRow, line: LogLine) -> FineTuningEvent:
    """A line of a job's log, as clients read it."""
    failed, again = (line.message.startswith(start) for start in ("failed", "to be tried again"))
    return FineTuningEvent(
        id=event_id(job, line),
        object="fine_tuning.job.event",
        created_at=int(line.at),
        level="error" if failed else "warn" if again else "info",
        message=for_client(line.message),
        type="message",
        data=None,
    )


def checkpoint_objects(job: JobRow) -> list[Checkpoint]:
    """The one checkpoint of a job that succeeded."""
    done = job.result.get(FINE_TUNING, {})
    if job.state != "succeeded" or not done:
        return []
    metrics = done["checkpoint"]
    checkpoint = Checkpoint(
        id=f"ftckpt-{job.id}-{metrics['step']}",
        object="fine_tuning.job.checkpoint",
        created_at=int(job.ended or job.created),
        fine_tuned_model_checkpoint=done["fine_tuned_model"],
        fine_tuning_job_id=f"{FINE_TUNING_JOB}{job.id}",
        metrics=metrics,
        step_number=metrics["step"],
    )
    return [checkpoint]


def file_object(stored: FileRow) -> FileObject:
    """A file, as clients read it."""
    return FileObject(
        id=stored.file,
        object="file",
        bytes=stored.size,
        created_at=int(stored.created),
        expires_at=None,
        filename=stored.name,
        purpose=stored.purpose,
        status="processed",
        status_details=None,
    )

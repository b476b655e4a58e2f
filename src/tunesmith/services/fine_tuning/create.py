"""Accept a fine-tuning job, and read jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tunesmith.core.errors import UsageError
from tunesmith.jobs import queue
from tunesmith.jobs.state import Job
from tunesmith.project import Project
from tunesmith.services.fine_tuning.arguments import KIND, Arguments, Uploaded, derived
from tunesmith.store import uploads
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.uploads import StoredFile

PURPOSE, RESULTS = "fine-tune", "fine-tune-results"
_PAGE = 100


class UnknownModel(UsageError):
    """The project names no such model for fine-tuning."""


def create(project: Project, arguments: Arguments, *, user: User, key: str | None = None) -> Job:
    """Queue a job. key: an idempotency key. The job is for the tenant and region of its files.

    Raises UnknownModel; UsageError, where: the client's field, for what the project cannot do; Refused where the user
    may not add jobs.
    """
    known = project.settings.fine_tuning
    if known is None or arguments.model not in known.models:
        raise UnknownModel(f"there is no model {arguments.model!r} to fine-tune", where="model")
    training = _file(project.store, user, arguments.training_file, "training_file")
    if arguments.validation_file is not None:
        validation = _file(project.store, user, arguments.validation_file, "validation_file")
        if validation.scope != training.scope or validation.file == training.file:
            what = "the validation file must be another file of the same tenant and region"
            raise UsageError(what, where="validation_file")
    uploaded = Uploaded("training.jsonl", "training.jsonl")
    others = None if arguments.validation_file is None else Uploaded("validation.jsonl", "validation.jsonl")
    derived(project, arguments, uploaded, others, training.scope)
    return queue.add(
        project.store,
        KIND,
        arguments.model_copy(update={"settings": project.settings.digest}).document(),
        project=project.settings.name,
        actor=user.name,
        key=key,
        scope=training.scope,
    )


def find(store: Store, number: int | None, user: User) -> Job | None:
    """A fine-tuning job by its number; None where there is none that the user's scope covers."""
    if number is None:
        return None
    try:
        job = queue.get(store, number)
    except UsageError:
        return None
    return job if job.kind == KIND and user.scope.covers(job.scope) else None


def list_jobs(
    store: Store, user: User, *, before: int | None, most: int, metadata: Mapping[str, str] | None
) -> list[Job]:
    """Fine-tuning jobs that the user's scope covers, newest first.

    metadata: only jobs with these pairs; None: only jobs without any.
    """
    found: list[Job] = []
    for job in _jobs(store, user, before):
        own = job.arguments.get("metadata") or {}
        if not own if metadata is None else own.items() >= metadata.items():
            found.append(job)
        if len(found) == most:
            break
    return found


def _jobs(store: Store, user: User, before: int | None) -> Iterator[Job]:
    while page := queue.list_jobs(store, kinds=[KIND], before=before, most=_PAGE, scope=user.scope):
        yield from page
        before = page[-1].id


def _file(store: Store, user: User, identifier: str, field: str) -> StoredFile:
    found = uploads.find(store, identifier, user.scope)
    if found is None:
        raise UsageError(f"invalid {field}: {identifier[:80]}", where=field)
    if found.purpose != PURPOSE:
        raise UsageError(f"invalid {field}: {identifier} has the purpose {found.purpose}, not {PURPOSE}", where=field)
    return found

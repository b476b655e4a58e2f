"""Fine-tuning jobs of OpenAI's clients: what they ask for, accepting it, and the versions behind `ft:` names."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.settings import changed
from tunesmith.core.text.names import check_name
from tunesmith.core.view import View
from tunesmith.data.formats.row_formats import OPENAI
from tunesmith.data.settings import Source
from tunesmith.jobs import queue
from tunesmith.project import FineTuningSettings, Project, ProjectSettings
from tunesmith.registry.aliases import CHAMPION
from tunesmith.registry.versions import resolve
from tunesmith.store import uploads
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import FileRow, JobRow
from tunesmith.training.settings import TrainSettings, changed_training

KIND: Final = "fine_tuning"
_LONGEST_NAME = 63


class Hyperparameters(View):
    """None: as the project says, which OpenAI calls auto."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None


class Arguments(View):
    """The arguments of a job of the kind `fine_tuning`. settings: digest of the project's when it was created."""

    settings: str
    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None


def stated(settings: ProjectSettings) -> FineTuningSettings:
    """The project's `fine_tuning:`. Raises UsageError where it has none."""
    if settings.fine_tuning is None:
        raise UsageError(
            "this project takes no fine-tuning jobs", where="tunesmith.yaml", fix="add fine_tuning: {models: {...}}"
        )
    return settings.fine_tuning


def trained_name(settings: ProjectSettings) -> str:
    """The candidate that a job trains."""
    return stated(settings).candidate or settings.tuned[0]


def seed_of(settings: ProjectSettings, arguments: Arguments) -> int:
    """The seed of a job's training: the client's, else the project's."""
    train = settings.candidates[trained_name(settings)].train
    assert train is not None
    return train.seed if arguments.seed is None else arguments.seed


class Uploaded(NamedTuple):
    """An uploaded file. name: in records; that of its bytes, so that the same rows, uploaded again, are the same."""

    path: str
    name: str


def derived(
    project: Project,
    arguments: Arguments,
    training: Uploaded,
    validation: Uploaded | None = None,
    scope: Scope = Scope(),
) -> Project:
    """The project whose data are uploaded files, on the base that the job's model means.

    The rows of the validation file are test rows: the gates judge by them, besides the share that the split holds out.
    scope: the job's; a candidate that is the champion is the one that serves it. Raises UsageError for values that the
    settings do not allow, where: the client's field.
    """
    settings = project.on_base(arguments.model).settings
    given, name = stated(settings), trained_name(settings)
    files = [(training, None), *([] if validation is None else [(validation, "test")])]
    terms = given.model_dump(include={"licence", "attribution"})
    sources = tuple(
        Source.model_validate({**file._asdict(), **terms, "format": OPENAI, "split": split}) for file, split in files
    )
    changes = {"sources": sources, "split": given.split or settings.data.split, "review": None}
    data = changed(settings.data, changes, "validation_file")
    candidate = settings.candidates[name]
    assert candidate.train is not None
    train = _train(candidate.train, arguments)
    names = (series(settings.name, arguments.suffix), settings.name)
    candidates = {
        other: each.model_copy(update={"version": _serving(project.store, names, each.version, scope, other)})
        if each.version == CHAMPION
        else each
        for other, each in settings.candidates.items()
    }
    others = {
        "name": names[0],
        "data": data,
        "candidates": {**candidates, name: candidate.model_copy(update={"train": train})},
        "release": name,
    }
    found = Project(project.root, settings.model_copy(update=others))
    found.store = project.store
    return found


def series(project: str, suffix: str | None) -> str:
    """The name of the versions that jobs with this suffix register. A long one ends in a digest instead.

    Raises UsageError, where: suffix, for one that makes no name.
    """
    more = re.sub(r"[^a-z0-9._-]+", "-", (suffix or "ft").lower())
    name = f"{project}-{more}"
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 1 - len(digest)]}-{digest}"
    try:
        return check_name(name, "version name")
    except UsageError as error:
        error.where = "suffix"
        raise


def _serving(store: Store, names: Sequence[str], alias: str, scope: Scope, candidate: str) -> str:
    """The label of the champion of a scope: of the first name that has one, of the narrowest scope."""
    for name in names:
        for covering in scope.covering():
            with contextlib.suppress(UsageError):
                return resolve(store, f"{name}@{alias}", scope=covering).label
    raise UsageError(
        f"there is no {alias} of {' or '.join(names)} to compare with",
        where=f"candidates.{candidate}.version",
        fix=f"leave the candidate {candidate} out until there is one",
    )


def _train(train: TrainSettings, arguments: Arguments) -> TrainSettings:
    asked, multiplier = arguments.hyperparameters, arguments.hyperparameters.learning_rate_multiplier
    rate = None if multiplier is None else train.learning_rate * multiplier
    given = {"epochs": asked.n_epochs, "batch": asked.batch_size, "learning_rate": rate, "seed": arguments.seed}
    changes = {key: value for key, value in given.items() if value is not None}
    return changed_training(train, changes, "hyperparameters")


# Accepting and reading jobs


PURPOSE, RESULTS = "fine-tune", "fine-tune-results"
_PAGE = 100


class UnknownModel(UsageError):
    """The project names no such model for fine-tuning."""


def create(project: Project, arguments: Arguments, *, user: User, key: str | None = None) -> JobRow:
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


def find(store: Store, number: int | None, user: User) -> JobRow | None:
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
) -> list[JobRow]:
    """Fine-tuning jobs that the user's scope covers, newest first.

    metadata: only jobs with these pairs; None: only jobs without any.
    """
    found: list[JobRow] = []
    for job in _jobs(store, user, before):
        own = job.arguments.get("metadata") or {}
        if not own if metadata is None else own.items() >= metadata.items():
            found.append(job)
        if len(found) == most:
            break
    return found


def _jobs(store: Store, user: User, before: int | None) -> Iterator[JobRow]:
    while page := queue.list_jobs(store, kinds=[KIND], before=before, most=_PAGE, scope=user.scope):
        yield from page
        before = page[-1].id


def _file(store: Store, user: User, identifier: str, field: str) -> FileRow:
    found = uploads.find(store, identifier, user.scope)
    if found is None:
        raise UsageError(f"invalid {field}: {identifier[:80]}", where=field)
    if found.purpose != PURPOSE:
        raise UsageError(f"invalid {field}: {identifier} has the purpose {found.purpose}, not {PURPOSE}", where=field)
    return found


# Names of models


PREFIX: Final = "ft:"
JOB: Final = "ftjob-"
_NUMBER = re.compile("[1-9][0-9]{0,8}")


class NotYet(UsageError):
    """A job of this name exists, but no version came of it (yet)."""


def model_name(job: JobRow) -> str:
    """The name that a job's model has, or will have: ft:MODEL:PROJECT:SUFFIX:NUMBER."""
    arguments = Arguments.model_validate(job.arguments)
    return f"{PREFIX}{arguments.model}:{job.project}:{arguments.suffix or ''}:{job.id}"


def job_number(identifier: str) -> int | None:
    """The number in a job's id; None for what is no id."""
    found = identifier.removeprefix(JOB)
    return int(found) if identifier.startswith(JOB) and _NUMBER.fullmatch(found) else None


def version_behind(session: Session, name: str, scope: Scope) -> str:
    """The label of the version behind a `ft:` name. scope: the caller's.

    Raises NotYet where the job has none, UsageError where there is no such job for the caller.
    """
    number = name.rsplit(":", 1)[-1]
    row = session.get(JobRow, int(number)) if _NUMBER.fullmatch(number) else None
    visible = row is not None and row.tenant in ("", scope.tenant) and row.region in ("", scope.region)
    if row is None or not visible or row.kind != KIND or model_name(row) != name:
        raise UsageError(f"there is no model {name!r}")
    if row.state == "succeeded":
        return str(row.result[KIND]["version"])
    why = f": {row.error['code']}" if row.error else ""
    raise NotYet(f"its fine-tuning job {JOB}{row.id} is {row.state}{why}")

"""Fine-tuning jobs of OpenAI's clients: the project that one means, and how it is performed."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.text.names import Scope, check_name
from tunesmith.core.values import View, changed
from tunesmith.data.formats.openai_rules import InvalidExamples, check_examples
from tunesmith.data.formats.row_formats import FORMATS, OPENAI
from tunesmith.data.settings import Source
from tunesmith.evaluation.summary import EvaluationSummary
from tunesmith.jobs.performing import JobProgress, Outcome
from tunesmith.jobs.queue import JobError
from tunesmith.pipeline.run import RunSummary, run
from tunesmith.project import FineTuningSettings, Project, ProjectSettings
from tunesmith.records.training import TrainingBody
from tunesmith.registry.versions import resolve
from tunesmith.store import uploads
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, FINE_TUNING, FileRow, JobRow
from tunesmith.store.uploads import FileGone
from tunesmith.training.settings import TrainSettings

PREFIX = "ft:"  # of the names of models
_LONGEST_NAME = 63
_RESULTS = "fine-tune-results"


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
    based = project.on_base(arguments.model)
    settings = based.settings
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
    candidates[name] = candidate.model_copy(update={"train": train})
    return based.with_settings(name=names[0], data=data, candidates=candidates, release=name)


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
    return changed(train, changes, "hyperparameters")


def model_name(job: JobRow) -> str:
    """The name that a job's model has, or will have: ft:MODEL:PROJECT:SUFFIX:NUMBER."""
    arguments = Arguments.model_validate(job.arguments)
    return f"{PREFIX}{arguments.model}:{job.project}:{arguments.suffix or ''}:{job.id}"


VALIDATING = "validating files"
# The columns of OpenAI's result files. Token accuracies are not measured, so these stay empty.
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_CODES = {"fail": "gate_failed", "inconclusive": "evidence_inconclusive"}


def perform_fine_tuning(project: Project, job: JobRow, progress: JobProgress) -> Outcome:
    """Perform a job. A verdict other than pass, and a file that cannot be used, are errors with a code of their own."""
    arguments = Arguments.model_validate(job.arguments)
    with contextlib.ExitStack() as opened:
        try:
            made = _checked(project, job, arguments, progress, opened)
            progress.logged = "training"
            summary = run(made, progress=progress, actor=job.created_by, scope=job.scope)
        except FileGone as error:
            return _file_gone(error)
        except InvalidExamples as error:
            return Outcome({}, JobError(code=error.code, what=error.what, param=error.where))
        except Inconclusive as error:
            return Outcome({}, JobError.of(error, code=_CODES["inconclusive"]))
        except (UsageError, FileNotFoundError):
            try:  # a file that was deleted meanwhile explains it
                _files(project, job, arguments, opened)
            except FileGone as gone:
                return _file_gone(gone)
            raise
        return _outcome(made, job, arguments, summary, progress)


def _checked(
    project: Project, job: JobRow, arguments: Arguments, progress: JobProgress, opened: contextlib.ExitStack
) -> Project:
    """The job's project, after its files were checked. They are there until `opened` is closed."""
    files = _files(project, job, arguments, opened)
    for field, (stored, path) in files.items():
        lines = 1 + stored.size // 200  # a guess, for the progress only
        progress.say(f"Validating {field.replace('_', ' ')}: {getattr(arguments, field)}")
        with progress.task(VALIDATING, lines) as task:
            try:
                count = check_examples(
                    path, FORMATS[OPENAI].read, training=field == "training_file", on_lines=task.advance
                )
            except InvalidExamples as error:
                error.what = f"The job failed due to an invalid {field.replace('_', ' ')}. {error.what}"
                error.where = field
                raise
        progress.say(f"{count} examples")
    progress.say("Files validated")
    uploaded = {
        field: Uploaded(str(path), f"upload-{stored.digest.removeprefix('sha256:')[:24]}{path.suffix}")
        for field, (stored, path) in files.items()
    }
    return derived(project, arguments, uploaded["training_file"], uploaded.get("validation_file"), job.scope)


def _files(
    project: Project, job: JobRow, arguments: Arguments, opened: contextlib.ExitStack
) -> dict[str, tuple[FileRow, Path]]:
    """The files of a job and where they are here until `opened` is closed, by the client's field. Raises FileGone."""
    files = {}
    for field in ("training_file", "validation_file"):
        if (identifier := getattr(arguments, field)) is None:
            continue
        try:
            stored = uploads.find(project.store, identifier, job.scope)
            if stored is None:
                raise FileGone("the file was deleted", fix="upload it again and create another job")
            files[field] = stored, opened.enter_context(uploads.local_file(project.store, stored))
        except FileGone as error:
            error.where = field
            raise
    return files


def _file_gone(error: FileGone) -> Outcome:
    return Outcome({}, JobError.of(error, code="file_deleted", param=error.where))


def _outcome(made: Project, job: JobRow, arguments: Arguments, summary: RunSummary, progress: JobProgress) -> Outcome:
    """The job's result with its file of metrics, and an error unless the verdict is a pass."""
    name = trained_name(made.settings)
    body = TrainingBody.read(made.store, summary.train[name].training)
    registered = None if summary.registered is None else summary.registered.version
    multiplier = arguments.hyperparameters.learning_rate_multiplier
    result = {
        **summary.without_paths(),
        FINE_TUNING: {
            "fine_tuned_model": model_name(job) if registered else None,
            "version": registered,
            "result_files": [_put_metrics(made, job, body)],
            "trained_tokens": body.tokens,
            "hyperparameters": {
                "n_epochs": body.settings.epochs,
                "batch_size": body.settings.batch,
                "learning_rate_multiplier": 1.0 if multiplier is None else multiplier,
            },
            "checkpoint": _metrics_at(body),
        },
    }
    rival = _better_rival(summary.evaluate, name)
    if summary.gate.verdict == "pass":
        if rival:
            progress.say(rival)
        command = f"`tunesmith approve {registered}{job.scope.options()}`"
        progress.say(f"registered {registered}; it can be called once it is approved: {command}")
        if stated(made.settings).models[arguments.model] is not None:
            progress.say(f"a server of its base answers: `tunesmith serve --base-of {arguments.model}`")
        return Outcome(result)
    more = "upload more examples and create another job; " if summary.gate.verdict == "inconclusive" else ""
    failed = [f"{gate.name} ({gate.reason})" for gate in summary.gate.gates if gate.outcome != "pass"]
    why = (
        "did not pass the gates" if summary.gate.verdict == "fail" else "could not be judged: the evidence decides not"
    )
    return Outcome(
        result,
        JobError(
            code=_CODES[summary.gate.verdict],
            what=f"The model was trained, but {why}: {'; '.join(failed) or 'the project has none'}. {rival}".strip(),
            where=f"verdict {summary.gate.digest}",
            fix=f"{more}the evidence is kept, under that digest",
        ),
    )


def _better_rival(measured: EvaluationSummary, tuned: str) -> str:
    """A sentence where a candidate without training is as good as the tuned one or better; else ""."""
    means = {name: metrics[measured.primary].mean for name, metrics in measured.candidates.items()}
    rivals = {name: mean for name, mean in means.items() if not measured.tuned.get(name)}
    best = max(rivals, key=rivals.__getitem__, default=None)
    if best is None or rivals[best] < means[tuned]:
        return ""
    return (
        f"Training did not pay: {best}, without training, reaches {measured.primary} {rivals[best]:.3f} on the "
        f"{measured.n} test rows, {tuned} {means[tuned]:.3f}."
    )


def _put_metrics(made: Project, job: JobRow, body: TrainingBody) -> str:
    """Keep the metrics of each step as a CSV file; returns its id, which is the same when the job is repeated."""
    text = io.StringIO()
    rows = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(_metric_rows(body))
    curve = [step.model_dump() for step in body.curve]
    identifier = f"file-{digest_of([FINE_TUNING, job.id, curve]).removeprefix('sha256:')[:24]}"
    with made.store.scratch() as folder:
        path = folder / "metrics"
        path.write_text(text.getvalue())
        stored = uploads.put(
            made.store, path, name="step_metrics.csv", purpose=_RESULTS, actor=job.created_by, scope=job.scope,
            file=identifier,
        )  # fmt: skip
    return stored.file


def _metric_rows(body: TrainingBody) -> Iterator[dict[str, float]]:
    validated = {each.step: {"valid_loss": each.loss} for each in body.validation}
    for point in body.curve:
        yield {"step": point.step, "train_loss": point.loss, **validated.get(point.step, {})}


def _metrics_at(body: TrainingBody) -> dict[str, float]:
    """The kept step's metrics, as a checkpoint states them."""
    return next((row for row in _metric_rows(body) if row["step"] == body.kept), {"step": body.kept})

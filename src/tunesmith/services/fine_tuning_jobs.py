"""Perform a fine-tuning job: check its files, run the project's pipeline on them, and say what came of it."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.progress import Task
from tunesmith.data.formats.openai_rules import InvalidExamples, check_examples
from tunesmith.evaluation.summary import EvaluationSummary
from tunesmith.jobs.performing import JobProgress, Outcome
from tunesmith.jobs.queue import JobError
from tunesmith.project import Project
from tunesmith.records.training import TrainingBody
from tunesmith.services import training
from tunesmith.services.fine_tuning import KIND, RESULTS, Arguments, Uploaded, derived, model_name, stated, trained_name
from tunesmith.services.training import RunSummary
from tunesmith.store import uploads
from tunesmith.store.tables import FileRow, JobRow
from tunesmith.store.uploads import FileGone

VALIDATING = "validating files"
# The columns of OpenAI's result files. Token accuracies are not measured, so these stay empty.
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_LINES_A_REPORT = 1000
_NOTES = 20  # events with the loss, in a training
_CODES = {"fail": "gate_failed", "inconclusive": "evidence_inconclusive"}


def perform_fine_tuning(project: Project, job: JobRow, progress: JobProgress) -> Outcome:
    """Perform a job. A verdict other than pass, and a file that cannot be used, are errors with a code of their own."""
    arguments = Arguments.model_validate(job.arguments)
    with contextlib.ExitStack() as opened:
        try:
            made = _checked(project, job, arguments, progress, opened)
            summary = training.run(made, progress=_WithLosses(progress), actor=job.created_by, scope=job.scope)
        except FileGone as error:
            return _file_gone(error)
        except InvalidExamples as error:
            return Outcome({}, JobError(code=error.code, what=error.what, param=error.where))
        except Inconclusive as error:
            return Outcome({}, _error(_CODES["inconclusive"], error))
        except (UsageError, FileNotFoundError):
            try:  # a file that was deleted meanwhile explains it
                _files(project, job, arguments, opened)
            except FileGone as gone:
                return _file_gone(gone)
            raise
        return _outcome(made, job, arguments, summary, progress)


class _WithLosses:
    """A Progress that adds the training's notes, with the loss, to the job's log: clients read its events."""

    def __init__(self, shown: JobProgress) -> None:
        self._shown = shown

    def say(self, text: str) -> None:
        """Add a line to the job's log."""
        self._shown.say(text)

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        """Add a point to the job's curves."""
        self._shown.measured(name, values)

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """Open a step of total units."""
        with self._shown.task(title, total) as task:
            yield _NotedTask(self, task, total) if title == "training" else task


class _NotedTask:
    def __init__(self, progress: _WithLosses, shown: Task, total: float) -> None:
        self._progress, self._shown, self._total = progress, shown, total
        self._done, self._said = 0.0, 0.0

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount
        self._shown.advance(amount)

    def note(self, text: str) -> None:
        self._shown.note(text)
        if self._done >= self._said:
            self._progress.say(f"Training is {self._done / self._total:.0%} done: {text}")
            self._said = self._done + self._total / _NOTES


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
                count = check_examples(path, training=field == "training_file", on_line=_every(task))
            except InvalidExamples as error:
                error.what = f"The job failed due to an invalid {field.replace('_', ' ')}. {error.what}"
                error.where = field
                raise
        progress.say(f"{count} examples")
    progress.say("Files validated")
    found = {
        field: Uploaded(str(path), f"upload-{stored.digest.removeprefix('sha256:')[:24]}{path.suffix}")
        for field, (stored, path) in files.items()
    }
    return derived(project, arguments, found["training_file"], found.get("validation_file"), job.scope)


def _every(task: Task) -> Any:
    """Report some lines at once, since each report costs time."""
    lines = 0

    def on_line() -> None:
        nonlocal lines
        lines += 1
        if lines % _LINES_A_REPORT == 0:
            task.advance(_LINES_A_REPORT)

    return on_line


def _files(
    project: Project, job: JobRow, arguments: Arguments, opened: contextlib.ExitStack
) -> dict[str, tuple[FileRow, Path]]:
    """The files of a job and where they are here until `opened` is closed, by the client's field. Raises FileGone."""
    found = {}
    for field in ("training_file", "validation_file"):
        identifier = getattr(arguments, field)
        if identifier is None:
            continue
        stored = uploads.find(project.store, identifier, job.scope)
        if stored is None:
            raise FileGone("the file was deleted", where=field, fix="upload it again and create another job")
        try:
            found[field] = stored, opened.enter_context(uploads.local_file(project.store, stored))
        except FileGone as error:
            error.where = field
            raise
    return found


def _file_gone(error: FileGone) -> Outcome:
    return Outcome({}, _error("file_deleted", error).model_copy(update={"param": error.where}))


def _error(code: str, error: Inconclusive | FileGone) -> JobError:
    return JobError(code=code, what=error.what, where=error.where, fix=error.fix)


def _outcome(made: Project, job: JobRow, arguments: Arguments, summary: RunSummary, progress: JobProgress) -> Outcome:
    """The job's result with its file of metrics, and an error unless the verdict is a pass."""
    name = trained_name(made.settings)
    body = TrainingBody.read(made.store, summary.train[name].training)
    registered = None if summary.registered is None else summary.registered.version
    multiplier = arguments.hyperparameters.learning_rate_multiplier
    result = {
        **summary.without_paths(),
        KIND: {
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


def _better_rival(found: EvaluationSummary, tuned: str) -> str:
    """A sentence where a candidate without training is as good as the tuned one or better; else ""."""
    means = {name: metrics[found.primary].mean for name, metrics in found.candidates.items()}
    rivals = {name: mean for name, mean in means.items() if not found.tuned.get(name)}
    best = max(rivals, key=rivals.__getitem__, default=None)
    if best is None or rivals[best] < means[tuned]:
        return ""
    return (
        f"Training did not pay: {best}, without training, reaches {found.primary} {rivals[best]:.3f} on the {found.n} "
        f"test rows, {tuned} {means[tuned]:.3f}."
    )


def _put_metrics(made: Project, job: JobRow, body: TrainingBody) -> str:
    """Keep the metrics of each step as a CSV file; returns its id, which is the same when the job is repeated."""
    text = io.StringIO()
    rows = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(_metric_rows(body))
    curve = [step.model_dump() for step in body.curve]
    identifier = f"file-{digest_of([KIND, job.id, curve]).removeprefix('sha256:')[:24]}"
    with made.store.scratch() as folder:
        path = folder / "metrics"
        path.write_text(text.getvalue())
        stored = uploads.put(
            made.store, path, name="step_metrics.csv", purpose=RESULTS, actor=job.created_by, scope=job.scope,
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

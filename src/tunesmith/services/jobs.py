"""Jobs: queue, change, show and perform them; also as fine-tuning jobs of OpenAI's clients."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from tunesmith.core import telemetry
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.system.machine import end_with_parent
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView, View
from tunesmith.holding.queue import tidy
from tunesmith.jobs import kinds, queue
from tunesmith.jobs.arguments import run_arguments
from tunesmith.jobs.fine_tuning import PREFIX, Arguments, Uploaded, derived, model_name
from tunesmith.jobs.leases import LEASE_SECONDS, has_ended
from tunesmith.jobs.places import make_places
from tunesmith.jobs.queue import Curve, JobFilter
from tunesmith.jobs.worker import Worker
from tunesmith.monitoring.cases import delete_expired
from tunesmith.project import Project
from tunesmith.records.training import TrainingBody
from tunesmith.services.actions import Acting, Number, Request, action
from tunesmith.services.monitoring import look_again
from tunesmith.store import uploads
from tunesmith.store.people.identities import User
from tunesmith.store.tables import FINE_TUNING, FINE_TUNING_JOB, FileRow, JobEventRow, JobRow, JobState
from tunesmith.training.beside import BESIDE, GAP, standing
from tunesmith.webhooks.sending import delivering, secrets_of

KINDS = tuple(kinds.KINDS)
STATES: tuple[JobState, ...] = get_args(JobState)


class JobView(ScopedView):
    """A job. Times are seconds since 1970, null for what has not happened.

    state: queued, running, paused, succeeded, failed or cancelled; wanted: the state that a person asked a running job
    to go to, "" where nobody did. worker: who performs it, or did last. silent: it runs, but its worker gave no sign of
    life until its lease ended, or was a process of this machine and has ended. progress: the step that it is at, with
    `done` of `total` and `seconds_left` for this step; {} between steps. result: what `tunesmith run --json` prints,
    without paths; {} where there is none. error: code, what, where and fix; {} where there is none. cause: why it was
    queued, "" where a person did it. changes: training settings, by candidate, that differ from the project file.
    """

    job: int
    kind: str
    cause: str
    changes: dict[str, dict[str, Any]]
    state: JobState
    wanted: str
    priority: int
    created_by: str
    key: str | None
    attempts: int
    most_attempts: int
    worker: str
    silent: bool
    progress: JsonObject
    result: JsonObject
    error: JsonObject
    created: float
    due: float
    started: float | None
    ended: float | None


class JobList(View):
    """Jobs, newest first. total: how many there are with those before and after them."""

    jobs: tuple[JobView, ...]
    total: int = Field(exclude=True)


class LogLine(View):
    """A line of a job's log. number: from 1. at: seconds since 1970."""

    number: int
    at: float
    message: str


class JobLog(View):
    """A job's log, oldest line first. state: the job's."""

    job: int
    state: JobState
    lines: tuple[LogLine, ...]


class AddJob(Request):
    """A job for a worker: a run of the project's pipeline.

    changes: training settings by candidate, for this job only. priority: jobs with a higher one are taken first. key:
    the same key again gives the same job.
    """

    kind: Literal["run"] = "run"
    changes: Annotated[dict[str, dict[str, int | float | str]], Field(default_factory=dict)]
    priority: int = Field(default=0, ge=-1000, le=1000)
    key: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class ChangeJob(Request):
    """A job to change. job: its number."""

    job: Number


@action(
    "job.add", says="queued a job", permission="job.add", tokens=("jobs",), at="/jobs", whole=True, form=True,
    refused="job_state", reads_files=True,
)  # fmt: skip
def add(acting: Acting, asked: AddJob) -> JobView:
    """Queue a run. It is for all tenants and regions, and so must its caller be."""
    acting.unchanged()
    project = acting.project
    row = queue.add(
        acting.store, asked.kind, run_arguments(project, asked.changes), project=project.settings.name,
        actor=acting.actor, priority=asked.priority, key=asked.key,
    )  # fmt: skip
    return _view(row, queue.time_now(acting.store), acting.user)


_change = partial(action, permission="job.change", tokens=("jobs",), form=True, refused="job_state")


@_change("job.cancel", says="cancelled a job", at="/jobs/{job}/cancel")
def cancel(acting: Acting, asked: ChangeJob) -> JobView:
    """End a job for good. A running one says so until it ends between two of its steps. Its checkpoints are kept."""
    return _changed(acting, asked, queue.cancel)


@_change("job.pause", says="paused a job", at="/jobs/{job}/pause")
def pause(acting: Acting, asked: ChangeJob) -> JobView:
    """Keep a job from being performed until it is resumed. A running one says so until it stops between two steps."""
    return _changed(acting, asked, queue.pause)


@_change("job.resume", says="resumed a job", at="/jobs/{job}/resume")
def resume(acting: Acting, asked: ChangeJob) -> JobView:
    """Put a paused job back into the queue. A training continues from its newest checkpoint."""
    return _changed(acting, asked, queue.resume)


def _changed(acting: Acting, asked: ChangeJob, change: Callable[..., JobRow]) -> JobView:
    _find(acting, asked.job)
    row = change(acting.store, asked.job, actor=acting.actor)
    return _view(row, queue.time_now(acting.store), acting.user)


# Reading. Everybody sees the jobs of their tenant and region.


def list_jobs(
    acting: Acting,
    *,
    states: Collection[str] = (),
    kinds: Collection[str] = (),
    by: str | None = None,
    before: int | None = None,
    first: int = 0,
    most: int = 100,
) -> JobList:
    """Jobs, newest first. states, kinds: only these; all where empty. by: only those that this user created.

    before: only those before this number. first: leave out as many of the newest. Raises UsageError for a state that
    jobs do not have.
    """
    store, user = acting.store, acting.user
    now, wanted = queue.time_now(store), JobFilter(_states(states), kinds, by, user.scope)
    rows = queue.list_jobs(store, wanted, before=before, first=first, most=most)
    return JobList(jobs=tuple(_view(job, now, user) for job in rows), total=queue.count_jobs(store, wanted))


def show(acting: Acting, number: int) -> JobView:
    """A job as it is now. Raises NotThere where there is none."""
    return _view(_find(acting, number), queue.time_now(acting.store), acting.user)


def log(acting: Acting, number: int, *, after: int = 0) -> JobLog:
    """The log of a job. after: only lines with a higher number. Raises NotThere where there is no such job."""
    state = _find(acting, number).state  # before the lines, so that an ended job's log is whole
    return _log(number, state, queue.events(acting.store, number, after), acting.user)


def newest_lines(acting: Acting, number: int, *, before: int | None = None, most: int = 100) -> JobLog:
    """The newest lines of a job's log, newest first. before: only lines with a lower number. Raises as `log` does."""
    state = _find(acting, number).state
    return _log(number, state, queue.events(acting.store, number, before=before, newest=most), acting.user)


def _find(acting: Acting, number: int) -> JobRow:
    job = queue.get(acting.store, number)
    if not acting.user.scope.covers(job.scope):
        raise queue.no_job(number)
    return job


def _states(names: Collection[str]) -> list[JobState]:
    if unknown := [name for name in names if name not in STATES]:
        raise UsageError(f"{unknown[0][:40]!r} is not a state of jobs", fix=f"name one of {', '.join(STATES)}")
    return [state for state in STATES if state in names]


def _view(job: JobRow, now: float, reader: User) -> JobView:
    silent = job.state == "running" and ((job.until is not None and job.until < now) or has_ended(job.worker))
    error = job.error
    if error and not _reads_all(reader):
        error = {name: for_client(said) if isinstance(said, str) else said for name, said in error.items()}
        if str(job.error.get("where")).startswith("/"):
            error["where"] = None
    return JobView.of(job, job=job.id, silent=silent, error=error)


def _log(number: int, state: JobState, rows: Sequence[JobEventRow], reader: User) -> JobLog:
    said = str if _reads_all(reader) else for_client
    lines = tuple(LogLine.of(row, message=said(row.message)) for row in rows)
    return JobLog(job=number, state=state, lines=lines)


# What people may read of logs and errors who do not run this server


_TRACEBACK = "Traceback (most recent call last)"
_END = r"\s'\"`,;:()"  # what ends an unquoted path
# An absolute path: between quotes, after file://, or as a word. Not the path of another URL. Names of folders may have
# spaces: up to three words are part of the path where a slash follows in the last of them.
_MORE = rf"(?:(?: [^{_END}/]+){{1,3}}/[^{_END}]*)*"
_PATH = re.compile(
    rf"""(?<=')/[^'\n]+(?=')|(?<=")/[^"\n]+(?=")"""
    rf"""|(?:file://\S+|(?<![\w./:])/[^{_END}]+|(?<=:)/(?!/)[^{_END}]+){_MORE}"""
)


def for_client(text: str) -> str:
    """A text without what is the operators' alone: tracebacks, and paths of this machine."""
    return "an internal error; its traceback is in the operators' log" if _TRACEBACK in text else _PATH.sub("...", text)


def _reads_all(reader: User) -> bool:
    return reader.scope.unlimited and reader.may("job.change")


# Curves


class CurvePoint(View):
    """A step. loss: on its training rows; validation_loss, score: on the validation rows, None where it was not
    validated, and where answers were not scored."""

    model_config = ConfigDict(extra="ignore")

    step: int
    loss: float
    validation_loss: float | None = None
    score: Annotated[float | None, Field(validation_alias="validation_score")] = None


class TrainingCurve(View):
    """A training of a job. name: the candidate's. metric: what the score is, "" where that is not known yet.

    earlier: it was not trained by this job, which took the result of an earlier training of the same inputs.
    rival: the best untuned candidate, with its score on the validation rows that are scored, "" and None where none is
    compared; standing: since when the training is better or worse than it, in a sentence, "" where neither is known.
    expected_seconds, expected_memory_bytes: predicted before its first step; memory_bytes: the most that it used. None
    where they are not known. points: at most a few hundred of its steps, and every validated one.
    """

    name: str
    metric: str
    earlier: bool
    rival: str
    rival_score: float | None
    standing: str
    expected_seconds: float | None
    expected_memory_bytes: float | None
    memory_bytes: float | None
    points: tuple[CurvePoint, ...]


class JobCurves(View):
    """The trainings of a job."""

    job: int
    trainings: tuple[TrainingCurve, ...]


def curves(acting: Acting, number: int) -> JobCurves:
    """The trainings of a job, also while it runs. Raises NotThere where there is no such job."""
    store, job = acting.store, _find(acting, number)
    trained = job.result.get("train", {})
    shown = {name: _curve(name, trained.get(name, {}), each) for name, each in queue.read_curves(store, number).items()}
    for name, summary in trained.items():
        if name not in shown:
            with contextlib.suppress(Refused, UsageError):  # the store no longer has it
                curve = queue.curve_of(TrainingBody.read(store, summary["training"]))
                shown[name] = _curve(name, summary, curve, earlier=True)
    order = {name: place for place, name in enumerate(trained)}
    names = sorted(shown, key=lambda name: order.get(name, len(order)))
    return JobCurves(job=number, trainings=tuple(shown[name] for name in names))


def _curve(name: str, summary: Fields, curve: Curve, *, earlier: bool = False) -> TrainingCurve:
    """summary: of the training, {} where it has not ended."""
    beside = {key.removeprefix(BESIDE): score for key, score in curve.expected.items() if key.startswith(BESIDE)}
    rival, score = next(iter(beside.items()), ("", None))
    gaps = {int(each["step"]): (each[GAP[0]], each[GAP[1]], each[GAP[2]]) for each in curve.points if GAP[0] in each}
    return TrainingCurve(
        name=name,
        metric=(summary.get("score") or {}).get("metric", ""),
        earlier=earlier,
        rival=rival,
        rival_score=score,
        standing=standing(rival, gaps)[1],
        expected_seconds=curve.expected.get("expected_seconds"),
        expected_memory_bytes=curve.expected.get("expected_memory_bytes"),
        memory_bytes=curve.memory_bytes or None,
        points=tuple(CurvePoint.model_validate(each) for each in curve.points),
    )


# A worker: what it does besides performing jobs, and the one that a server starts


# Seconds until a worker that ended is started again.
_PAUSE = 1.0
# Seconds that a worker waits before it ends where it cannot start.
_LONG_PAUSE = 30.0


@contextlib.contextmanager
def working(
    project: Project,
    say: Callable[[str], None],
    *,
    at_once: int | None = None,
    lease_seconds: float = LEASE_SECONDS,
    tidies: bool = True,
) -> Iterator[Worker]:
    """A worker for a project's jobs, to be run. Until it is left, the project's events are sent to webhooks.

    Now and then it also queues a run where `retraining:` says that a new version is due. tidies: it deletes kept
    requests whose time is over, too, and decides on held answers at their deadline, as a server does.
    at_once: jobs that are performed at the same time, each on its share of this machine's cores and GPUs; by default
    one, or one for each GPU where there are several. With `jobs: {runner: ray}`: jobs that are given to the cluster at
    the same time; by default as many as it has room for. Raises UsageError or Refused where that cannot be, where a
    webhook's secret is missing, and where OpenTelemetry is set up in a way that cannot be honoured.
    """
    telemetry.check()  # here, and not first in the process of a job
    store, settings = project.store, project.settings

    def also() -> None:
        if tidies:  # before what may fail by the project file or its sources
            delete_expired(store)
            tidy(store)
        look_again(project.root, say)

    places = make_places(project, at_once, say)
    worker = Worker(store, settings.name, kinds.KINDS, places, lease_seconds=lease_seconds, say=say, also=also)
    with delivering(store, settings.name, settings.webhooks, say):
        yield worker


class OwnWorker:
    """A worker for a project, started again when it ends. say: shows a line, in either process.

    Raises UsageError where a webhook's secret is missing.
    """

    def __init__(self, project: Project, say: Callable[[str], None]) -> None:
        secrets_of(project.settings.webhooks)
        self._root, self._say = project.root, say
        self._stopping = threading.Event()
        self._process: BaseProcess | None = None
        self._started = threading.Lock()
        # A daemon, but it lives as long as the process: Linux ends the worker with the thread that started it.
        self._thread = threading.Thread(target=self._keep, name="own worker", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Stop the worker: its jobs go back into the queue. It is killed after some seconds, which loses only time."""
        with self._started:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(seconds)
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _keep(self) -> None:
        while True:
            with self._started:
                if self._stopping.is_set():
                    return
                self._process = multiprocessing.get_context("spawn").Process(
                    target=_work, args=(self._root, os.getpid(), self._say), name="worker"
                )
                self._process.start()
            self._process.join()
            if self._stopping.wait(_PAUSE):
                return
            self._say(f"the worker ended with exit code {self._process.exitcode}; another one is started")


def _work(root: Path, parent: int, say: Callable[[str], None]) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the server too, which stops this process in order
    with contextlib.ExitStack() as opened:
        try:
            worker = opened.enter_context(working(Project.load(root), say, tidies=False))
        except TunesmithError as error:  # a cluster that cannot be reached may come back
            say(f"the worker cannot start: {error}")
            time.sleep(_LONG_PAUSE)
            return
        signal.signal(signal.SIGTERM, lambda *_: worker.stopping.set())  # after Ray has set its own
        worker.run()


# Fine-tuning jobs of OpenAI's clients


_PAGE = 100
_NUMBER = re.compile("[1-9][0-9]{0,8}")


class UnknownModel(UsageError):
    """The project names no such model for fine-tuning."""


class NotYet(UsageError):
    """A job of this name exists, but no version came of it (yet)."""


def add_fine_tuning(acting: Acting, arguments: Arguments, *, key: str | None = None) -> JobRow:
    """Queue a fine-tuning job. key: an idempotency key. The job is for the tenant and region of its files.

    Raises UnknownModel; UsageError, where: the client's field, for what the project cannot do; Forbidden where the user
    may not add jobs; Refused where the project file changed.
    """
    acting.unchanged()
    project = acting.project
    known = project.settings.fine_tuning
    if known is None or arguments.model not in known.models:
        raise UnknownModel(f"there is no model {arguments.model!r} to fine-tune", where="model")
    training = _file(acting, arguments.training_file, "training_file")
    others = None
    if arguments.validation_file is not None:
        validation = _file(acting, arguments.validation_file, "validation_file")
        if validation.scope != training.scope or validation.file == training.file:
            what = "the validation file must be another file of the same tenant and region"
            raise UsageError(what, where="validation_file")
        others = Uploaded("validation.jsonl", "validation.jsonl")
    derived(project, arguments, Uploaded("training.jsonl", "training.jsonl"), others, training.scope)
    return queue.add(
        acting.store,
        FINE_TUNING,
        arguments.model_copy(update={"settings": project.settings.digest}).document(),
        project=project.settings.name,
        actor=acting.actor,
        key=key,
        scope=training.scope,
    )


def find_fine_tuning(acting: Acting, identifier: str) -> JobRow | None:
    """A fine-tuning job by its id (ftjob-7); None where there is none that the user's scope covers."""
    number = identifier.removeprefix(FINE_TUNING_JOB)
    if not identifier.startswith(FINE_TUNING_JOB) or not _NUMBER.fullmatch(number):
        return None
    with contextlib.suppress(UsageError):
        job = _find(acting, int(number))
        if job.kind == FINE_TUNING:
            return job
    return None


def list_fine_tuning(
    acting: Acting, *, before: int | None, most: int, metadata: Mapping[str, str] | None
) -> list[JobRow]:
    """Fine-tuning jobs that the user's scope covers, newest first.

    metadata: only jobs with these pairs; None: only jobs without any.
    """

    def wanted(job: JobRow) -> bool:
        own = job.arguments.get("metadata") or {}
        return not own if metadata is None else own.items() >= metadata.items()

    return list(islice(filter(wanted, _fine_tuning(acting, before)), most))


def _fine_tuning(acting: Acting, before: int | None) -> Iterator[JobRow]:
    wanted = JobFilter(kinds=[FINE_TUNING], scope=acting.user.scope)
    while page := queue.list_jobs(acting.store, wanted, before=before, most=_PAGE):
        yield from page
        before = page[-1].id


def _file(acting: Acting, identifier: str, field: str) -> FileRow:
    stored = uploads.find(acting.store, identifier, acting.user.scope)
    if stored is None:
        raise UsageError(f"invalid {field}: {identifier[:80]}", where=field)
    if stored.purpose != uploads.PURPOSE:
        said = f"invalid {field}: {identifier} has the purpose {stored.purpose}, not {uploads.PURPOSE}"
        raise UsageError(said, where=field)
    return stored


def version_behind(session: Session, name: str, scope: Scope) -> str | None:
    """The label of the version behind a `ft:` name; None for a name of another form. scope: the caller's.

    Raises NotYet where the job has none, UsageError where there is no such job for the caller.
    """
    if not name.startswith(PREFIX):
        return None
    number = name.rsplit(":", 1)[-1]
    row = session.get(JobRow, int(number)) if _NUMBER.fullmatch(number) else None
    if row is None or not row.scope.covers(scope) or row.kind != FINE_TUNING or model_name(row) != name:
        raise UsageError(f"there is no model {name!r}")
    if row.state == "succeeded":
        return str(row.result[FINE_TUNING]["version"])
    why = f": {row.error['code']}" if row.error else ""
    raise NotYet(f"its fine-tuning job {FINE_TUNING_JOB}{row.id} is {row.state}{why}")

"""Jobs: queue, change and show them; perform them here or by a worker."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, model_validator

from tunesmith.core import telemetry
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.system.machine import end_with_parent
from tunesmith.core.telemetry import names
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView, View
from tunesmith.jobs import curves as noted
from tunesmith.jobs import leases, queue
from tunesmith.jobs.arguments import Changes, project_of, run_arguments, with_changes
from tunesmith.jobs.curves import Curve
from tunesmith.jobs.leases import LEASE_SECONDS, Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.project_places import make_places
from tunesmith.jobs.queue import JobError
from tunesmith.jobs.worker import Worker, has_ended, worker_name
from tunesmith.pipeline.training import only_tuned
from tunesmith.project import Project, open_store
from tunesmith.records.training import TrainingBody
from tunesmith.registry.versions import get_alias
from tunesmith.services import training
from tunesmith.services.actions import Acting, Request, Short, action
from tunesmith.services.fine_tuning import perform_fine_tuning
from tunesmith.services.training import RunSummary, forecast
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import FINE_TUNING, JobEventRow, JobRow, JobState

STATES: tuple[JobState, ...] = get_args(JobState)


class JobView(ScopedView):
    """A job. Times are seconds since 1970, null for what has not happened.

    state: queued, running, paused, succeeded, failed or cancelled; wanted: the state that a person asked a running job
    to go to, "" where nobody did. worker: who performs it, or did last. silent: it runs, but its worker gave no sign of
    life until its lease ended, or was a process of this machine and has ended. progress: the step that it is at, with
    `done` of `total` and `seconds_left` for this step; {} between steps. result: what `tunesmith run --json` or
    `tunesmith forecast --json` prints, without paths; {} where there is none. error: code, what, where and fix; {}
    where there is none. cause: why it was queued, "" where a person did it. changes: training settings, by candidate,
    that differ from the project file.
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
    """Jobs, newest first."""

    jobs: tuple[JobView, ...]


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
    """A job for a worker: a run of the project's pipeline, or a forecast of the training of a candidate.

    kind: by default a forecast where a candidate is named, else a run. candidate: that is forecast, by default the only
    one that is trained. changes: training settings by candidate, for this job only. priority: jobs with a higher one
    are taken first. key: the same key again gives the same job.
    """

    kind: Literal["run", "forecast"] | None = None
    candidate: Short | None = None
    changes: Annotated[dict[str, dict[str, int | float | str]], Field(default_factory=dict)]
    priority: int = Field(default=0, ge=-1000, le=1000)
    key: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> AddJob:
        if self.kind == "run" and self.candidate is not None:
            raise ValueError("candidate is for forecasts")
        return self


class ChangeJob(Request):
    """A job to change. job: its number."""

    job: int = Field(ge=1, le=2**31 - 1)


@action(
    "job.add", says="queued a job", permission="job.add", tokens=("jobs",), at="/jobs", whole=True, form=True,
    refused="job_state", reads_files=True,
)  # fmt: skip
def add(acting: Acting, asked: AddJob) -> JobView:
    """Queue a run or a forecast. It is for all tenants and regions, and so must its caller be."""
    project = acting.project.read_again()
    kind = asked.kind or ("run" if asked.candidate is None else "forecast")
    arguments = run_arguments(project, asked.changes)
    if kind == "forecast":
        arguments["candidate"] = named = asked.candidate or only_tuned(project)
        if named not in (trained := project.settings.tuned):
            raise UsageError(f"no candidate {named!r} is trained", fix=f"name one of {', '.join(trained)}")
    row = queue.add(
        acting.store, kind, arguments, project=project.settings.name, actor=acting.actor, priority=asked.priority,
        key=asked.key,
    )  # fmt: skip
    return _view(row, queue.time_now(acting.store), acting.user)


@action(
    "job.cancel", says="cancelled a job", permission="job.change", tokens=("jobs",), at="/jobs/{job}/cancel",
    form=True, refused="job_state",
)  # fmt: skip
def cancel(acting: Acting, asked: ChangeJob) -> JobView:
    """End a job for good. A running one ends between two of its steps, and its checkpoints are kept."""
    return _changed(acting, asked, queue.cancel)


@action(
    "job.pause", says="paused a job", permission="job.change", tokens=("jobs",), at="/jobs/{job}/pause", form=True,
    refused="job_state",
)  # fmt: skip
def pause(acting: Acting, asked: ChangeJob) -> JobView:
    """Keep a job from being performed until it is resumed. A running one stops between two of its steps."""
    return _changed(acting, asked, queue.pause)


@action(
    "job.resume", says="resumed a job", permission="job.change", tokens=("jobs",), at="/jobs/{job}/resume", form=True,
    refused="job_state",
)  # fmt: skip
def resume(acting: Acting, asked: ChangeJob) -> JobView:
    """Put a paused job back into the queue. A training continues from its newest checkpoint."""
    return _changed(acting, asked, queue.resume)


def _changed(acting: Acting, asked: ChangeJob, change: Callable[..., JobRow]) -> JobView:
    _find(acting.store, asked.job, acting.user)
    row = change(acting.store, asked.job, actor=acting.actor)
    return _view(row, queue.time_now(acting.store), acting.user)


# Reading. reader: who reads, who sees the jobs of their tenant and region only; None: whoever runs this machine.


def list_jobs(
    store: Store,
    reader: User | None = None,
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
    now, scope = queue.time_now(store), _scope(reader)
    found = queue.list_jobs(
        store, states=_states(states), kinds=kinds, by=by, before=before, first=first, most=most, scope=scope
    )
    return JobList(jobs=tuple(_view(job, now, reader) for job in found))


def count_jobs(
    store: Store,
    reader: User | None = None,
    *,
    states: Collection[str] = (),
    kinds: Collection[str] = (),
    by: str | None = None,
) -> int:
    """How many jobs `list_jobs` would list without an end."""
    return queue.count_jobs(store, states=_states(states), kinds=kinds, by=by, scope=_scope(reader))


def show(store: Store, number: int, reader: User | None = None) -> JobView:
    """A job as it is now. Raises NotThere where there is none."""
    return _view(_find(store, number, reader), queue.time_now(store), reader)


def log(store: Store, number: int, reader: User | None = None, *, after: int = 0) -> JobLog:
    """The log of a job. after: only lines with a higher number. Raises NotThere where there is no such job."""
    state = _find(store, number, reader).state  # before the lines, so that an ended job's log is whole
    return _log(number, state, queue.events(store, number, after), reader)


def newest_lines(
    store: Store, number: int, reader: User | None = None, *, before: int | None = None, most: int = 100
) -> JobLog:
    """The newest lines of a job's log, newest first. before: only lines with a lower number. Raises as `log` does."""
    state = _find(store, number, reader).state
    return _log(number, state, queue.newest_events(store, number, before=before, most=most), reader)


def _find(store: Store, number: int, reader: User | None) -> JobRow:
    job = queue.get(store, number)
    if not _scope(reader).covers(job.scope):
        raise queue.no_job(number)
    return job


def _scope(reader: User | None) -> Scope:
    return Scope() if reader is None else reader.scope


def _states(names: Collection[str]) -> list[JobState]:
    if unknown := [name for name in names if name not in STATES]:
        raise UsageError(f"{unknown[0][:40]!r} is not a state of jobs", fix=f"name one of {', '.join(STATES)}")
    return [state for state in STATES if state in names]


def _view(job: JobRow, now: float, reader: User | None) -> JobView:
    silent = job.state == "running" and ((job.until is not None and job.until < now) or has_ended(job.worker))
    error = job.error
    if error and not _reads_all(reader):
        error = {name: for_client(said) if isinstance(said, str) else said for name, said in error.items()}
        if str(job.error.get("where")).startswith("/"):
            error["where"] = None
    return JobView.of(job, job=job.id, silent=silent, error=error)


def _log(number: int, state: JobState, rows: Sequence[JobEventRow], reader: User | None) -> JobLog:
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


def _reads_all(reader: User | None) -> bool:
    return reader is None or (reader.scope.unlimited and reader.may("job.change"))


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
    expected_seconds, expected_memory_bytes: predicted before its first step; memory_bytes: the most that it used. None
    where they are not known. points: at most a few hundred of its steps, and every validated one.
    """

    name: str
    metric: str
    earlier: bool
    expected_seconds: float | None
    expected_memory_bytes: float | None
    memory_bytes: float | None
    points: tuple[CurvePoint, ...]


class JobCurves(View):
    """The trainings of a job."""

    job: int
    trainings: tuple[TrainingCurve, ...]


def curves(store: Store, number: int, reader: User | None = None) -> JobCurves:
    """The trainings of a job, also while it runs. Raises NotThere where there is no such job."""
    job = _find(store, number, reader)
    trained = job.result.get("train", {})
    found = {name: _curve(name, trained.get(name, {}), each) for name, each in noted.read(store, number).items()}
    for name, summary in trained.items():
        if name not in found:
            with contextlib.suppress(Refused, UsageError):  # the store no longer has it
                curve = noted.curve_of(TrainingBody.read(store, summary["training"]))
                found[name] = _curve(name, summary, curve, earlier=True)
    order = {name: place for place, name in enumerate(trained)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return JobCurves(job=number, trainings=tuple(found[name] for name in names))


def _curve(name: str, summary: Fields, curve: Curve, *, earlier: bool = False) -> TrainingCurve:
    """summary: of the training, {} where it has not ended."""
    return TrainingCurve(
        name=name,
        metric=(summary.get("score") or {}).get("metric", ""),
        earlier=earlier,
        expected_seconds=curve.expected.get("expected_seconds"),
        expected_memory_bytes=curve.expected.get("expected_memory_bytes"),
        memory_bytes=curve.memory_bytes or None,
        points=tuple(CurvePoint.model_validate(each) for each in curve.points),
    )


def run_here(
    project: Project,
    *,
    changes: Changes = MappingProxyType({}),
    progress: Progress = SILENT,
    actor: str | None = None,
) -> RunSummary:
    """Run the whole pipeline in this process, as a job that others see in the list of jobs.

    changes: training settings of this run that differ from the project file.

    Raises what `training.run` raises, and TunesmithError where somebody stopped the job.
    """
    telemetry.check()
    by = project.actor(actor)
    arguments, name = run_arguments(project, changes), project.settings.name
    lease = leases.begin(project.store, worker_name(), "run", arguments, project=name, actor=by)
    project, done = with_changes(project, changes), list[RunSummary]()

    def work(progress: JobProgress) -> Outcome:
        with telemetry.span(names.JOB_SPAN, _traced(lease.job, "run", name)):
            return _run(project, by, done, progress)

    try:
        with telemetry.sending():
            perform(project.store, lease, work, shown=progress)
    except Stopped:
        state = queue.get(project.store, lease.job).state
        raise TunesmithError(
            f"the run was stopped: its job is {state}",
            where=f"job {lease.job}",
            fix=NextStep("see by whom; another run continues from here", "jobs log", job=lease.job),
        ) from None
    return done[0]


def _run(project: Project, actor: str, done: list[RunSummary], progress: JobProgress) -> Outcome:
    """Run the whole pipeline; its summary is appended to done. A verdict other than pass is an error."""
    summary = training.run(project, progress=progress, actor=actor)
    done.append(summary)
    verdict, result = summary.gate.verdict, summary.without_paths()
    if verdict == "pass":
        return Outcome(result)
    failed = [gate.name for gate in summary.gate.gates if gate.outcome != "pass"]
    error = JobError(
        code=f"verdict_{verdict}",
        what=f"the verdict is {verdict}: {', '.join(failed) or 'there are no gates'}",
        where=f"verdict {summary.gate.digest}",
        fix="read the report of the evaluation",
    )
    return Outcome(result, error)


def _perform_run(project: Project, job: JobRow, progress: JobProgress) -> Outcome:
    """Perform a queued run."""
    done = list[RunSummary]()
    if not job.cause:
        return _run(project, job.created_by, done, progress)
    progress.say(f"queued because of {job.cause}")
    outcome = _run(project, job.created_by, done, progress)
    made, champion = done[0].registered, get_alias(project.store, project.settings.name)
    if made is None or champion is None or made.digest != champion.version:
        return outcome
    error = JobError(
        code="nothing_new",
        what=f"rows and settings are those of {made.version}, so the run gave the same version",
        where=job.cause,
        fix="add rows or change settings, then run again",
    )
    return Outcome(outcome.result, error)


def _perform_forecast(project: Project, job: JobRow, progress: JobProgress) -> Outcome:
    """Perform a queued forecast."""
    found = forecast(project, job.arguments["candidate"], progress=progress, actor=job.created_by)
    progress.say(found.headline)
    return Outcome(found.model_dump(mode="json"))


_KINDS: Mapping[str, Callable[[Project, JobRow, JobProgress], Outcome]] = {
    "run": _perform_run,
    "forecast": _perform_forecast,
    FINE_TUNING: perform_fine_tuning,
}

KINDS = tuple(_KINDS)


# The worker


def make_worker(
    project: Project,
    *,
    at_once: int | None = None,
    lease_seconds: float = LEASE_SECONDS,
    say: Callable[[str], None] = lambda _: None,
    also: Callable[[], None] = lambda: None,
) -> Worker:
    """A worker for a project's jobs. also: is called now and then besides.

    at_once: jobs that are performed at the same time, each on its share of this machine's cores and GPUs; by default
    one, or one for each GPU where there are several. With `jobs: {runner: ray}`: jobs that are given to the cluster at
    the same time; by default as many as it has room for. Raises UsageError or Refused where that cannot be, and where
    OpenTelemetry is set up in a way that cannot be honoured.
    """
    telemetry.check()  # here, and not first in the process of a job
    return Worker(
        project.store,
        project.settings.name,
        list(_KINDS),
        make_places(project, at_once, perform_in_child, say),
        lease_seconds=lease_seconds,
        say=say,
        also=also,
    )


def tidy_up(project: Project, say: Callable[[str], None]) -> None:
    """What a worker does besides where no server does it: look after kept requests and held answers, and retrain."""
    from tunesmith.monitoring import cases
    from tunesmith.services import retraining, review

    cases.delete_expired(project.store)  # before what may fail by the project file or its sources
    review.tidy(project.store)
    retraining.look_again(project.root, say)


def perform_in_child(root: Path, lease: Lease, parent: int) -> None:
    """Perform a job in this process. parent: the number of the process that started it, and with which it ends."""
    end_with_parent(parent)
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the worker too, which ends this process in order
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    store = open_store(root)
    job = queue.get(store, lease.job)

    def work(progress: JobProgress) -> Outcome:
        project = Project.load(root)
        project.store = store
        made = project_of(project, job)
        with telemetry.span(names.JOB_SPAN, _traced(job.id, job.kind, job.project)):
            return _KINDS[job.kind](made, job, progress)

    with contextlib.suppress(Exception), telemetry.sending():  # it is recorded
        perform(store, lease, work, stopping=stopping)


def _traced(job: int, kind: str, project: str) -> dict[str, str | int]:
    """What a job's span states."""
    return {names.JOB: job, names.JOB_KIND: kind, names.PROJECT: project}


# The worker that a server starts


# Seconds until a worker that ended is started again.
_PAUSE = 1.0
# Seconds that a worker waits before it ends where it cannot start.
_LONG_PAUSE = 30.0


class OwnWorker:
    """A worker for the project in a folder, started again when it ends. say: shows a line, in either process."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say
        self._stopping = threading.Event()
        self._process: BaseProcess | None = None
        self._started = threading.Lock()
        # A daemon, but it lives as long as the process: Linux ends the worker with the thread that started it.
        self._thread = threading.Thread(target=self._keep, name="own worker", daemon=True)
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
    from tunesmith.services.monitoring import check_secrets, delivering  # what they import, other runs do not need
    from tunesmith.services.retraining import look_again

    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the server too, which stops this process in order
    try:
        project = Project.load(root)
        worker = make_worker(project, say=say, also=partial(look_again, root, say))
        check_secrets(project)
    except TunesmithError as error:  # a cluster that cannot be reached may come back
        say(f"the worker cannot start: {error}")
        time.sleep(_LONG_PAUSE)
        return
    signal.signal(signal.SIGTERM, lambda *_: worker.stopping.set())  # after Ray has set its own
    with delivering(project, say):
        worker.run()

"""Queue a run, perform it here or by a worker, and show jobs with their progress and log."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunesmith.core import telemetry
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.scope import Scope
from tunesmith.core.system.processes import end_with_parent
from tunesmith.core.telemetry import names
from tunesmith.core.view import View
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import LEASE_SECONDS, Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.state import STATES, Job, State
from tunesmith.jobs.worker import ALSO_SECONDS, Worker, has_ended, worker_name
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project, open_store
from tunesmith.registry.aliases import get_alias
from tunesmith.services.fine_tuning.arguments import KIND
from tunesmith.services.fine_tuning.perform import perform_fine_tuning
from tunesmith.services.runs import training
from tunesmith.services.runs.forecast import forecast
from tunesmith.services.runs.job_places import make_places
from tunesmith.services.runs.run_settings import Changes, project_of, run_arguments, with_changes
from tunesmith.services.runs.training import RunSummary
from tunesmith.store.people.identities import acting
from tunesmith.store.store import Store


class JobView(View):
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
    state: State
    wanted: str
    priority: int
    tenant: str
    region: str
    created_by: str
    key: str | None
    attempts: int
    most_attempts: int
    worker: str
    silent: bool
    progress: dict[str, Any]
    result: dict[str, Any]
    error: dict[str, Any]
    created: float
    due: float
    started: float | None
    ended: float | None

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)


class JobList(View):
    """Jobs, newest first."""

    jobs: tuple[JobView, ...]


class JobPage(JobList):
    """A page of jobs. total: how many there are on all pages."""

    total: int


class LogLine(View):
    """A line of a job's log. number: from 1. at: seconds since 1970."""

    number: int
    at: float
    message: str


class JobLog(View):
    """A job's log, oldest line first. state: the job's."""

    job: int
    state: State
    lines: tuple[LogLine, ...]


def queue_run(
    project: Project,
    *,
    changes: Changes = MappingProxyType({}),
    priority: int = 0,
    key: str | None = None,
    cause: str = "",
    actor: str | None = None,
) -> JobView:
    """Queue a run of the whole pipeline for a worker.

    changes: training settings of this run that differ from the project file. key: an idempotency key: given again by
    the same person with the same settings, it gives the same job. cause: why the run is queued, where no person did it.
    Raises UsageError for changes that are not valid.
    """
    job = queue.add(
        project.store,
        "run",
        run_arguments(project, changes) | ({"cause": cause} if cause else {}),
        project=project.settings.name,
        actor=project.actor(actor),
        priority=priority,
        key=key,
    )
    return view_of(project.store, job)


def queue_forecast(
    project: Project,
    name: str | None = None,
    *,
    changes: Changes = MappingProxyType({}),
    priority: int = 0,
    actor: str | None = None,
) -> JobView:
    """Queue a forecast of a candidate's training, by default that of the only one that is trained.

    changes: as in `queue_run`. Raises UsageError where no candidate of this name is trained.
    """
    named = name or training.only_tuned(project)
    if named not in tuned_names(project):
        raise UsageError(
            f"no candidate {named[:80]!r} is trained", fix=f"name one of {', '.join(tuned_names(project))}"
        )
    job = queue.add(
        project.store,
        "forecast",
        run_arguments(project, changes) | {"candidate": named},
        project=project.settings.name,
        actor=project.actor(actor),
        priority=priority,
    )
    return view_of(project.store, job)


def run_here(
    project: Project,
    *,
    changes: Changes = MappingProxyType({}),
    progress: Progress = SILENT,
    actor: str | None = None,
) -> RunSummary:
    """Run the whole pipeline in this process, as a job that others see in the list of jobs. changes: as in `queue_run`.

    Raises what `training.run` raises, and TunesmithError where somebody stopped the job.
    """
    telemetry.check()
    by = project.actor(actor)
    lease = leases.begin(
        project.store,
        worker_name(),
        "run",
        run_arguments(project, changes),
        project=project.settings.name,
        actor=by,
    )
    project, done = with_changes(project, changes), list[RunSummary]()

    def work(progress: JobProgress) -> Outcome:
        with telemetry.span(names.JOB_SPAN, _traced(lease.job, "run", project.settings.name)):
            return _run(project, by, done, progress)

    try:
        with telemetry.sending():
            perform(project.store, lease, work, shown=progress)
    except Stopped:
        state = queue.get(project.store, lease.job).state
        raise TunesmithError(
            f"the run was stopped: its job is {state}",
            where=f"job {lease.job}",
            fix=f"`tunesmith jobs log {lease.job}` says by whom; `tunesmith run` continues from here",
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
    error = {
        "code": f"verdict_{verdict}",
        "what": f"the verdict is {verdict}: {', '.join(failed) or 'there are no gates'}",
        "where": f"verdict {summary.gate.digest}",
        "fix": "`tunesmith report` says why and what to do",
    }
    return Outcome(result, error)


def cause_of(job: Job) -> str:
    """Why a run was queued, where no person did it; "" where one did."""
    return str(job.arguments.get("cause", ""))


def _perform_run(project: Project, job: Job, progress: JobProgress) -> Outcome:
    """Perform a queued run."""
    cause = cause_of(job)
    if not cause:
        return _run(project, job.created_by, [], progress)
    progress.say(f"queued because of {cause}")
    done: list[RunSummary] = []
    outcome = _run(project, job.created_by, done, progress)
    made, champion = done[0].registered, get_alias(project.store, project.settings.name, "champion")
    if made is None or champion is None or made.digest != champion.version:
        return outcome
    error = {
        "code": "nothing_new",
        "what": f"rows and settings are those of {made.version}, so the run gave the same version",
        "where": cause,
        "fix": "add rows or change settings, then `tunesmith run`",
    }
    return Outcome(outcome.result, error)


def _perform_forecast(project: Project, job: Job, progress: JobProgress) -> Outcome:
    """Perform a queued forecast."""
    found = forecast(project, job.arguments["candidate"], progress=progress, actor=job.created_by)
    progress.say(found.headline)
    return Outcome(found.document())


_KINDS: Mapping[str, Callable[[Project, Job, JobProgress], Outcome]] = {
    "run": _perform_run,
    "forecast": _perform_forecast,
    KIND: perform_fine_tuning,
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
    also_every: float = ALSO_SECONDS,
) -> Worker:
    """A worker for a project's jobs. also: is called every so many seconds besides.

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
        also_every=also_every,
    )


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


# Reading and changing


def list_jobs(
    store: Store,
    *,
    states: Collection[State] = (),
    kinds: Collection[str] = (),
    before: int | None = None,
    most: int = 100,
    scope: Scope = Scope(),
) -> JobList:
    """Jobs, newest first. states, kinds: only these; all where empty. before: only those before this number.

    scope: only jobs that it covers.
    """
    now = queue.time_now(store)
    found = queue.list_jobs(store, states=states, kinds=kinds, before=before, most=most, scope=scope)
    return JobList(jobs=tuple(_view(job, now) for job in found))


def page_of_jobs(
    store: Store,
    *,
    states: Collection[State] = (),
    kinds: Collection[str] = (),
    by: str | None = None,
    first: int = 0,
    most: int = 100,
    scope: Scope = Scope(),
) -> JobPage:
    """Jobs from a place on, newest first, and how many there are.

    by: only those that this user created. The other arguments are as in `list_jobs`.
    """
    now = queue.time_now(store)
    found = queue.list_jobs(store, states=states, kinds=kinds, by=by, first=first, most=most, scope=scope)
    total = queue.count_jobs(store, states=states, kinds=kinds, by=by, scope=scope)
    return JobPage(jobs=tuple(_view(job, now) for job in found), total=total)


def states_named(names: Collection[str]) -> list[State]:
    """The states with these names. Raises UsageError for a name that is none."""
    if unknown := [name for name in names if name not in STATES]:
        raise UsageError(f"{unknown[0][:40]!r} is not a state of jobs", fix=f"name one of {', '.join(STATES)}")
    return [state for state in STATES if state in names]


def show(store: Store, number: int, *, scope: Scope = Scope()) -> JobView:
    """A job as it is now. Raises UsageError where there is none that the scope covers."""
    job = queue.get(store, number)
    if not scope.covers(job.scope):
        raise UsageError(f"there is no job {number}", fix="`tunesmith jobs list` shows them")
    return view_of(store, job)


def log(store: Store, number: int, after: int = 0) -> JobLog:
    """The log of a job. after: only lines with a higher number."""
    state = queue.get(store, number).state  # before the lines, so that an ended job's log is whole
    lines = queue.events(store, number, after)
    return JobLog(job=number, state=state, lines=tuple(LogLine.of(line) for line in lines))


def newest_lines(store: Store, number: int, *, before: int | None = None, most: int = 100) -> JobLog:
    """The newest lines of a job's log, newest first. before: only lines with a lower number."""
    state = queue.get(store, number).state
    lines = queue.newest_events(store, number, before=before, most=most)
    return JobLog(job=number, state=state, lines=tuple(LogLine.of(line) for line in lines))


def cancel(store: Store, number: int, *, actor: str | None = None) -> JobView:
    """End a job for good; a running one ends between two of its steps, and its checkpoints are kept."""
    return view_of(store, queue.cancel(store, number, actor=acting(store, actor)))


def pause(store: Store, number: int, *, actor: str | None = None) -> JobView:
    """Keep a job from being performed until it is resumed; a running one stops between two of its steps."""
    return view_of(store, queue.pause(store, number, actor=acting(store, actor)))


def resume(store: Store, number: int, *, actor: str | None = None) -> JobView:
    """Put a paused job back into the queue."""
    return view_of(store, queue.resume(store, number, actor=acting(store, actor)))


def view_of(store: Store, job: Job) -> JobView:
    """A job as people see it."""
    return _view(job, queue.time_now(store))


def _view(job: Job, now: float) -> JobView:
    silent = job.state == "running" and ((job.until is not None and job.until < now) or has_ended(job.worker))
    return JobView.of(job, job=job.id, silent=silent, cause=cause_of(job), changes=job.arguments.get("changes", {}))

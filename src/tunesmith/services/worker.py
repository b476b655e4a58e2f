"""Perform jobs: here, or by a worker, on this machine's cores and GPUs or on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from tunesmith.core import telemetry
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress, Silent, Stopped
from tunesmith.core.system.machine import end_with_parent
from tunesmith.core.telemetry import names
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import LEASE_SECONDS, Lease, LeaseLost
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.places import LocalPlace, Place
from tunesmith.jobs.queue import JobError
from tunesmith.jobs.slots import HeldSlot, divide, usable_cores
from tunesmith.jobs.worker import ALSO_SECONDS, Worker, worker_name
from tunesmith.project import JobSettings, Project, open_store
from tunesmith.registry.aliases import get_alias
from tunesmith.services import training
from tunesmith.services.fine_tuning import KIND
from tunesmith.services.fine_tuning_jobs import perform_fine_tuning
from tunesmith.services.forecast import forecast
from tunesmith.services.jobs import cause_of
from tunesmith.services.training import Changes, RunSummary, project_of, run_arguments, with_changes
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow


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
    cause = cause_of(job)
    if not cause:
        return _run(project, job.created_by, [], progress)
    progress.say(f"queued because of {cause}")
    done: list[RunSummary] = []
    outcome = _run(project, job.created_by, done, progress)
    made, champion = done[0].registered, get_alias(project.store, project.settings.name)
    if made is None or champion is None or made.digest != champion.version:
        return outcome
    error = JobError(
        code="nothing_new",
        what=f"rows and settings are those of {made.version}, so the run gave the same version",
        where=cause,
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
    from tunesmith.services.retraining import look_again  # what they import, a run of this process does not need
    from tunesmith.services.webhooks import check_secrets, delivering

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


# Where jobs are performed


# Performs a job of the project in a folder. Gets the number of the process that started it.
Perform: TypeAlias = Callable[[Path, Lease, int], None]


def make_places(
    project: Project, at_once: int | None, perform: Perform, say: Callable[[str], None] = lambda _: None
) -> Sequence[Place]:
    """Places for so many jobs at once; None: as many as suit the machine or the cluster.

    perform: a function of a module. say: is told what a cluster lacks. Raises UsageError or Refused for settings that
    cannot be.
    """
    jobs = project.settings.jobs
    if jobs.runner == "ray":
        return _places_on_ray(project, jobs, at_once, perform, say)
    from tunesmith.engines.device import gpu_names

    cores, gpus, server = usable_cores(), gpu_names(), project.settings.server
    starts_servers = server is not None and server.start is not None
    if starts_servers and at_once is not None and at_once > 1:
        raise UsageError(
            "each job starts the servers of engine.start on the same GPUs",
            where="jobs at once",
            fix="perform one job at once, or name servers that run already by engine.url",
        )
    # A job that starts servers, or workers of Ray on this machine, computes on all GPUs; another one on one of them.
    spreads = starts_servers or project.settings.engine.ray is not None
    if at_once is None:
        at_once = 1 if spreads else max(1, min(len(gpus), len(cores)))
    return [LocalPlace(slot, partial(_start, perform, project.root)) for slot in divide(at_once, cores, gpus)]


def _start(perform: Perform, root: Path, lease: Lease, held: HeldSlot) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(
        target=_perform_in_slot, args=(perform, root, lease, os.getpid(), held), name=f"job {lease.job}"
    )
    process.start()
    return process


def _perform_in_slot(perform: Perform, root: Path, lease: Lease, parent: int, held: HeldSlot) -> None:
    held.show_gpus()
    perform(root, lease, parent)


# On a Ray cluster


def _places_on_ray(
    project: Project, jobs: JobSettings, at_once: int | None, perform: Perform, say: Callable[[str], None]
) -> Sequence[Place]:
    """Places on the cluster, to which this process stays connected. Raises Refused where nodes cannot use the store."""
    from tunesmith.core.system.ray_cluster import check_room, connected, room
    from tunesmith.jobs.on_ray import RayPlace

    class Said(Silent):
        def say(self, text: str) -> None:
            say(text)

    store = project.store
    with connected("jobs.runner", jobs.address) as ray:
        others = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {socket.gethostname()})
        if others:
            _require_shared_database(store, f"the Ray cluster has nodes on {', '.join(others)}")
        check_room(ray, 1, jobs.resources, "jobs.resources", jobs.address, Said())
        number = max(1, room(ray, jobs.resources)) if at_once is None else at_once
    marked = store.local("work") if isinstance(store.blobs, LocalBlobs) else None
    if marked is not None:
        marked.mkdir(parents=True, exist_ok=True)
    check = partial(check_node, project.root, worker_name(), socket.gethostname(), _files(store))
    start = partial(perform, project.root)
    return [RayPlace(ray, jobs.resources, check, start, marked) for _ in range(number)]


def _files(store: Store) -> str:
    """Where the store keeps its files."""
    return store.blobs.where("records/")


def check_node(root: Path, worker: str, host: str, files: str, lease: Lease, mark: str) -> None:
    """Check that a worker's job can be performed on this node. host: the worker's. files: where its store keeps files.
    mark: a path in that store, "" where it is not a folder.

    Raises UsageError where the project, its settings or the store's files are not here, or are others than the
    worker's; Refused where the database can be used on the worker's host only.
    """
    here = socket.gethostname()
    store = Project.load(root).store
    if here != host:
        _require_shared_database(store, f"the job came to {here}, a node of the Ray cluster, from {host}")
    if _files(store) != files or (mark and not Path(mark).exists()):
        raise UsageError(
            f"the node {here} does not see the files of the worker's store",
            where=_files(store),
            fix="keep the project in a folder that all nodes share, or set TUNESMITH_BLOBS_URL for worker and nodes",
        )
    try:
        if queue.get(store, lease.job).worker != worker:
            raise LeaseLost("another worker performs the job")
        leases.log(store, lease, f"performed on the node {here} of the Ray cluster")
    except (UsageError, LeaseLost) as error:
        raise UsageError(
            f"the node {here} uses another database than the worker",
            where=store.engine.url.render_as_string(hide_password=True),
            fix="start Ray on each node with the worker's TUNESMITH_DATABASE_URL",
        ) from error


def _require_shared_database(store: Store, why: str) -> None:
    """Raise Refused where the database is SQLite."""
    if store.url.startswith("sqlite"):
        raise Refused(
            f"{why}, and SQLite can be used on one machine only",
            where="jobs.runner",
            fix="use PostgreSQL: set TUNESMITH_DATABASE_URL for the worker and for Ray on each node; and keep the "
            "project in a folder that all nodes share",
        )

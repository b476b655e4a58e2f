"""The kinds of jobs, and how a process performs one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tunesmith.core import telemetry
from tunesmith.core.system.machine import end_with_parent
from tunesmith.jobs import queue
from tunesmith.jobs.arguments import project_of
from tunesmith.jobs.fine_tuning import perform_fine_tuning
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.queue import JobError
from tunesmith.pipeline.run import RunSummary, run
from tunesmith.project import Project, open_store
from tunesmith.registry.versions import get_alias
from tunesmith.store.tables import FINE_TUNING, JobRow


def run_project(project: Project, actor: str, progress: JobProgress) -> tuple[RunSummary, Outcome]:
    """Run the whole pipeline. The outcome of a verdict other than pass is an error."""
    summary = run(project, progress=progress, actor=actor)
    verdict, result = summary.gate.verdict, summary.without_paths()
    if verdict == "pass":
        return summary, Outcome(result)
    failed = [gate.name for gate in summary.gate.gates if gate.outcome != "pass"]
    error = JobError(
        code=f"verdict_{verdict}",
        what=f"the verdict is {verdict}: {', '.join(failed) or 'there are no gates'}",
        where=f"verdict {summary.gate.digest}",
        fix="read the report of the evaluation",
    )
    return summary, Outcome(result, error)


def _perform_run(project: Project, job: JobRow, progress: JobProgress) -> Outcome:
    if job.cause:
        progress.say(f"queued because of {job.cause}")
    summary, outcome = run_project(project, job.created_by, progress)
    made, champion = summary.registered, get_alias(project.store, project.settings.name)
    if not job.cause or made is None or champion is None or made.digest != champion.version:
        return outcome
    error = JobError(
        code="nothing_new",
        what=f"rows and settings are those of {made.version}, so the run gave the same version",
        where=job.cause,
        fix="add rows or change settings, then run again",
    )
    return Outcome(outcome.result, error)


KINDS: Mapping[str, Callable[[Project, JobRow, JobProgress], Outcome]] = {
    "run": _perform_run,
    FINE_TUNING: perform_fine_tuning,
}


def perform_in_child(root: Path, lease: Lease, parent: int) -> None:
    """Perform a job in this process. parent: the number of the process that started it, and with which it ends."""
    end_with_parent(parent)
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the worker too, which ends this process in order
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    perform_job(root, lease, stopping)


def perform_job(root: Path, lease: Lease, stopping: threading.Event | None = None) -> None:
    """Perform a job and record what came of it. stopping: as for `perform`."""
    store = open_store(root)
    job = queue.get(store, lease.job)

    def work(progress: JobProgress) -> Outcome:
        project = Project.load(root)
        project.store = store
        return KINDS[job.kind](project_of(project, job), job, progress)

    with contextlib.suppress(Exception), telemetry.sending():  # it is recorded
        perform(store, lease, work, stopping=stopping)

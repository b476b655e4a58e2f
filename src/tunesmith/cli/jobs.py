"""`worker`, `retrain` and `jobs list|show|log|cancel|pause|resume`: add, perform, show and change jobs."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, Positive, add_commands, add_group, say, table
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.services.jobs import JobList, JobLog, JobView
    from tunesmith.services.monitoring import Retraining

Number = Annotated[int, typer.Argument(min=1, help="A job's number.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "jobs", "Show jobs that are queued, running or ended, and change them.")
    add_commands(group, show, log, cancel, pause, resume, list=list_jobs)
    add_commands(app, worker, retrain)


def worker(
    here: Here,
    *,
    at_once: Annotated[int | None, typer.Option(min=1)] = None,
    lease: Annotated[float, typer.Option(min=2.0)] = 60.0,
    until_empty: bool = False,
) -> None:
    """Perform the project's queued jobs, each in a separate process, until ctrl-C or SIGTERM.

    With `retraining:` in the project file it also looks every five minutes whether a new version is due, and queues a
    run. With `webhooks:` it sends events to other systems. It deletes kept requests whose time is over,
    and decides on held answers at their deadline. When it ends, jobs that are performed stop between two steps and go
    back into the queue; a second signal ends them at once.

    at_once: Jobs performed at the same time, each on its share of the cores and GPUs; by default one, or one for each
        GPU where there are several.
    lease: Seconds without a sign of life until another worker takes a job on.
    until_empty: End once no job is queued or performed.
    """
    import signal

    with services.jobs.working(here.project, say, at_once=at_once, lease_seconds=lease) as performer:

        def stop(number: int, _frame: object) -> None:
            if performer.stopping.is_set():
                raise KeyboardInterrupt
            say("stopping: the jobs go back into the queue after their present step; a second signal ends them at once")
            performer.stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        say("waiting for jobs; `tunesmith run --queue` adds one, ctrl-C ends")
        performer.run(until_empty=until_empty)


def retrain(here: Acting, *, add: Annotated[bool, typer.Option("--queue")] = False) -> int:
    """Say which causes of `retraining:` make a new version due. Exit code 3: one has no run yet.

    A worker looks by itself. What comes of the run is registered if its gates pass, and waits for an approval.

    add: Queue a run, as a worker does.
    """
    due = here.do(services.monitoring.retrain) if add else services.monitoring.look(here.project, say=say)
    here.emit(due, _draw_retraining)
    return 3 if any(each.job is None for each in due.causes) else 0


def _draw_retraining(due: Retraining) -> Drawn:
    if not due.causes:
        yield f"{due.version}: no new version is due" if due.version else "nothing serves yet"
    for each in due.causes:
        job = f"job {each.job}" if each.job else f"no run: {each.waits}" if each.waits else "no run: `retrain --queue`"
        yield f"{each.cause}: {each.says} ({job})"


def list_jobs(
    here: Here,
    *,
    state: list[str] | None = None,
    before: Annotated[int | None, typer.Option(min=1)] = None,
    most: Positive = 50,
) -> None:
    """List jobs, newest first.

    state: Only these: queued, running, paused, succeeded, failed, cancelled.
    before JOB: Only jobs with a lower number.
    most: How many.
    """
    here.emit(services.jobs.list_jobs(here.machine, states=state or (), before=before, most=most), _draw_list)


def show(here: Here, job: Number) -> None:
    """Show a job: its state, the step that it is at, the time left for this step, its result or its error."""
    here.emit(services.jobs.show(here.machine, job), draw_job)


def log(here: Here, job: Number, *, follow: Annotated[bool, typer.Option("--follow", "-f")] = False) -> None:
    """Print the log of a job.

    follow: Go on until the job has ended.
    """
    if follow and here.as_json:
        raise UsageError("--follow has no single result that --json could print", fix="leave one of them out")
    machine, last = here.machine, 0
    while True:
        part = services.jobs.log(machine, job, after=last)
        here.emit(part, _draw_log)
        if not follow or part.state in ("succeeded", "failed", "cancelled"):
            return
        last = part.lines[-1].number if part.lines else last
        time.sleep(1.0)


def cancel(here: Acting, job: Number) -> None:
    """End a job for good. A running one ends between two of its steps, and its checkpoints are kept."""
    here.show(services.jobs.cancel, draw_job)


def pause(here: Acting, job: Number) -> None:
    """Keep a job from being performed until it is resumed. A running one stops between two of its steps."""
    here.show(services.jobs.pause, draw_job)


def resume(here: Acting, job: Number) -> None:
    """Put a paused job back into the queue. A training continues from its newest checkpoint."""
    here.show(services.jobs.resume, draw_job)


def draw_job(job: JobView) -> Drawn:
    """Draw a job as a table."""
    changes = (f"{name}.{key}={value}" for name, each in job.changes.items() for key, value in each.items())
    rows = [
        ("state", _state(job)),
        ("created", f"{_time(job.created)} by {job.created_by}"),
        ("cause", job.cause),
        *(("changed", each) for each in changes),
        ("attempts", f"{job.attempts} of {job.most_attempts}"),
        ("worker", job.worker),
        ("step", _step(job)),
        ("took", f"{job.ended - job.started:.0f} s" if job.started and job.ended else ""),
        ("version", job.result.get("register", {}).get("version")),
        ("error", job.error.get("what")),
        ("where", job.error.get("where")),
        ("fix", job.error.get("fix")),
    ]
    yield table([row for row in rows if row[1]], title=f"job {job.job}: {job.kind}")


def _draw_list(listed: JobList) -> Drawn:
    rows = [(job.job, job.kind, _state(job), job.created_by, _time(job.created), _step(job)) for job in listed.jobs]
    headings = ("job", "kind", "state", "by", "created", "step")
    yield table(rows, *headings) if rows else "no jobs; `tunesmith run` makes one"


def _draw_log(part: JobLog) -> Drawn:
    for line in part.lines:
        yield f"{_time(line.at)} {line.message}"


def _state(job: JobView) -> str:
    if job.silent:
        return "running, but its worker is gone or silent: the next worker or run takes it back"
    return f"{job.state}, to be {job.wanted}" if job.wanted else job.state


def _step(job: JobView) -> str:
    """The step that a running job is at, its share and the time left."""
    progress = job.progress
    if job.state != "running" or not progress:
        return ""
    share = f" {progress['done'] / progress['total']:.0%}" if progress["total"] else ""
    left = "" if progress["seconds_left"] is None else f", {progress['seconds_left']:.0f} s left"
    return f"{progress['step']}{share}{left} {progress['note']}".rstrip()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", timespec="seconds")[:19]

"""Queue a run, perform it here or by a worker, and show jobs with their progress and log."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.jobs import curves as noted
from tunesmith.jobs import queue
from tunesmith.jobs.curves import Curve
from tunesmith.jobs.state import STATES
from tunesmith.jobs.worker import has_ended
from tunesmith.pipeline.training import tuned_names
from tunesmith.project import Project
from tunesmith.services import training
from tunesmith.services.run_settings import Changes, run_arguments
from tunesmith.store.people.identities import acting
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow, JobState


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
    state: JobState
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
    state: JobState
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


# Reading and changing


def cause_of(job: JobRow) -> str:
    """Why a run was queued, where no person did it; "" where one did."""
    return str(job.arguments.get("cause", ""))


def list_jobs(
    store: Store,
    *,
    states: Collection[JobState] = (),
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
    states: Collection[JobState] = (),
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


def states_named(names: Collection[str]) -> list[JobState]:
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


def view_of(store: Store, job: JobRow) -> JobView:
    """A job as people see it."""
    return _view(job, queue.time_now(store))


def _view(job: JobRow, now: float) -> JobView:
    silent = job.state == "running" and ((job.until is not None and job.until < now) or has_ended(job.worker))
    return JobView.of(job, job=job.id, silent=silent, cause=cause_of(job), changes=job.arguments.get("changes", {}))


# Curves


class CurvePoint(View):
    """A step. loss: on its training rows; validation_loss, score: on the validation rows, None where it was not
    validated, and where answers were not scored."""

    step: int
    loss: float
    validation_loss: float | None
    score: float | None


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


def curves(store: Store, number: int) -> JobCurves:
    """The trainings of a job, also while it runs. Raises UsageError where there is no such job."""
    job = queue.get(store, number)
    trained = job.result.get("train", {})
    found = {name: _curve(name, trained.get(name, {}), each) for name, each in noted.read(store, number).items()}
    for name, summary in trained.items():
        if name not in found and (recorded := _recorded(store, summary)) is not None:
            found[name] = _curve(name, summary, recorded, earlier=True)
    order = {name: place for place, name in enumerate(trained)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return JobCurves(job=number, trainings=tuple(found[name] for name in names))


def _curve(name: str, summary: Mapping[str, Any], curve: Mapping[str, Any], *, earlier: bool = False) -> TrainingCurve:
    """summary: of the training, {} where it has not ended. curve: as `Curve.document` gives it."""
    expected = curve["expected"]
    points = tuple(
        CurvePoint(
            step=int(each["step"]),
            loss=each["loss"],
            validation_loss=each.get("validation_loss"),
            score=each.get("validation_score"),
        )
        for each in curve["points"]
    )
    return TrainingCurve(
        name=name,
        metric=(summary.get("score") or {}).get("metric", ""),
        earlier=earlier,
        expected_seconds=expected.get("expected_seconds"),
        expected_memory_bytes=expected.get("expected_memory_bytes"),
        memory_bytes=curve["memory_bytes"] or None,
        points=points,
    )


def _recorded(store: Store, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curve in a training's record; None where the store no longer has it."""
    try:
        body = store.record(summary["training"], kind="training").body
    except (Refused, UsageError):
        return None
    found, validated = Curve(), {each["step"]: each for each in body["validation"]}
    for each in body["curve"]:
        values = {"step": each["step"], "loss": each["loss"]}
        scores = validated.get(each["step"], {})
        found.add(values | {f"validation_{key}": scores[key] for key in ("loss", "score") if key in scores})
    found.expected = {f"expected_{key}": body["estimate"][key] for key in ("seconds",)}
    found.expected["expected_memory_bytes"] = body["estimate"]["peak_memory_bytes"]
    found.memory_bytes = body["peak_memory_bytes"]
    return found.document()

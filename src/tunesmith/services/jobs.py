"""Jobs: queue, cancel, pause and resume them, and show them with their progress, log and curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.jobs import curves as noted
from tunesmith.jobs import queue
from tunesmith.jobs.curves import Curve
from tunesmith.jobs.worker import has_ended
from tunesmith.records.training import TrainingBody
from tunesmith.services.actions import Acting, Request, Short, action
from tunesmith.services.training import only_tuned, read_again, run_arguments
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import JobEventRow, JobRow, JobState

STATES: tuple[JobState, ...] = get_args(JobState)


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
    progress: JsonObject
    result: JsonObject
    error: JsonObject
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
    project = read_again(acting.project)
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


def cause_of(job: JobRow) -> str:
    """Why a run was queued, where no person did it; "" where one did."""
    return str(job.arguments.get("cause", ""))


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
    changes = job.arguments.get("changes", {})
    return JobView.of(job, job=job.id, silent=silent, cause=cause_of(job), changes=changes, error=error)


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
    return reader is None or (reader.scope == Scope() and reader.may("job.change"))


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


def curves(store: Store, number: int, reader: User | None = None) -> JobCurves:
    """The trainings of a job, also while it runs. Raises NotThere where there is no such job."""
    job = _find(store, number, reader)
    trained = job.result.get("train", {})
    found = {name: _curve(name, trained.get(name, {}), each) for name, each in noted.read(store, number).items()}
    for name, summary in trained.items():
        if name not in found and (recorded := _recorded(store, summary)) is not None:
            found[name] = _curve(name, summary, recorded, earlier=True)
    order = {name: place for place, name in enumerate(trained)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return JobCurves(job=number, trainings=tuple(found[name] for name in names))


def _curve(name: str, summary: Fields, curve: Curve, *, earlier: bool = False) -> TrainingCurve:
    """summary: of the training, {} where it has not ended."""
    expected = curve.expected
    points = tuple(
        CurvePoint(
            step=int(each["step"]),
            loss=each["loss"],
            validation_loss=each.get("validation_loss"),
            score=each.get("validation_score"),
        )
        for each in curve.points
    )
    return TrainingCurve(
        name=name,
        metric=(summary.get("score") or {}).get("metric", ""),
        earlier=earlier,
        expected_seconds=expected.get("expected_seconds"),
        expected_memory_bytes=expected.get("expected_memory_bytes"),
        memory_bytes=curve.memory_bytes or None,
        points=points,
    )


def _recorded(store: Store, summary: Fields) -> Curve | None:
    """The curve in a training's record; None where the store no longer has it."""
    try:
        body = TrainingBody.read(store, summary["training"])
    except (Refused, UsageError):
        return None
    found, validated = Curve(memory_bytes=body.peak_memory_bytes), {each.step: each for each in body.validation}
    for step in body.curve:
        values: dict[str, float] = {"step": step.step, "loss": step.loss}
        if (checked := validated.get(step.step)) is not None:
            values["validation_loss"] = checked.loss
            if checked.score is not None:
                values["validation_score"] = checked.score
        found.add(values)
    expected = body.estimate
    found.expected = {"expected_seconds": expected.seconds, "expected_memory_bytes": expected.peak_memory_bytes}
    return found

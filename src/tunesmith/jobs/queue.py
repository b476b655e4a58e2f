"""What people do with jobs: add, cancel, pause and resume them, and read their state, log and curves.

Every change is one transaction with an audit entry. Rows are returned as they were read: changing them changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sqlalchemy import ColumnElement, bindparam, func, insert, select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.text.names import Scope
from tunesmith.core.values import View
from tunesmith.records.training import TrainingBody
from tunesmith.store.database import within
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import JobCurveRow, JobEventRow, JobRow, JobState

ATTEMPTS = 3
_LONGEST_KEY = 128
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")

_NEXT_NUMBER = select(func.coalesce(func.max(JobEventRow.number), 0) + 1).where(JobEventRow.job == bindparam("of"))
_ADD_EVENT = insert(JobEventRow.metadata.tables[JobEventRow.__tablename__]).values(
    job=bindparam("of"), number=_NEXT_NUMBER.scalar_subquery(), at=bindparam("time"), message=bindparam("line")
)


class JobError(View):
    """Why a job failed. param: the client's field at fault."""

    code: str
    what: str
    where: str | None = None
    fix: str | None = None
    param: str | None = None


class JobStep(View):
    """The step that a job is at. done, total: parts of it. seconds_left: None where that is not known."""

    step: str
    done: float
    total: float
    note: str
    seconds: float
    seconds_left: float | None


def database_time(session: Session) -> float:
    """The time by the database's clock, so that workers whose clocks differ agree on when a lease ends.

    In a write transaction it is when that got its turn. SQLite has no clock of its own: there it is this machine's,
    which all workers share.
    """
    if (began := session.info.get("began")) is not None:
        return float(began)
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)
    return time.time()


def add(
    store: Store,
    kind: str,
    arguments: Fields,
    *,
    project: str,
    actor: str,
    priority: int = 0,
    key: str | None = None,
    scope: Scope = Scope(),
    attempts: int = ATTEMPTS,
) -> JobRow:
    """Add a job to the queue.

    arguments: JSON values. priority: jobs with a higher one are taken first. key: an idempotency key; the same key of
    the same actor gives the job that it gave before. attempts: how often it is tried at most.
    Raises UsageError for a key that was given with another kind or other arguments, and for one that is too long;
    Refused where the actor may not add jobs.
    """
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise UsageError(f"an idempotency key has 1 to {_LONGEST_KEY} printable characters", where=repr(key[:40]))
    with store.reading() as session:
        require(session, actor, "job.add", scope=scope)
        if key is not None and (known := _same_key(session, kind, arguments, actor, key)) is not None:
            return known
    detail: JsonObject = {}
    with store.change(actor, "job.add", kind, detail) as session:
        require(session, actor, "job.add", scope=scope)
        if key is not None and (known := _same_key(session, kind, arguments, actor, key)) is not None:
            detail["job"] = known.id  # another process added it meanwhile
            return known
        row = new_row(session, kind, arguments, project, actor, attempts)
        row.priority, row.key, row.tenant, row.region = priority, key, scope.tenant, scope.region
        session.flush()
        detail |= {"job": row.id, "arguments": digest_of(dict(arguments))}
        return row


def new_row(
    session: Session,
    kind: str,
    arguments: Fields,
    project: str,
    actor: str,
    attempts: int,
) -> JobRow:
    """A new row in the state queued, inside a write transaction."""
    now = database_time(session)
    row = JobRow(
        project=project,
        kind=kind,
        arguments=dict(arguments),
        state="queued",
        created_by=actor,
        most_attempts=attempts,
        due=now,
        created=now,
        progress={},
        result={},
        error={},
    )
    session.add(row)
    session.flush()
    return row


def _same_key(session: Session, kind: str, arguments: Fields, actor: str, key: str) -> JobRow | None:
    row = session.scalars(select(JobRow).where(JobRow.created_by == actor, JobRow.key == key)).first()
    if row is not None and (row.kind, row.arguments) != (kind, dict(arguments)):
        raise UsageError(
            f"the key {key!r} was given before, with another kind or other arguments",
            where=f"job {row.id}",
            fix="give another key, or none",
        )
    return row


def get(store: Store, number: int) -> JobRow:
    """A job by its number. Raises NotThere where there is none."""
    with store.reading() as session:
        return _row(session, number)


class JobFilter(NamedTuple):
    """Some jobs. states, kinds: only these; all where empty. by: only those that this user created. scope: only jobs
    that it covers."""

    states: Collection[JobState] = ()
    kinds: Collection[str] = ()
    by: str | None = None
    scope: Scope = Scope()

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """Of a query for them."""
        chosen = ((JobRow.state, self.states), (JobRow.kind, self.kinds))
        conditions = within(JobRow, self.scope) + [column.in_(values) for column, values in chosen if values]
        return conditions if self.by is None else [*conditions, JobRow.created_by == self.by]


def list_jobs(
    store: Store, wanted: JobFilter = JobFilter(), *, before: int | None = None, first: int = 0, most: int = 100
) -> list[JobRow]:
    """Jobs, newest first. before: only older ones than this number. first: leave out as many of the newest."""
    query = select(JobRow).where(*wanted.conditions).order_by(JobRow.id.desc()).offset(first).limit(most)
    if before is not None:
        query = query.where(JobRow.id < before)
    with store.reading() as session:
        return list(session.scalars(query))


def count_jobs(store: Store, wanted: JobFilter) -> int:
    """How many jobs `list_jobs` would list without an end."""
    with store.reading() as session:
        return session.scalar(select(func.count()).select_from(JobRow).where(*wanted.conditions)) or 0


def is_waiting(store: Store, project: str) -> bool:
    """Whether a job of a project is queued, due or not."""
    with store.reading() as session:
        waiting = select(JobRow.id).where(JobRow.project == project, JobRow.state == "queued")
        return session.scalar(waiting.limit(1)) is not None


def events(
    store: Store, number: int, after: int = 0, *, before: int | None = None, newest: int | None = None
) -> list[JobEventRow]:
    """The lines of a job's log, oldest first. after, before: only those with a higher, or a lower number.

    newest: only so many of the newest, newest first.
    """
    query = select(JobEventRow).where(JobEventRow.job == number, JobEventRow.number > after)
    if before is not None:
        query = query.where(JobEventRow.number < before)
    order = JobEventRow.number if newest is None else JobEventRow.number.desc()
    with store.reading() as session:
        _row(session, number)
        return list(session.scalars(query.order_by(order).limit(newest)))


def add_event(session: Session, job: int, message: str) -> None:
    """Add a line to a job's log, inside a write transaction."""
    session.execute(_ADD_EVENT, {"of": job, "time": database_time(session), "line": message})


def time_now(store: Store) -> float:
    """The time by which leases end, in seconds since 1970."""
    with store.reading() as session:
        return database_time(session)


# Changes


def cancel(store: Store, number: int, *, actor: str) -> JobRow:
    """End a job for good. A running one ends between two of its steps; its checkpoints are kept.

    Raises Refused for a job that ended, and where the actor may not change jobs.
    """
    return _ask(store, number, "cancelled", actor)


def pause(store: Store, number: int, *, actor: str) -> JobRow:
    """Keep a job from being performed until it is resumed. A running one stops between two of its steps.

    Raises what cancel raises, and Refused for a job that is paused or about to be cancelled.
    """
    return _ask(store, number, "paused", actor)


def resume(store: Store, number: int, *, actor: str) -> JobRow:
    """Put a paused job back into the queue. Raises Refused for a job that is not paused."""
    with store.change(actor, "job.resume", f"job {number}", {}) as session:
        row = _changeable(session, number, actor)
        if row.state == "running" and row.wanted == "paused":
            row.wanted = ""
        elif row.state == "paused":
            row.state, row.due = "queued", database_time(session)
        else:
            raise Refused(f"job {number} is {row.state}, not paused")
        add_event(session, number, f"resumed by {actor}")
        return row


def _ask(store: Store, number: int, state: Literal["cancelled", "paused"], actor: str) -> JobRow:
    """Put a waiting job into a state, or ask the worker of a running one to do so."""
    action = {"cancelled": "job.cancel", "paused": "job.pause"}[state]
    detail: JsonObject = {}
    with store.change(actor, action, f"job {number}", detail) as session:
        row = _changeable(session, number, actor)
        if row.state in ENDED:
            raise Refused(f"job {number} has ended: {row.state}")
        if state == "paused" and (row.state == "paused" or row.wanted == "cancelled"):
            raise Refused(f"job {number} is {row.wanted or row.state} already")
        if row.state == "running":
            row.wanted = state
        else:
            row.state = state
            row.ended = database_time(session) if state in ENDED else None
        detail["state"] = row.state
        add_event(session, number, f"{'to be ' if row.state == 'running' else ''}{state}, asked by {actor}")
        return row


def _changeable(session: Session, number: int, actor: str) -> JobRow:
    row = _row(session, number)
    require(session, actor, "job.change", scope=row.scope)
    return row


def _row(session: Session, number: int) -> JobRow:
    row = session.get(JobRow, number)
    if row is None:
        raise no_job(number)
    return row


def no_job(number: int) -> NotThere:
    """The error where there is no such job."""
    return NotThere(f"there is no job {number}", fix=NextStep("list the jobs", "jobs list"), code="job_not_found")


# Curves of a job's trainings, as its worker notes them while they grow. Their size is bounded.


MOST_POINTS = 400  # of a training that are kept; validated steps are kept besides
Point = dict[str, float]


@dataclass
class Curve:
    """A training's numbers. expected: its estimates, and the score of the untuned candidate beside it. memory_bytes:
    the most used. points: step and loss, and of validated steps validation_loss, validation_score and how that
    differs from the other. Once there are too many points, every second step is kept."""

    expected: dict[str, float] = field(default_factory=dict)
    memory_bytes: float = 0.0
    points: list[Point] = field(default_factory=list)
    every: int = 1

    def add(self, values: Mapping[str, float]) -> None:
        """Add what a training reported (core.progress)."""
        if "step" not in values:
            self.expected |= values
            return
        point = dict(values)
        self.memory_bytes = max(self.memory_bytes, point.pop("memory_bytes", 0.0))
        if self.points and self.points[-1]["step"] % self.every and not _validated(self.points[-1]):
            self.points.pop()  # it was the newest, which is always shown
        self.points.append(point)
        if sum(not _validated(each) for each in self.points) > MOST_POINTS:
            self.every *= 2
            last = self.points[-1]
            self.points = [
                each for each in self.points if each is last or _validated(each) or each["step"] % self.every == 0
            ]


def _validated(point: Point) -> bool:
    return "validation_loss" in point


def note_curves(session: Session, job: int, curves: Mapping[str, Curve]) -> None:
    """Keep a job's curves, inside a write transaction."""
    for name, curve in curves.items():
        stated = {"expected": curve.expected, "memory_bytes": curve.memory_bytes, "points": curve.points}
        session.merge(JobCurveRow(job=job, training=name, curve=stated))


def read_curves(store: Store, job: int) -> dict[str, Curve]:
    """A job's curves by the names of its trainings."""
    query = select(JobCurveRow).where(JobCurveRow.job == job).order_by(JobCurveRow.training)
    with store.reading() as session:
        return {row.training: Curve(**row.curve) for row in session.scalars(query)}


def curve_of(training: TrainingBody) -> Curve:
    """The curve in a training's record."""
    estimate, validated = training.estimate, {each.step: each for each in training.validation}
    curve = Curve({"expected_seconds": estimate.seconds, "expected_memory_bytes": estimate.peak_memory_bytes})
    curve.memory_bytes = training.peak_memory_bytes
    for step in training.curve:
        values = {"step": float(step.step), "loss": step.loss}
        if (checked := validated.get(step.step)) is not None:
            values["validation_loss"] = checked.loss
            if checked.score is not None:
                values["validation_score"] = checked.score
        curve.add(values)
    return curve

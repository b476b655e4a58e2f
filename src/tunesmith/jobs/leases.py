"""What workers do with jobs: take one for a time (a lease), renew the lease, and record what came of the job.

Each time a job is taken or taken back, its fencing token rises. Whoever holds an older token can record nothing: not
about the job, and, inside `Store.fenced(check)`, nothing else in the database.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import psutil
from sqlalchemy import BindParameter, and_, bindparam, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.errors import NextStep, TunesmithError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.text.names import CONTROLLER
from tunesmith.jobs import queue
from tunesmith.jobs.queue import Curve, JobError, add_event, new_row, note_curves
from tunesmith.store import audit
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow, JobState

LEASE_SECONDS = 60.0
# Seconds until a job is tried again: the first, doubled with each attempt up to the last.
_FIRST_DELAY, _LONGEST_DELAY = 10.0, 600.0
# Seconds until a job is tried again whose stage another process is working on. Does not count as an attempt.
_BUSY_DELAY = 5.0

_NOW: BindParameter[float] = bindparam("now")
_IN_PROJECT = JobRow.project == bindparam("in_project")
_LOST = _IN_PROJECT, JobRow.state == "running", JobRow.until < _NOW
# No delay is so long: the clock was set back since, and the job is not to wait until it is that late again.
_CLOCK_WENT_BACK = JobRow.due > _NOW + 2 * _LONGEST_DELAY
_READY = _IN_PROJECT, JobRow.state == "queued", or_(JobRow.due <= _NOW, _CLOCK_WENT_BACK)
# In two steps, each of which reads a few rows of the index jobs_by_state however long the queue is. With the order of
# that index: with "==" and ordered by the number alone, PostgreSQL reads every job that ended before the next one.
_HIGHEST = select(func.max(JobRow.priority)).where(*_READY).scalar_subquery()
_OLDEST = select(JobRow.id).where(*_READY, JobRow.priority >= _HIGHEST).order_by(JobRow.priority, JobRow.id)
_NEXT = _OLDEST.limit(1).scalar_subquery()
# The job to take next, and the jobs whose lease ran out. One statement, since writers wait for each other.
_NEXT_AND_LOST = select(JobRow).where(or_(JobRow.id == _NEXT, and_(*_LOST)))


class LeaseLost(TunesmithError):
    """The job was taken back, because its lease ran out: another worker may be performing it."""


class Lease(NamedTuple):
    """A job that a worker performs. fence: its fencing token. seconds: how long it lasts if it is not renewed.

    own: the person who created the job performs it in their own process, so nobody else takes it on.
    """

    job: int
    fence: int
    seconds: float
    own: bool = False


def worker_name() -> str:
    """This process, as jobs name the worker that performs them."""
    return f"{socket.gethostname()}:{os.getpid()}"


def has_ended(worker: str) -> bool:
    """Whether a worker, by its name, is a process of this machine that has ended."""
    host, _, process = worker.rpartition(":")
    return host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process))


def claim(
    store: Store, worker: str, kinds: Collection[str], *, project: str, seconds: float = LEASE_SECONDS
) -> Lease | None:
    """Take the next job of a project: the oldest of the highest priority that is due. None where there is none.

    First takes back the jobs whose lease ran out. A job of none of these kinds ends as failed: an earlier version of
    tunesmith queued it.
    """
    with store.writing() as session:
        given = {"in_project": project, "now": queue.database_time(session)}
        rows = session.scalars(_NEXT_AND_LOST, given).all()
        if any(row.state == "running" for row in rows):
            _take_back(session, project)
            rows = session.scalars(_NEXT_AND_LOST, given).all()  # one that was taken back may be the next
        while rows and rows[0].kind not in kinds:
            _end_unknown(session, rows[0], kinds)
            rows = session.scalars(_NEXT_AND_LOST, given).all()
        return _start(session, rows[0], worker, seconds, own=False) if rows else None


def begin(
    store: Store,
    worker: str,
    kind: str,
    arguments: Fields,
    *,
    project: str,
    actor: str,
    seconds: float = LEASE_SECONDS,
) -> Lease:
    """Add a job that this process performs itself, and take it. Raises Forbidden where the actor may not add jobs."""
    detail: JsonObject = {}
    with store.change(actor, "job.add", kind, detail) as session:
        require(session, actor, "job.add")
        _take_back(session, project)
        row = new_row(session, kind, arguments, project, actor, 1)
        detail["job"] = row.id
        return _start(session, row, worker, seconds, own=True)


def _start(session: Session, row: JobRow, worker: str, seconds: float, *, own: bool) -> Lease:
    now = queue.database_time(session)
    row.state, row.worker, row.until = "running", worker, now + seconds
    row.fence, row.attempts = row.fence + 1, row.attempts + 1
    row.started = row.started or now
    row.progress, row.error = {}, {}
    tried = f", attempt {row.attempts} of {row.most_attempts}" if row.attempts > 1 else ""
    add_event(session, row.id, f"started by {worker}{tried}")
    return Lease(row.id, row.fence, seconds, own)


def _take_back(session: Session, project: str) -> None:
    """Take the jobs of a project back whose lease ran out."""
    lost, given = select(JobRow).where(*_LOST), {"in_project": project, "now": queue.database_time(session)}
    for row in session.scalars(lost.order_by(JobRow.id), given).all():
        row.fence += 1
        what = f"its worker {row.worker} gave no sign of life until its lease ended"
        _try_again(session, row, JobError(code="worker_lost", what=what), delay=0.0)


def check(session: Session, lease: Lease) -> None:
    """Raise LeaseLost where the job was taken back. For `Store.fenced`."""
    held = select(JobRow.id).where(JobRow.id == lease.job, JobRow.fence == lease.fence, JobRow.state == "running")
    if session.scalar(held) is None:
        raise LeaseLost(
            "this process no longer holds the job, so it can record nothing",
            where=f"job {lease.job}",
            fix=NextStep("see who performs it now", "jobs show", job=lease.job),
        )


def _mine(session: Session, lease: Lease) -> JobRow:
    check(session, lease)
    return session.get_one(JobRow, lease.job)


def renew(
    store: Store,
    lease: Lease,
    progress: Fields | None = None,
    curves: Mapping[str, Curve] = MappingProxyType({}),
) -> str:
    """Renew a lease and record the progress. Returns the state that a person asked for, "" where nobody did.

    progress: None leaves it as it is. curves: those that changed. Raises LeaseLost where the job was taken back.
    """
    with store.writing() as session:
        row = _mine(session, lease)
        row.until = queue.database_time(session) + lease.seconds
        if progress is not None:
            row.progress = dict(progress)
        note_curves(session, lease.job, curves)
        return row.wanted


def log(store: Store, lease: Lease, message: str) -> None:
    """Add a line to the job's log."""
    with store.writing() as session:
        check(session, lease)
        add_event(session, lease.job, message)


# What came of it


def finish(store: Store, lease: Lease, result: Fields, error: JobError | None = None) -> None:
    """Record the result of a job that was performed. error: it failed for this reason, and its result is kept."""
    with store.writing() as session:
        row = _mine(session, lease)
        row.result = dict(result)
        _end(session, row, "failed" if error else "succeeded", error)


def fail(store: Store, lease: Lease, error: JobError, *, retry: bool) -> None:
    """Record an error. retry: try the job again later, unless it was tried as often as it may be."""
    with store.writing() as session:
        row = _mine(session, lease)
        if retry:
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** (row.attempts - 1))
            _try_again(session, row, error, delay=delay)
        else:
            _end(session, row, "failed", error)


def stop(store: Store, lease: Lease, why: str, *, busy: bool = False) -> None:
    """Give a job back that was stopped: it goes to the state that a person asked for, else into the queue.

    Does not count as an attempt. busy: not at once, since another process is working on it.
    """
    with store.writing() as session:
        row = _mine(session, lease)
        if row.wanted:
            _obey(session, row)
            return
        row.attempts -= 1
        _requeue(session, row, _BUSY_DELAY if busy else 0.0)
        add_event(session, row.id, f"back in the queue: {why}")


def _try_again(session: Session, row: JobRow, error: JobError, *, delay: float) -> None:
    """Put a job back into the queue after an error; end it where a person asked for that or no attempt is left."""
    if row.wanted:
        _obey(session, row)
    elif row.attempts >= row.most_attempts:
        _end(session, row, "failed", error)
    else:
        _requeue(session, row, delay)
        row.error = _stated(error)
        add_event(session, row.id, f"to be tried again{f' in {delay:.0f} s' if delay else ''}: {error.what}")


def _requeue(session: Session, row: JobRow, delay: float) -> None:
    row.state, row.until, row.due = "queued", None, queue.database_time(session) + delay


def _stated(error: JobError | None) -> JsonObject:
    """An error as the job's row has it; {} without one."""
    return {} if error is None else error.model_dump(exclude_unset=True)


def _obey(session: Session, row: JobRow) -> None:
    """Put a job into the state that a person asked for."""
    if row.wanted == "paused":
        row.state, row.until, row.wanted = "paused", None, ""
        row.attempts -= 1
        add_event(session, row.id, "paused")
    else:
        _end(session, row, "cancelled")


def _end_unknown(session: Session, row: JobRow, kinds: Collection[str]) -> None:
    """End a job of a kind that no worker of this version performs."""
    error = JobError(
        code="unknown_kind",
        what=f"jobs of the kind {row.kind} are no longer performed",
        where=f"job {row.id}",
        fix=f"this version of tunesmith performs {', '.join(kinds)}; queue one of these",
    )
    _end(session, row, "failed", error)


def _end(session: Session, row: JobRow, state: JobState, error: JobError | None = None) -> None:
    row.state, row.until, row.ended, row.wanted = state, None, queue.database_time(session), ""
    row.error = _stated(error)
    detail = {"state": state, "error": error.code if error else "", "worker": row.worker}
    audit.append(session, actor=CONTROLLER, action="job.end", subject=f"job {row.id}", detail=detail)
    add_event(session, row.id, f"{state}: {error.what}" if error else state)

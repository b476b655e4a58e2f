"""A job and its log, as the database has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy.orm import Session

from tunesmith.core.scope import Scope
from tunesmith.store.tables import JobEventRow, JobRow

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
# Seconds since 1970, read inside a transaction.
Clock: TypeAlias = Callable[[Session], float]

_NEXT_NUMBER = select(func.coalesce(func.max(JobEventRow.number), 0) + 1).where(JobEventRow.job == bindparam("of"))
_ADD_EVENT = insert(JobEventRow.metadata.tables[JobEventRow.__tablename__]).values(
    job=bindparam("of"), number=_NEXT_NUMBER.scalar_subquery(), at=bindparam("time"), message=bindparam("line")
)


@dataclass(frozen=True)
class Job:
    """A job. The fields are those of JobRow."""

    id: int
    project: str
    kind: str
    arguments: dict[str, Any]
    state: State
    wanted: str
    priority: int
    tenant: str
    region: str
    created_by: str
    key: str | None
    attempts: int
    most_attempts: int
    due: float
    fence: int
    worker: str
    until: float | None
    progress: dict[str, Any]
    result: dict[str, Any]
    error: dict[str, Any]
    created: float
    started: float | None
    ended: float | None

    @property
    def scope(self) -> Scope:
        """Whom it is for."""
        return Scope(self.tenant, self.region)

    @property
    def has_ended(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state in ENDED


@dataclass(frozen=True)
class Event:
    """A line of a job's log. number: from 1. at: seconds since 1970."""

    number: int
    at: float
    message: str


def job_of(row: JobRow) -> Job:
    """The job that a row states."""
    return Job(**{field.name: getattr(row, field.name) for field in fields(Job)})


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


def add_event(session: Session, job: int, at: float, message: str) -> None:
    """Add a line to a job's log, inside a write transaction."""
    session.execute(_ADD_EVENT, {"of": job, "time": at, "line": message})

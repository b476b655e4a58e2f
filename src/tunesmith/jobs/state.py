"""The states of jobs, the database's time, and lines of a job's log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias, get_args

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy.orm import Session

from tunesmith.store.tables import JobEventRow, JobState

STATES: tuple[JobState, ...] = get_args(JobState)
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
# Seconds since 1970, read inside a transaction.
Clock: TypeAlias = Callable[[Session], float]

_NEXT_NUMBER = select(func.coalesce(func.max(JobEventRow.number), 0) + 1).where(JobEventRow.job == bindparam("of"))
_ADD_EVENT = insert(JobEventRow.metadata.tables[JobEventRow.__tablename__]).values(
    job=bindparam("of"), number=_NEXT_NUMBER.scalar_subquery(), at=bindparam("time"), message=bindparam("line")
)


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

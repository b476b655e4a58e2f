"""Whether the parts that a person cannot see are well."""

from __future__ import annotations

from sqlalchemy import case, func, select

from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.jobs import queue
from tunesmith.store import database
from tunesmith.store.scoping import within
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow

_TAKEN_SECONDS = 60.0  # a worker takes a job that is due sooner than this


class PartHealth(View):
    """Whether a part is well."""

    part: str
    ok: bool
    says: str


def queue_health(store: Store, scope: Scope) -> PartHealth:
    """Whether workers take and perform the jobs of a scope."""
    at = queue.time_now(store)
    running = case((JobRow.state == "running", 1), else_=0)
    late = case(((JobRow.state == "queued") & (JobRow.due < at - _TAKEN_SECONDS), 1), else_=0)
    lost = case(((JobRow.state == "running") & (JobRow.until < at), 1), else_=0)
    query = select(func.count(), func.sum(running), func.sum(late), func.sum(lost))
    query = query.where(JobRow.state.in_(("queued", "running")), *within(JobRow, scope))
    with database.reading(store.engine) as session:
        total, runs, waits, silent = (number or 0 for number in session.execute(query).one())
    if silent:
        return PartHealth(
            part="worker", ok=False, says=f"{silent} running jobs were not heard of: is a worker running?"
        )
    if waits and not runs:
        return PartHealth(part="worker", ok=False, says=f"{waits} jobs wait and no worker takes them: tunesmith worker")
    return PartHealth(
        part="worker", ok=True, says=f"jobs: {runs} running, {total - runs} waiting" if total else "no job waits"
    )

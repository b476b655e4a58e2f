"""How long pages take: the first one, as it is, and again after a change; and every other page."""

from __future__ import annotations

import dataclasses

from console_parts.asking import Console, Times, times
from console_parts.many import Made
from engine_parts.report import Line
from service_parts.kept import Found

TIMES = 15
MOST_MS = 100.0


def measure(where: Console, count: int = TIMES) -> Found:
    """A line for each page."""
    found = {what: times(where, path, count) for what, path in _pages(where.made).items()}
    found["first page after a change"] = times(where, "/", count, where.change)
    database = "" if where.made.url.startswith("sqlite") else ", PostgreSQL"
    lines = [_line(f"{what}{database}", each) for what, each in found.items()]
    return Found(lines, {what: dataclasses.asdict(each) for what, each in found.items()})


def _line(what: str, found: Times) -> Line:
    reached = found.median < MOST_MS
    return Line(what, found.said(), shown="-", wanted=f"median < {MOST_MS:g} ms", reached=reached)


def _pages(made: Made) -> dict[str, str]:
    """What -> path."""
    evaluation, rollout = f"/console/evidence/{made.evaluation}", f"/console/rollouts/{made.rollout}"
    return {
        "first page": "/",
        "jobs": "/console/jobs",
        "start a run": "/console/jobs/start",
        "one job": f"/console/jobs/{made.job}",
        "evidence": "/console/evidence",
        "one evaluation": evaluation,
        "its findings, kept": f"{evaluation}/findings",
        "its matrix, kept": f"{evaluation}/matrix",
        "100 rows of it": f"{evaluation}/matrix?page=50",
        "versions": "/console/versions",
        "versions by a part of the name": "/console/versions?q=task-01",
        "versions by state": "/console/versions?state=serving",
        "one version": f"/console/versions/{made.version}",
        "rollouts": "/console/rollouts",
        "one rollout": rollout,
        "its traffic and test": f"{rollout}/course",
        "datasets": "/console/rows",
        "one dataset": f"/console/rows/{made.dataset}",
        "review queue": "/console/rows/review",
        "operations": "/console/operations",
        "audit log, searched": "/console/operations/audit?search=task-017",
        "people": "/console/operations/people",
        "my keys": "/console/keys",
    }

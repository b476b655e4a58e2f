"""What operators look at beside rollouts: drift with requests that show it, and what was recalled."""

from __future__ import annotations

from statistics import median
from typing import Any

from sqlalchemy import func, select

from tunesmith.core.errors import TunesmithError
from tunesmith.core.view import View
from tunesmith.monitoring.cases import Case, list_cases
from tunesmith.monitoring.drift import Report
from tunesmith.monitoring.features import last_request, measured_baseline
from tunesmith.project import Project
from tunesmith.registry.versions import load_version
from tunesmith.services.traffic.monitoring import monitor
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow, RequestRow

_EXAMPLES = 3  # for each feature that moved
_RECALLS = 100


class MovedExample(View):
    """A request whose caller asked to keep it, far from what the version was measured on.

    feature: what moved. value: the request's; usual: the median of the test rows. answer: None where it failed.
    """

    request: str
    at: str
    feature: str
    value: float
    usual: float
    asked: str
    answer: str | None


class Drift(View):
    """The drift report of the project's champion, and kept requests that show what moved. problem: why there is none.

    examples: empty without drift, and where no caller had a request kept.
    """

    version: str
    report: Report | None
    problem: str
    examples: tuple[MovedExample, ...]


class RecalledCause(View):
    """Something that was recalled. records: how many records it reached then. at: of its first recall."""

    cause: str
    reason: str
    at: str
    records: int


class RecallList(View):
    """What was recalled, the newest first."""

    recalls: tuple[RecalledCause, ...]


def drift(project: Project, *, texts: bool) -> Drift:
    """Whether the requests to the project's champion drifted. texts: with kept requests as examples of what moved."""
    try:
        report, label = monitor(project)
        examples = _examples(project.store, report) if texts and report.verdict == "drift" else []
    except TunesmithError as error:
        return Drift(version="", report=None, problem=error.what, examples=())
    return Drift(version=label, report=report, problem="", examples=tuple(examples))


def list_recalls(store: Store) -> RecallList:
    """What was recalled, and why."""
    first = func.min(RecallRow.at)
    query = select(RecallRow.cause, func.min(RecallRow.reason), first, func.count()).group_by(RecallRow.cause)
    with database.reading(store.engine) as session:
        rows = session.execute(query.order_by(first.desc()).limit(_RECALLS)).all()
    found = (RecalledCause(cause=cause, reason=reason, at=at, records=n) for cause, reason, at, n in rows)
    return RecallList(recalls=tuple(found))


def _examples(store: Store, report: Report) -> list[MovedExample]:
    """Of each feature that moved, the kept requests that lie farthest from the test rows' median."""
    kept = {case.request: case for case in list_cases(store, everything=True) if case.version == report.version}
    if not kept:
        return []
    with database.reading(store.engine) as session:
        query = select(RequestRow.id, RequestRow.features).where(
            RequestRow.id.in_(kept), RequestRow.at >= report.since, RequestRow.at <= report.until
        )
        features: dict[str, dict[str, Any]] = dict(session.execute(query).tuples().all())
    measured = measured_baseline(store, load_version(store, report.version)).features
    found = []
    for finding in report.findings:
        if finding.outcome != "drift" or finding.name not in measured:
            continue
        usual = float(median(measured[finding.name]))
        values = {request: float(each[finding.name]) for request, each in features.items() if finding.name in each}
        farthest = sorted(values, key=lambda request: -abs(values[request] - usual))[:_EXAMPLES]
        found += [_example(kept[request], finding.name, values[request], usual) for request in farthest]
    return found


def _example(case: Case, feature: str, value: float, usual: float) -> MovedExample:
    asked = last_request(case.messages)
    return MovedExample(
        request=case.request, at=case.at, feature=feature, value=value, usual=usual, asked=asked, answer=case.answer
    )

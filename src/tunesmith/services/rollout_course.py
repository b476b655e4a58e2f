"""How a rollout goes: its steps, its traffic by version over time, its evidence as it grew, and who changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Select, case, func, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields
from tunesmith.core.scope import Scope
from tunesmith.core.text.names import VersionRef
from tunesmith.core.view import View
from tunesmith.project import Project
from tunesmith.registry.serving import standing
from tunesmith.registry.versions import load_version
from tunesmith.rollout import traffic
from tunesmith.rollout.analysis import Judgement, judge
from tunesmith.rollout.settings import Analysis, Step
from tunesmith.rollout.state import Rollout, Status, from_row, get_rollout
from tunesmith.store import database
from tunesmith.store.database import within
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import LIVE, AliasRow, AuditRow, RequestRow, RolloutRow, VersionRow

LISTED = 20  # rollouts on a page
_BUCKETS = 300
# Length of a time's text -> minutes of a bucket whose requests share it: 2026-01-31T10:4 is ten minutes.
_LENGTHS = {16: 1, 15: 10, 13: 60, 10: 1440}
_FULL = "0000-00-00T00:00:00+00:00"
_POINTS = 16
_DRAWN = 5000  # requests of a step: judging more takes seconds for each point
_CHANGES = 200
_STARTABLE = 20
# Judgements of a step's first requests, which do not change. Data -> judgement.
_KNOWN: dict[tuple[Analysis, int], Judgement] = {}


class RolloutLine(View):
    """One rollout in a list. stable, canary: labels of versions, "" for none. waits: for a person to end a pause."""

    rollout: int
    name: str
    tenant: str
    region: str
    status: Status
    weight: int
    stable: str
    canary: str
    started_by: str
    started_at: str
    reason: str
    waits: bool


class RolloutPage(View):
    """Rollouts, newest first. page: from 1. total: how many there are on all pages."""

    rollouts: tuple[RolloutLine, ...]
    page: int
    pages: int
    total: int


class StepView(View):
    """One step. ended_at, ended_by: None where it has not ended; ended_by: what ended it, in words."""

    number: int
    says: str
    state: Literal["done", "current", "to come", "not reached"]
    ended_at: str | None
    ended_by: str | None


class ArmTraffic(View):
    """One version's requests in a span of time. score: the mean, None without a scored request."""

    requests: int
    failed: int
    score: float | None


class TrafficSpan(View):
    """The requests from a moment on. at: ISO 8601."""

    at: str
    stable: ArmTraffic
    canary: ArmTraffic


class Traffic(View):
    """A rollout's requests in spans of equal length, oldest first, without gaps. metric: of the scores."""

    minutes: int
    metric: str
    spans: tuple[TrafficSpan, ...]


class EvidencePoint(View):
    """What the first requests of a step showed. not_worse, worse: e-values. canary, stable: means, None without one."""

    requests: int
    not_worse: float
    worse: float
    canary: float | None
    stable: float | None


class Evidence(View):
    """How the evidence of an analysis step grew. step: from 1. needed: the e-value that decides.

    outcome, reason: after the requests of the points. whole: False if there are more, which the controller counts too.
    """

    step: int
    metric: str
    needed: float
    outcome: str
    reason: str
    points: tuple[EvidencePoint, ...]
    whole: bool


class RolloutChange(View):
    """Who did what to a rollout. reason: theirs, "" where they gave none."""

    seq: int
    at: str
    actor: str
    action: str
    reason: str


class Progress(View):
    """A rollout's steps, and its newest changes, newest first."""

    rollout: int
    steps: tuple[StepView, ...]
    changes: tuple[RolloutChange, ...]


class RolloutCourse(Progress):
    """Also a rollout's traffic, and the evidence of the analysis steps that have begun."""

    traffic: Traffic
    evidence: tuple[Evidence, ...]


class StartableVersion(View):
    """A version that a rollout could start with. waits: why it may not serve, "" where it may."""

    version: str
    tenant: str
    region: str
    waits: str


def list_page(store: Store, user: User, page: int = 1) -> RolloutPage:
    """A page of the rollouts of the user's tenant and region."""
    here = within(RolloutRow, user.scope)
    with database.reading(store.engine) as session:
        total = session.scalar(select(func.count()).select_from(RolloutRow).where(*here)) or 0
        pages = max(1, -(-total // LISTED))
        page = min(max(1, page), pages)
        query = select(RolloutRow).where(*here).order_by(RolloutRow.id.desc())
        lines = _lines(session, query.limit(LISTED).offset((page - 1) * LISTED))
    return RolloutPage(rollouts=tuple(lines), page=page, pages=pages, total=total)


def live_lines(session: Session, scope: Scope) -> list[RolloutLine]:
    """The newest rollouts of a scope that divide traffic."""
    query = select(RolloutRow).where(RolloutRow.status.in_(LIVE), *within(RolloutRow, scope))
    return _lines(session, query.order_by(RolloutRow.id.desc()).limit(LISTED))


def _lines(session: Session, query: Select[RolloutRow]) -> list[RolloutLine]:
    found = [from_row(row) for row in session.scalars(query)]
    labels = labels_of(session, {digest for one in found for digest in (one.stable, one.canary)})
    return [
        RolloutLine.of(
            one,
            rollout=one.id,
            stable=labels.get(one.stable, ""),
            canary=labels.get(one.canary, ""),
            waits=_waits(one),
        )
        for one in found
    ]


def _waits(rollout: Rollout) -> bool:
    pause = rollout.current.pause if rollout.status == "paused" and rollout.current else None
    return pause is not None and pause.seconds is None


def labels_of(session: Session, digests: set[str]) -> dict[str, str]:
    """Labels of versions by digest. A version that the registry does not have is left out."""
    query = select(VersionRow.digest, VersionRow.name, VersionRow.number).where(VersionRow.digest.in_(digests))
    return {digest: str(VersionRef(name, number)) for digest, name, number in session.execute(query)}


def startable(project: Project, user: User) -> tuple[StartableVersion, ...]:
    """The newest versions of the project's name for the user's scope, without those that serve all of it now."""
    name, store = project.settings.name, project.store
    query = select(VersionRow.digest).where(VersionRow.name == name, *within(VersionRow, user.scope))
    found = []
    with database.reading(store.engine) as session:
        serving = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == "champion")
        query = query.where(VersionRow.digest.not_in(serving)).order_by(VersionRow.number.desc())
        for digest in session.scalars(query.limit(_STARTABLE)).all():
            try:
                version = load_version(store, digest, session)
            except TunesmithError:  # a record that cannot be read cannot be served
                continue
            permission = standing(session, version, version.scope)
            waits = "" if permission.granted else permission.message
            found.append(StartableVersion(version=version.label, waits=waits, **version.scope.fields()))
    return tuple(found)


def progress(store: Store, number: int) -> Progress:
    """A rollout's steps and changes. Raises UsageError if there is none of that number."""
    found = get_rollout(store, number)
    return Progress(rollout=number, steps=steps_of(found.steps, found), changes=changes_of(store, found))


def course(store: Store, number: int) -> RolloutCourse:
    """Everything about how a rollout goes. Raises UsageError if there is none of that number."""
    found = get_rollout(store, number)
    begun = (place for place, step in enumerate(found.steps) if step.analysis and place <= found.step)
    return RolloutCourse(
        **dict(progress(store, number)),
        traffic=traffic_of(store, found),
        evidence=tuple(evidence_of(store, found, place) for place in begun),
    )


def steps_of(steps: Sequence[Step], rollout: Rollout | None = None) -> tuple[StepView, ...]:
    """A rollout's steps with what ended each; without one, the steps as they are to come."""
    ended: dict[int, Mapping[str, Any]] = {}
    for each in rollout.history if rollout else ():
        if each["action"] not in ("rollout.pause", "rollout.clock"):
            ended.setdefault(int(each["step"]), each)
    views = []
    for place, step in enumerate(steps):
        event: Mapping[str, Any] | None = ended.get(place)
        state: Literal["done", "current", "to come", "not reached"] = "done" if event else "to come"
        if rollout is not None and event is None:
            state = "not reached" if not rollout.live else "current" if place == rollout.step else "to come"
        views.append(
            StepView(
                number=place + 1,
                says=_says(step),
                state=state,
                ended_at=None if event is None else str(event["at"]),
                ended_by=None if event is None or rollout is None else _ended_by(event, rollout),
            )
        )
    return tuple(views)


def traffic_of(store: Store, rollout: Rollout) -> Traffic:
    """The rollout's requests in at most some hundred spans of time, aggregated by the database."""
    began = datetime.fromisoformat(rollout.started_at)
    last = str(rollout.history[-1]["at"]) if rollout.history and not rollout.live else now().isoformat()
    minutes_all = (datetime.fromisoformat(last) - began) / timedelta(minutes=1)
    length = next((length for length, minutes in _LENGTHS.items() if minutes_all / minutes < _BUCKETS), 10)
    metric = next((step.analysis.metric for step in rollout.steps if step.analysis), "json_valid")
    start = func.substr(RequestRow.at, 1, length)
    score = func.avg(case((RequestRow.cut, None), else_=RequestRow.scores[metric].as_float()))
    query = select(start, RequestRow.arm, func.count(), func.sum(case((RequestRow.ok, 0), else_=1)), score).where(
        RequestRow.rollout == rollout.id
    )
    with database.reading(store.engine) as session:
        rows = session.execute(query.group_by(start, RequestRow.arm)).all()
    found = {(key, arm): ArmTraffic(requests=n, failed=failed, score=mean) for key, arm, n, failed, mean in rows}
    keys = [key for key, _ in found]
    spans, nothing = [], ArmTraffic(requests=0, failed=0, score=None)
    at, until = (_moment(min(keys)), _moment(max(keys))) if keys else (began, began - timedelta(1))
    while at <= until:
        key = at.isoformat()[:length]
        arms = {arm: found.get((key, arm), nothing) for arm in ("stable", "canary")}
        spans.append(TrafficSpan(at=at.isoformat(), **arms))
        at += timedelta(minutes=_LENGTHS[length])
    return Traffic(minutes=_LENGTHS[length], metric=metric, spans=tuple(spans))


def evidence_of(store: Store, rollout: Rollout, step: int) -> Evidence:
    """How the evidence of an analysis step grew with its requests. step: index. Raises UsageError for another step."""
    analysis = rollout.steps[step].analysis if 0 <= step < len(rollout.steps) else None
    if analysis is None:
        raise UsageError(f"step {step + 1} of rollout {rollout.id} is not an analysis", fix="see the rollout's steps")
    rows = traffic.first_of_step(store, rollout.id, step, analysis.metric, _DRAWN + 1)
    whole, rows = len(rows) <= _DRAWN, rows[:_DRAWN]
    main = traffic.main_of(rows, rollout.main_callers)
    # Powers of two, so that a point stays where it is while requests arrive.
    width = 1 << max(0, -(-len(rows) // _POINTS) - 1).bit_length()
    points, seen, last = [], 0, _judged(analysis, (), main, 0)
    for place, row in enumerate(rows, start=1):
        seen = hash((seen, row, main))
        if place % width == 0 or place == len(rows):
            last = _judged(analysis, rows[:place], main, seen)
            points.append(_point(place, last))
    needed = last.evidence["needed"]
    return Evidence.of(last, step=step + 1, needed=needed, points=tuple(points), whole=whole)


def changes_of(store: Store, rollout: Rollout) -> tuple[RolloutChange, ...]:
    """The audit log's entries about a rollout, newest first."""
    query = select(AuditRow).where(
        AuditRow.subject == rollout.name,
        AuditRow.action.startswith("rollout."),
        AuditRow.detail["rollout"].as_integer() == rollout.id,
    )
    with database.reading(store.engine) as session:
        rows = session.scalars(query.order_by(AuditRow.seq.desc()).limit(_CHANGES)).all()
    return tuple(RolloutChange.of(row, reason=_reason(row.detail)) for row in rows)


def _judged(analysis: Analysis, rows: Sequence[traffic.Counted], main: frozenset[str], data: int) -> Judgement:
    """The judgement of requests, computed once for the same data."""
    key = analysis, data
    if key not in _KNOWN:
        if len(_KNOWN) > 2000:
            _KNOWN.clear()
        _KNOWN[key] = judge(analysis, *traffic.arms_of(rows, main))
    return _KNOWN[key]


def _point(requests: int, found: Judgement) -> EvidencePoint:
    means = {"canary": found.canary["mean"], "stable": found.stable["mean"]}
    not_worse, worse = found.evidence["not_worse"], found.evidence["worse"]
    return EvidencePoint(requests=requests, not_worse=not_worse, worse=worse, **means)


def _moment(key: str) -> datetime:
    return datetime.fromisoformat(key + _FULL[len(key) :])


def _reason(detail: Fields) -> str:
    override, reason = detail.get("override"), detail.get("reason")
    judgement = detail.get("judgement")
    said = str(reason or (judgement or {}).get("reason") or "")
    return f"override: {override}. {said}".strip(". ") if override else said


def _says(step: Step) -> str:
    if step.setWeight is not None:
        return f"{step.setWeight}% of the requests go to the new version"
    if step.pause is not None:
        return "wait for a person" if step.pause.seconds is None else f"wait {step.pause.seconds:g} s"
    assert step.analysis is not None
    found = step.analysis
    least = "" if found.at_least is None else f", at least {found.at_least:g}"
    return (
        f"{found.metric} not worse by more than {found.worse_by_at_most:g}{least}, with {found.confidence:.0%} "
        f"confidence and {found.min_requests} requests"
    )


def _ended_by(event: Mapping[str, Any], rollout: Rollout) -> str:
    """What ended a step, from its entry in the rollout's history."""
    words = {
        "rollout.weight": "weight set",
        "rollout.resume": "resumed",
        "rollout.pass": "passed",
        "rollout.promote": "promoted",
        "rollout.abort": "aborted",
        "rollout.rollback": "rolled back",
    }
    said = words.get(str(event["action"]), str(event["action"]))
    reason = _reason(event) or (rollout.reason if event["action"] in ("rollout.abort", "rollout.rollback") else "")
    return f"{said}: {reason}" if reason else said

"""How a rollout goes: its steps, its traffic by version over time, its evidence as it grew, and who changed it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import case, func, select

from tunesmith.core.clock import now
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import Fields
from tunesmith.core.values import View
from tunesmith.rollout import traffic
from tunesmith.rollout.analysis import Judgement, judge
from tunesmith.rollout.settings import Analysis, Step
from tunesmith.rollout.state import Rollout
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, RequestRow

_BUCKETS = 300
# Length of a time's text -> minutes of a bucket whose requests share it: 2026-01-31T10:4 is ten minutes.
_LENGTHS = {16: 1, 15: 10, 13: 60, 10: 1440}
_FULL = "0000-00-00T00:00:00+00:00"
_POINTS = 16
_DRAWN = 5000  # requests of a step: judging more takes seconds for each point
_CHANGES = 200
# Judgements of a step's first requests, which do not change. Data -> judgement.
_KNOWN: dict[tuple[Analysis, int], Judgement] = {}


class StepView(View):
    """One step. ended_at, ended_by: None where it has not ended; ended_by: what ended it, in words."""

    number: int
    says: str
    state: Literal["done", "current", "to come", "not reached"]
    ended_at: str | None = None
    ended_by: str | None = None


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


def progress_of(store: Store, rollout: Rollout) -> Progress:
    """A rollout's steps and changes."""
    steps, changes = steps_of(rollout.steps, rollout), changes_of(store, rollout)
    return Progress(rollout=rollout.id, steps=steps, changes=changes)


def course_of(store: Store, rollout: Rollout) -> RolloutCourse:
    """Everything about how a rollout goes."""
    begun = (place for place, step in enumerate(rollout.steps) if step.analysis and place <= rollout.step)
    return RolloutCourse(
        **dict(progress_of(store, rollout)),
        traffic=traffic_of(store, rollout),
        evidence=tuple(evidence_of(store, rollout, place) for place in begun),
    )


def steps_of(steps: Sequence[Step], rollout: Rollout | None = None) -> tuple[StepView, ...]:
    """A rollout's steps with what ended each; without one, the steps as they are to come."""
    ended = dict[int, Fields]()
    for each in rollout.history if rollout else ():
        if each["action"] not in ("rollout.pause", "rollout.clock"):
            ended.setdefault(int(each["step"]), each)
    return tuple(_step(place, step, ended.get(place), rollout) for place, step in enumerate(steps))


def _step(place: int, step: Step, event: Fields | None, rollout: Rollout | None) -> StepView:
    """event: what ended it."""
    if rollout is not None and event is not None:
        how = {"state": "done", "ended_at": str(event["at"]), "ended_by": _ended_by(event, rollout)}
    elif rollout is None or (rollout.live and place != rollout.step):
        how = {"state": "to come"}
    else:
        how = {"state": "current" if rollout.live else "not reached"}
    return StepView.model_validate({"number": place + 1, "says": _says(step), **how})


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
    with store.reading() as session:
        rows = session.execute(query.group_by(start, RequestRow.arm)).all()
    by_arm = {(key, arm): ArmTraffic(requests=n, failed=failed, score=mean) for key, arm, n, failed, mean in rows}
    keys = [key for key, _ in by_arm]
    spans, nothing = [], ArmTraffic(requests=0, failed=0, score=None)
    at, until = (_moment(min(keys)), _moment(max(keys))) if keys else (began, began - timedelta(1))
    while at <= until:
        key = at.isoformat()[:length]
        arms = {arm: by_arm.get((key, arm), nothing) for arm in ("stable", "canary")}
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
            shown = {"canary": last.canary["mean"], "stable": last.stable["mean"]}
            shown |= {name: last.evidence[name] for name in ("not_worse", "worse")}
            points.append(EvidencePoint.model_validate({"requests": place, **shown}))
    more = {"step": step + 1, "needed": last.evidence["needed"], "points": tuple(points), "whole": whole}
    return Evidence.of(last, **more)


def changes_of(store: Store, rollout: Rollout) -> tuple[RolloutChange, ...]:
    """The audit log's entries about a rollout, newest first."""
    query = select(AuditRow).where(
        AuditRow.subject == rollout.name,
        AuditRow.action.startswith("rollout."),
        AuditRow.detail["rollout"].as_integer() == rollout.id,
    )
    with store.reading() as session:
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
    analysis = step.analysis
    least = "" if analysis.at_least is None else f", at least {analysis.at_least:g}"
    return (
        f"{analysis.metric} not worse by more than {analysis.worse_by_at_most:g}{least}, with "
        f"{analysis.confidence:.0%} confidence and {analysis.min_requests} requests"
    )


def _ended_by(event: Fields, rollout: Rollout) -> str:
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

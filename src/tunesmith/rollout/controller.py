"""The state machine that moves traffic to a version.

    running --setWeight, analysis passes--> running        running --pause--> paused --time, resume--> running
    running --past the last step, promote--> promoted      champion becomes the canary
    running, paused --analysis fails or stays open too long, the ground is lost, abort--> aborted
    running, paused, promoted --rollback--> rolled_back    champion is what it was before

Every arrow is one transaction: it compares the row's revision, changes row and alias together and writes the audit
entry. A controller killed at any moment leaves the rollout before the arrow or after it; whoever calls `advance` next
carries on, and any number of controllers may.

Where a name has no champion yet, or one that was recalled and answers no more, there is nothing to compare with:
`start` makes the version champion at once (still an approved one, or under an override), and the rollout is promoted
from its first moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from tunesmith.core.clock import now
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.versions import Version
from tunesmith.rollout import traffic
from tunesmith.rollout.analysis import Arm, Judgement, judge
from tunesmith.rollout.moves import CONTROLLER, Move, Overtaken, apply, follow, new_row
from tunesmith.rollout.preconditions import (
    arm_permission,
    broken_precondition,
    check_may_serve,
    point_champion,
    promotions_to_undo,
)
from tunesmith.rollout.settings import Analysis, Pause, Step
from tunesmith.rollout.state import Rollout, from_row, get_rollout, live_rollout
from tunesmith.store import audit, database
from tunesmith.store.identities import require
from tunesmith.store.store import Store

# A clock that was put back by less than this is only being corrected.
_CORRECTION = 5.0

Clock = Callable[[], datetime]
Measure = Callable[[Store, Rollout, str], tuple[Arm, Arm]]


# Commands


def start(
    store: Store,
    *,
    name: str,
    version: Version,
    steps: Sequence[Step],
    actor: str,
    override: str | None = None,
    scope: Scope = Scope(),
    clock: Clock = now,
) -> Rollout:
    """Begin to move name's traffic to version; where nothing serves, make it champion at once.

    steps: RolloutSettings.steps. override: a reason, in place of an approval: it takes the permission rollout.override
    and is audited under that name. Raises Refused for a version that is unapproved, recalled, of another name, tenant
    or region, or champion already, and where a rollout of that name is still live.
    """
    _check_scope(version, name, scope)
    if override is not None and not override.strip():
        raise UsageError("an override needs a reason", fix='--override "why the approval shall not be waited for"')
    detail: dict[str, Any] = {"version": version.digest, "label": version.label, **scope.fields()}
    with store.change(actor, "rollout.start", name, detail) as session:
        # Inside the transaction: a role or an approval taken away meanwhile counts.
        require(session, actor, "rollout.start", scope=scope)
        check_may_serve(session, store, version, scope, override_by=None if override is None else actor)
        running = live_rollout(session, name, scope)
        if running is not None:
            raise Refused(
                f"rollout {running.id} of {name} is still {running.status}",
                fix=f"wait for it, or end it: tunesmith rollout abort {running.id}",
            )
        champion = get_alias(session, name, "champion", scope)
        if champion is not None and champion.version == version.digest:
            raise Refused(f"{version.label} serves all of {name}'s traffic already")
        stable = champion.version if champion else ""
        unopposed = _no_rival(session, store, stable, scope)
        row = new_row(version, name, scope, stable, steps, actor, override, clock(), unopposed)
        session.add(row)
        session.flush()
        if unopposed is not None:
            point_champion(session, from_row(row), version.digest, actor)
        if override is not None:
            said = {"rollout": row.id, "version": version.digest, "label": version.label, "reason": override}
            audit.append(session, actor=actor, action="rollout.override", subject=name, detail=said)
        detail.update(rollout=row.id, stable=row.stable, status=row.status, override=override)
        return from_row(row)


def resume(store: Store, rollout: int, *, actor: str, clock: Clock = now) -> Rollout:
    """Leave the pause a rollout stands at. Raises Refused where it stands at none."""

    def decide(session: Session, current: Rollout) -> Move:
        _refuse_ended(current)
        if current.current is None or current.current.pause is None:
            raise Refused(f"rollout {rollout} waits for nobody: it is {current.status}", where=_place(current))
        return Move("rollout.resume", {"status": "running", "step": current.step + 1})

    return _command(store, rollout, actor, "rollout.resume", decide, clock)


def promote(store: Store, rollout: int, *, actor: str, override: str | None = None, clock: Clock = now) -> Rollout:
    """Make the canary champion now, without the steps that remain.

    Raises Refused where one of them is an analysis, unless override gives a reason (it takes rollout.override), and
    where the canary may not be promoted: unapproved, recalled, or no longer facing the champion it set out against.
    """

    def decide(session: Session, current: Rollout) -> Move:
        _refuse_ended(current)
        skipped = [step.kind for step in current.steps[current.step :]]
        if "analysis" in skipped and override is None:
            raise Refused(
                "an analysis of this rollout is still to be passed",
                where=_place(current),
                fix='let it decide, or skip it: --override "why"',
            )
        if override is not None:
            require(session, actor, "rollout.override", scope=current.scope)
        return _promotion(current, {"skipped": skipped, "override": override})

    return _command(store, rollout, actor, "rollout.promote", decide, clock)


def abort(store: Store, rollout: int, *, actor: str, reason: str, clock: Clock = now) -> Rollout:
    """Send all traffic back to stable. Raises Refused where the rollout has ended already."""

    def decide(_session: Session, current: Rollout) -> Move:
        _refuse_ended(current)
        return _abortion(reason)

    return _command(store, rollout, actor, "rollout.abort", decide, clock)


def rollback(
    store: Store, *, name: str, actor: str, reason: str, scope: Scope = Scope(), clock: Clock = now
) -> Rollout:
    """Give name's traffic back to what served before; returns the rollout that was undone.

    A live rollout ends and the champion stays. Otherwise the champion becomes the version that the newest standing
    promotion replaced, or, where that was recalled or is gone, the one before it. Raises Refused where there is none.
    """
    detail: dict[str, Any] = {**scope.fields(), "reason": reason}
    at = clock()
    with store.change(actor, "rollout.rollback", name, detail) as session:
        require(session, actor, "rollout.change", scope=scope)
        running = live_rollout(session, name, scope)
        undo = Move("rollout.rollback", {"status": "rolled_back", "weight": 0, "reason": reason})
        if running is not None:
            return apply(session, running, undo, at, detail)
        promotions, target = promotions_to_undo(session, store, name, scope)
        point_champion(session, promotions[0], target, actor)
        undone = [apply(session, promotion, undo, at, {}) for promotion in promotions]
        detail |= {"rollout": undone[0].id, "undone": [one.id for one in undone], "champion": target}
        return undone[0]


# The controller


def advance(store: Store, rollout: int, *, clock: Clock = now, measure: Measure | None = None) -> Rollout:
    """Follow at most one arrow, if time and requests allow it; returns the rollout as it then is.

    Idempotent: called again with nothing new it changes nothing, and it never changes a rollout that has ended.
    measure: (store, rollout, metric) -> (canary, stable); by default from the requests served here. What it raises is
    no evidence, so the analysis stays open.
    """
    current = get_rollout(store, rollout)
    if not current.live:
        return current
    at = clock()
    move = _next_move(store, current, at, measure or measured_arms)
    if move is None:
        return current
    try:
        return _chosen(store, current, move, at)
    except Refused as error:  # it may not be promoted: the approval, the champion or a role has changed
        return _chosen(store, current, _abortion(error.what), at)


def give_up(store: Store, rollout: int, reason: str, *, clock: Clock = now) -> Rollout:
    """Abort because the canary cannot be served at all; for the server, which finds that out."""
    current = get_rollout(store, rollout)
    return _chosen(store, current, _abortion(reason), clock()) if current.live else current


def measured_arms(store: Store, rollout: Rollout, metric: str) -> tuple[Arm, Arm]:
    """(canary, stable) of the current step, from the requests that this installation served."""
    return traffic.arms(store, rollout.id, rollout.step, metric)


def look(store: Store, rollout: Rollout, measure: Measure = measured_arms) -> Judgement | None:
    """What the analysis a rollout stands at would say now; None where it stands at none."""
    analysis = rollout.current.analysis if rollout.live and rollout.current else None
    return None if analysis is None else _judge(store, rollout, analysis, measure)


def _chosen(store: Store, current: Rollout, move: Move, at: datetime) -> Rollout:
    """Follow an arrow that was chosen for current, unless something else happened to the rollout since."""
    try:
        return follow(
            store, current, CONTROLLER, move.action, lambda _session, _found: move, at, expected=current.revision
        )
    except Overtaken:
        return get_rollout(store, current.id)


def _next_move(store: Store, rollout: Rollout, at: datetime, measure: Measure) -> Move | None:
    with database.reading(store.engine) as session:
        problem = broken_precondition(session, store, rollout)
    if problem is not None:
        return _abortion(problem)
    if rollout.current is None:
        return _promotion(rollout, {})
    waited = (at - datetime.fromisoformat(rollout.began_at)).total_seconds()
    if waited < -_CORRECTION:
        # The step's wait begins again: it may last too long, and never ends too early.
        return Move("rollout.clock", {}, {"back_by_seconds": -waited})
    step = rollout.current
    if step.setWeight is not None:
        changes = {"weight": step.setWeight, "step": rollout.step + 1}
        return Move("rollout.weight", changes, {"weight": step.setWeight})
    if step.pause is not None:
        return _at_pause(rollout, step.pause, waited)
    if step.analysis is not None:
        return _at_analysis(store, rollout, step.analysis, waited, measure)
    return None


def _at_pause(rollout: Rollout, pause: Pause, waited: float) -> Move | None:
    if rollout.status != "paused":
        return Move("rollout.pause", {"status": "paused"}, {"seconds": pause.seconds})
    if pause.seconds is None or waited < pause.seconds:
        return None
    return Move("rollout.resume", {"status": "running", "step": rollout.step + 1}, {"waited": waited})


def _at_analysis(store: Store, rollout: Rollout, analysis: Analysis, waited: float, measure: Measure) -> Move | None:
    judgement = _judge(store, rollout, analysis, measure)
    evidence = {"judgement": judgement.as_json()}
    if judgement.outcome == "pass":
        return Move("rollout.pass", {"step": rollout.step + 1}, evidence)
    if judgement.outcome == "fail":
        return _abortion(judgement.reason, evidence)
    if judgement.exhausted:
        return _abortion(f"no decision within {analysis.max_requests} canary requests: {judgement.reason}", evidence)
    if waited >= analysis.timeout:
        return _abortion(f"no decision within {analysis.timeout:g} s: {judgement.reason}", evidence)
    return None


def _judge(store: Store, rollout: Rollout, analysis: Analysis, measure: Measure) -> Judgement:
    try:
        canary, stable = measure(store, rollout, analysis.metric)
    except (OSError, ValueError, SQLAlchemyError, TunesmithError) as error:
        reason = f"the metrics could not be read: {type(error).__name__}: {error}"
        return Judgement("inconclusive", reason, analysis.metric, needed=1 / (1 - analysis.confidence))
    return judge(analysis, canary, stable)


def _promotion(rollout: Rollout, detail: Mapping[str, Any]) -> Move:
    changes = {"status": "promoted", "step": len(rollout.steps), "weight": 100, "reason": ""}
    return Move("rollout.promote", changes, {"version": rollout.canary, "replaced": rollout.stable, **detail})


def _abortion(reason: str, detail: Mapping[str, Any] | None = None) -> Move:
    return Move("rollout.abort", {"status": "aborted", "weight": 0, "reason": reason}, detail or {})


def _command(
    store: Store,
    rollout: int,
    actor: str,
    action: str,
    decide: Callable[[Session, Rollout], Move],
    clock: Clock,
) -> Rollout:
    """A person's arrow: decided on the row as the transaction finds it, so that it needs no second try."""
    current = get_rollout(store, rollout)

    def permitted(session: Session, found: Rollout) -> Move:
        require(session, actor, "rollout.change", scope=found.scope)
        return decide(session, found)

    return follow(store, current, actor, action, permitted, clock())


def _check_scope(version: Version, name: str, scope: Scope) -> None:
    if version.name != name:
        raise UsageError(f"{version.label} is a version of {version.name}, not of {name}")
    if not version.scope.covers(scope):
        raise Refused(
            f"{version.label} is for {version.scope}",
            where=str(scope),
            fix="register it for that tenant and region",
        )


def _no_rival(session: Session, store: Store, stable: str, scope: Scope) -> str | None:
    """Why there is no champion to compare a canary with, None if there is one. stable: its digest, "" for none."""
    if not stable:
        return "nothing served before"
    permission = arm_permission(session, store, stable, scope)
    return None if permission.granted else f"the champion {permission.message}"


def _refuse_ended(rollout: Rollout) -> None:
    if not rollout.live:
        raise Refused(f"rollout {rollout.id} of {rollout.name} is {rollout.status.replace('_', ' ')} already")


def _place(rollout: Rollout) -> str:
    return f"rollout {rollout.id} of {rollout.name}, step {rollout.step + 1} of {len(rollout.steps)}"

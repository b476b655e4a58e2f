"""The controller: makes the transitions of a rollout that are due, in any process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime

from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.text.names import CONTROLLER
from tunesmith.rollout import traffic, transitions
from tunesmith.rollout.analysis import Arm, Judgement, judge
from tunesmith.rollout.champions import broken_precondition
from tunesmith.rollout.settings import Analysis, Pause
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.rollout.transitions import (
    Overtaken,
    Transition,
    make_transition,
    to_aborted,
    to_promoted,
)
from tunesmith.store.store import Store

# Seconds. A clock that is set back by less than this was only corrected.
_CLOCK_CORRECTION = 5.0

Measure = Callable[[Store, Rollout, str], tuple[Arm, Arm]]


class Watched:
    """How long rollouts have been at their steps, for a process that keeps looking at them.

    The time of day says it in every process. Where that is set forward, or another machine's clock differs, it says too
    much: a step that this process saw begin took no longer than this process has seen it, by a clock that nobody sets.
    steady: that clock, in seconds.
    """

    def __init__(self, steady: Callable[[], float] = time.monotonic) -> None:
        self._steady = steady
        # Rollout -> (revision, how long it had been at its step at a first look, when that was, the newest look).
        self._seen: dict[int, tuple[int, float, float, float]] = {}

    def at_most(self, rollout: Rollout, waited: float) -> float:
        """The seconds that a rollout has been at its step. waited: by the time of day."""
        at = self._steady()
        revision, first, since, last = self._seen.get(rollout.id, (-1, 0.0, 0.0, -math.inf))
        if revision != rollout.revision:
            first, since = min(waited, at - last), at
        self._seen[rollout.id] = (rollout.revision, first, since, at)
        return min(waited, first + at - since)


def advance(
    store: Store,
    rollout: int,
    *,
    measure: Measure | None = None,
    watched: Watched | None = None,
) -> Rollout:
    """Make at most one transition that is due, and return the rollout after it.

    Without new requests and without enough time it changes nothing, and it never changes a rollout that has ended. If
    the newest request for the canary came to a server that could not load it, the rollout keeps its step, unless it
    ends: stable answered for the canary, which says nothing of it. measure: (store, rollout, metric) -> (canary,
    stable), by default from the requests served here. If it raises, there is no evidence, and the analysis does not
    decide. watched: of a process that calls this again and again.
    """
    current = get_rollout(store, rollout)
    if not current.live:
        return current
    at = transitions.now()
    chosen = _next_transition(store, current, at, measure or measured_arms, watched or Watched())
    if chosen is None:
        return current
    if current.weight > 0 and "step" in chosen.changes and not traffic.canary_loads(store, current.id):
        return current
    try:
        return _make_if_unchanged(store, current, chosen)
    except Refused as error:  # it may not be promoted any more: the approval, the champion or a role has changed
        return _make_if_unchanged(store, current, to_aborted(error.what))


def give_up(store: Store, rollout: int, reason: str) -> Rollout:
    """Abort a rollout whose canary cannot be served. The server calls this when it cannot load the canary."""
    current = get_rollout(store, rollout)
    return _make_if_unchanged(store, current, to_aborted(reason)) if current.live else current


def measured_arms(store: Store, rollout: Rollout, metric: str) -> tuple[Arm, Arm]:
    """(canary, stable) of the current step, from the requests that this installation served."""
    return traffic.arms(store, rollout.id, rollout.step, metric, rollout.main_callers)


def look(store: Store, rollout: Rollout, measure: Measure = measured_arms) -> Judgement | None:
    """The judgement that a rollout's analysis gives now; None if the rollout is not at an analysis."""
    analysis = rollout.current.analysis if rollout.live and rollout.current else None
    return None if analysis is None else _judge(store, rollout, analysis, measure)


def _make_if_unchanged(store: Store, current: Rollout, chosen: Transition) -> Rollout:
    """Make a transition that was chosen for current, unless the rollout has changed since then."""
    try:
        return make_transition(store, current, CONTROLLER, chosen.action, lambda *_: chosen, expected=current.revision)
    except Overtaken:
        return get_rollout(store, current.id)


def _next_transition(
    store: Store, rollout: Rollout, at: datetime, measure: Measure, watched: Watched
) -> Transition | None:
    with store.reading() as session:
        problem = broken_precondition(session, store, rollout)
    if problem is not None:
        return to_aborted(problem)
    if rollout.current is None:
        return to_promoted(rollout, {})
    waited = watched.at_most(rollout, (at - datetime.fromisoformat(rollout.began_at)).total_seconds())
    if waited < -_CLOCK_CORRECTION:
        # The step's wait starts again: it may take too long, but never ends too early.
        return Transition("rollout.clock", {}, {"back_by_seconds": -waited})
    step = rollout.current
    if step.setWeight is not None:
        changes = {"weight": step.setWeight, "step": rollout.step + 1}
        return Transition("rollout.weight", changes, {"weight": step.setWeight})
    if step.pause is not None:
        return _at_pause(rollout, step.pause, waited)
    if step.analysis is not None:
        return _at_analysis(store, rollout, step.analysis, waited, measure)
    return None


def _at_pause(rollout: Rollout, pause: Pause, waited: float) -> Transition | None:
    if rollout.status != "paused":
        return Transition("rollout.pause", {"status": "paused"}, {"seconds": pause.seconds})
    if pause.seconds is None or waited < pause.seconds:
        return None
    return Transition("rollout.resume", {"status": "running", "step": rollout.step + 1}, {"waited": waited})


def _at_analysis(
    store: Store, rollout: Rollout, analysis: Analysis, waited: float, measure: Measure
) -> Transition | None:
    judgement = _judge(store, rollout, analysis, measure)
    evidence = {"judgement": judgement.document()}
    if judgement.outcome == "pass":
        return Transition("rollout.pass", {"step": rollout.step + 1}, evidence)
    if judgement.outcome == "fail":
        return to_aborted(judgement.reason, evidence)
    if judgement.exhausted:
        return to_aborted(f"no decision within {analysis.max_requests} canary requests: {judgement.reason}", evidence)
    if waited >= analysis.timeout:
        return to_aborted(f"no decision within {analysis.timeout:g} s: {judgement.reason}", evidence)
    return None


def _judge(store: Store, rollout: Rollout, analysis: Analysis, measure: Measure) -> Judgement:
    try:
        canary, stable = measure(store, rollout, analysis.metric)
    except (OSError, ValueError, SQLAlchemyError, TunesmithError) as error:
        reason = f"the metrics could not be read: {type(error).__name__}: {error}"
        return judge(analysis, Arm(), Arm()).model_copy(update={"reason": reason})
    return judge(analysis, canary, stable)

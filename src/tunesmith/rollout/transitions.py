"""The state machine of a rollout.

    running --setWeight, analysis passes--> running        running --pause--> paused --time, resume--> running
    running --past the last step, promote--> promoted      champion becomes the canary
    running, paused --analysis fails or does not decide in time, a precondition breaks, abort--> aborted
    running, paused, promoted --rollback--> rolled_back    champion becomes the version that served before

Each transition is one transaction: it compares the row's revision, changes the row and the alias, and writes the audit
entry. Weights are copied and verified before it, since all other writers wait for it; the rest is decided inside. A
controller that is killed leaves the rollout as it was before the transition or after it. The next call of `advance`
carries on, in any process; several controllers may run at once (controller.py). Commands of people make transitions
too (commands.py).

If a name has no champion, or one that may not serve any more, there is nothing to compare with. Then `start` makes the
version champion at once, still only if it is approved or overridden, and the rollout is promoted from the start.

Every version that gets traffic may serve at that moment (`registry/serving.py`), decided inside the transition's
transaction. Aborting never needs that: traffic always leaves the canary. If the champion may not serve either, then
nothing serves, and the transition's entry says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import update
from sqlalchemy.orm import Session

from tunesmith.core.clock import now as now
from tunesmith.core.errors import NextStep, Refused, TunesmithError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.registry.opening import Verified
from tunesmith.rollout.champions import (
    advice,
    broken_precondition,
    champion_of,
    could_serve,
    point_champion,
    promotion_problem,
    verify_files,
)
from tunesmith.rollout.state import Rollout, from_row, state_of
from tunesmith.store.store import Store
from tunesmith.store.tables import RolloutRow


class Transition(NamedTuple):
    """A transition. action: its name in the audit log. changes: fields of the rollout. detail: more for the log.

    override_by: of a promotion, the user who lets the canary serve without an approval.
    """

    action: str
    changes: Mapping[str, Any]
    detail: Mapping[str, Any] = {}
    override_by: str | None = None


def to_promoted(rollout: Rollout, detail: Fields, override_by: str | None = None) -> Transition:
    """The transition that makes a rollout's canary champion. override_by: as of Transition."""
    changes = {"status": "promoted", "step": len(rollout.steps), "weight": 100, "reason": ""}
    about = {"version": rollout.canary, "replaced": rollout.stable, **detail}
    return Transition("rollout.promote", changes, about, override_by)


def to_aborted(reason: str, detail: Fields | None = None) -> Transition:
    """The transition that ends a live rollout without a new champion. reason: why."""
    return Transition("rollout.abort", {"status": "aborted", "weight": 0, "reason": reason}, detail or {})


def with_warning(session: Session, store: Store, rollout: Rollout, transition: Transition) -> Transition:
    """The transition, with a warning in its detail if it gives traffic back to a champion that may not serve."""
    if transition.changes.get("status") not in ("aborted", "rolled_back"):
        return transition
    try:
        champion = champion_of(session, store, rollout.name, rollout.scope)
    except TunesmithError:  # its record cannot be read now, and traffic must leave the canary all the same
        return transition
    if champion is None or champion.refused is None:
        return transition
    return transition._replace(detail={**transition.detail, "nothing_serves": champion.warning})


class Overtaken(Exception):
    """Another controller or command moved the rollout first."""


def make_transition(
    store: Store,
    current: Rollout,
    actor: str,
    action: str,
    decide: Callable[[Session, Rollout], Transition],
    *,
    expected: int | None = None,
) -> Rollout:
    """Make one transition, with its audit entry, and return the rollout after it.

    action: for rollout.promote the canary's files are verified before the transaction. decide: (session, the rollout as
    the transaction finds it) -> the transition; if it raises, nothing changes. expected: the revision that the
    transition was chosen for, if it was chosen before. Raises Overtaken if the rollout is at another revision, Refused
    if the transition is a promotion and the canary may not be promoted now.
    """
    verified: Verified = {}
    if action == "rollout.promote" and current.live and current.override is None:
        verified = verify_files(store, current.canary, current.scope)
    detail: JsonObject = {}
    with store.change(actor, action, current.name, detail) as session:
        row = session.get(RolloutRow, current.id)
        rollout = current if row is None else from_row(row)
        if row is None or expected not in (None, rollout.revision):
            raise Overtaken
        transition = with_warning(session, store, rollout, decide(session, rollout))
        if transition.changes.get("status") == "promoted":
            override_by = transition.override_by or (rollout.started_by if rollout.override is not None else None)
            problem = broken_precondition(session, store, rollout, override_by)
            problem = problem or promotion_problem(session, store, rollout, override_by, verified)
            if problem is not None:
                can = advice(could_serve(session, store, rollout.name, rollout.scope), rollout.scope)
                fix = NextStep(f"abort it; {can}", "rollout abort", rollout=rollout.id)
                raise Refused(problem, where=f"rollout {rollout.id} of {rollout.name}", fix=fix)
            point_champion(session, store, rollout, rollout.canary, actor, override_by)
        return apply(session, rollout, transition, detail)


def apply(session: Session, rollout: Rollout, transition: Transition, detail: JsonObject) -> Rollout:
    """Write a transition into a rollout's row and into an audit entry's detail.

    Raises Overtaken if the row is not at the revision of the rollout any more.
    """
    shared = {"rollout": rollout.id, "canary": rollout.canary, **transition.detail}
    if transition.changes.get("reason"):
        shared["reason"] = transition.changes["reason"]
    detail.update(shared)
    at = written(now())
    event = {"at": at, "action": transition.action, "step": rollout.step, **transition.detail}
    moved = rollout.model_copy(
        update={
            **transition.changes,
            "began_at": at,
            # A clock that is set back again and again must not make the row grow.
            "history": (*rollout.history, event) if transition.action != "rollout.clock" else rollout.history,
            "revision": rollout.revision + 1,
        }
    )
    query = update(RolloutRow).where(RolloutRow.id == rollout.id, RolloutRow.revision == rollout.revision)
    values = {key: getattr(moved, key) for key in ("status", "step", "weight", "revision")}
    changed = session.execute(query.values(state=state_of(moved), **values))
    if changed.rowcount != 1:  # type: ignore[attr-defined]
        raise Overtaken
    return moved


def written(at: datetime) -> str:
    """A time as the row keeps it."""
    return at.isoformat(timespec="microseconds")

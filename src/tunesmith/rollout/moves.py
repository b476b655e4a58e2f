"""One arrow of the state machine: a transaction over the rollout's row, the champion and the audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from tunesmith.core.errors import Refused
from tunesmith.core.scope import Scope
from tunesmith.registry.versions import Version
from tunesmith.rollout.preconditions import broken_precondition, point_champion, promotion_problem
from tunesmith.rollout.settings import Step
from tunesmith.rollout.state import Rollout, from_row, state_of
from tunesmith.store.store import Store
from tunesmith.store.tables import RolloutRow

CONTROLLER = "controller"  # whom the audit log names where no person acts


@dataclass(frozen=True, slots=True)
class Move:
    """An arrow: the action's name in the audit log, the fields it changes, and what else the log shall say."""

    action: str
    changes: Mapping[str, Any]
    detail: Mapping[str, Any] = field(default_factory=dict)


class Overtaken(Exception):
    """Another controller or command moved the rollout first."""


def follow(
    store: Store,
    current: Rollout,
    actor: str,
    action: str,
    decide: Callable[[Session, Rollout], Move],
    at: datetime,
    expected: int | None = None,
) -> Rollout:
    """Follow one arrow, with its audit entry.

    decide: (session, the rollout as the transaction finds it) -> the arrow; what it raises undoes all. expected: the
    revision for which the arrow was chosen beforehand. Raises Overtaken where the rollout is at another one, Refused
    for a promotion of what may not be promoted now.
    """
    detail: dict[str, Any] = {}
    with store.change(actor, action, current.name, detail) as session:
        row = session.get(RolloutRow, current.id)
        found = current if row is None else from_row(row)
        if row is None or expected not in (None, found.revision):
            raise Overtaken
        move = decide(session, found)
        if move.changes.get("status") == "promoted":
            problem = broken_precondition(session, store, found) or promotion_problem(session, store, found)
            if problem is not None:
                fix = f"tunesmith rollout abort {found.id}"
                raise Refused(problem, where=f"rollout {found.id} of {found.name}", fix=fix)
            point_champion(session, found, found.canary, actor)
        return apply(session, found, move, at, detail)


def apply(session: Session, found: Rollout, move: Move, at: datetime, detail: dict[str, Any]) -> Rollout:
    """Write a move into the row found, which must be at the revision it was read at, and say so in detail."""
    said = {"rollout": found.id, "canary": found.canary, **move.detail}
    if move.changes.get("reason"):
        said["reason"] = move.changes["reason"]
    detail.update(said)
    event = {"at": written(at), "action": move.action, "step": found.step, **move.detail}
    moved = found.model_copy(
        update={
            **move.changes,
            "began_at": written(at),
            # A clock set back time and again must not grow the row.
            "history": (*found.history, event) if move.action != "rollout.clock" else found.history,
            "revision": found.revision + 1,
        }
    )
    query = update(RolloutRow).where(RolloutRow.id == found.id, RolloutRow.revision == found.revision)
    values = {key: getattr(moved, key) for key in ("status", "step", "weight", "revision")}
    changed = session.execute(query.values(state=state_of(moved), **values))
    if changed.rowcount != 1:  # type: ignore[attr-defined]
        raise Overtaken
    return moved


def new_row(
    version: Version,
    name: str,
    scope: Scope,
    stable: str,
    steps: Sequence[Step],
    actor: str,
    override: str | None,
    at: datetime,
    unopposed: str | None,
) -> RolloutRow:
    """A rollout as it begins. unopposed: why there is no champion to compare with, and the version serves at once."""
    row = RolloutRow(
        name=name, **scope.fields(), stable=stable, canary=version.digest, revision=0, started_at=written(at)
    )
    row.status, row.step, row.weight = ("promoted", len(steps), 100) if unopposed else ("running", 0, 0)
    row.state = {
        "steps": [step.model_dump(mode="json", exclude_none=True) for step in steps],
        "started_by": actor,
        "override": override,
        "reason": unopposed or "",
        "began_at": written(at),
        "history": [],
    }
    return row


def written(at: datetime) -> str:
    """A moment as the row keeps it."""
    return at.isoformat(timespec="microseconds")

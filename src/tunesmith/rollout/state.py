"""Rollouts as the database keeps them, and how to read them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView
from tunesmith.registry.versions import get_alias
from tunesmith.rollout.settings import Step
from tunesmith.store.store import Store
from tunesmith.store.tables import LIVE, Live, RolloutRow

Final = Literal["promoted", "aborted", "rolled_back"]  # a rollback may still undo a promotion
Status = Live | Final


class Rollout(ScopedView):
    """A rollout at one moment.

    stable, canary: version digests; stable is "" if nothing served before. weight: percentage of requests that go to
    the canary now. step: index into steps, len(steps) after the last one. began_at: when the current step began.
    main_callers: whose requests are evidence; () for everybody's, None if nobody called before it started.
    override: why the canary needs no approval, by started_by. stable_override_by: the user by whose override stable
    served without an approval, "" if nobody's.
    """

    id: int
    name: str
    stable: str
    canary: str
    status: Status
    step: int
    weight: int
    steps: tuple[Step, ...]
    started_by: str
    main_callers: tuple[str, ...] | None
    override: str | None
    stable_override_by: str = ""
    reason: str
    began_at: str
    history: tuple[dict[str, Any], ...]
    revision: int
    started_at: str

    @property
    def live(self) -> bool:
        """Whether it divides traffic."""
        return self.status in LIVE

    @property
    def current(self) -> Step | None:
        """The current step; None after the last one."""
        return self.steps[self.step] if self.step < len(self.steps) else None


# The fields that have no column of their own: the row's state holds them.
_IN_STATE = Rollout.model_fields.keys() - RolloutRow.__table__.columns.keys()


def state_of(rollout: Rollout) -> dict[str, Any]:
    """The row's state column."""
    document = rollout.model_dump(mode="json", exclude_none=True)
    return {key: document.get(key) for key in _IN_STATE}


def from_row(row: RolloutRow) -> Rollout:
    """The rollout of a row."""
    columns = Rollout.model_fields.keys() - _IN_STATE
    return Rollout.model_validate({**row.state, **{column: getattr(row, column) for column in columns}})


def get_rollout(store: Store, rollout: int) -> Rollout:
    """A rollout by its number. Raises UsageError if there is none."""
    with store.reading() as session:
        row = session.get(RolloutRow, rollout)
        if row is None:
            raise UsageError(f"there is no rollout {rollout}", fix=NextStep("list the rollouts", "rollout status"))
        return from_row(row)


def live_rollout(session: Session, name: str, scope: Scope) -> Rollout | None:
    """The rollout that divides a name's traffic now; None if there is none."""
    query = select(RolloutRow).filter_by(name=name, **scope.fields())
    row = session.scalars(query.where(RolloutRow.status.in_(LIVE))).first()
    return None if row is None else from_row(row)


def promoted_rollouts(session: Session, name: str, scope: Scope) -> list[Rollout]:
    """A name's promotions that were not rolled back, newest first."""
    query = select(RolloutRow).filter_by(name=name, **scope.fields(), status="promoted")
    return [from_row(row) for row in session.scalars(query.order_by(RolloutRow.id.desc()))]


def list_rollouts(store: Store, *, name: str | None = None, live: bool = False) -> list[Rollout]:
    """Rollouts of every tenant and region, newest first. name: only of this name; live: only live ones."""
    query = select(RolloutRow).order_by(RolloutRow.id.desc())
    if name is not None:
        query = query.where(RolloutRow.name == name)
    if live:
        query = query.where(RolloutRow.status.in_(LIVE))
    with store.reading() as session:
        return [from_row(row) for row in session.scalars(query)]


_FIX = "load the page again, and decide by what it shows now"


class Seen(NamedTuple):
    """What a person looked at; None for what they did not say.

    rollout: its number. step: the index of its step. champion: the digest of what served its name, "" for nothing.
    """

    rollout: int | None = None
    step: int | None = None
    champion: str | None = None

    def check(self, session: Session, current: Rollout) -> None:
        """Raise Refused unless the rollout that would change now is as it was seen."""
        where = f"rollout {current.id} of {current.name}"
        if self.rollout not in (None, current.id):
            raise Refused(f"this would change rollout {current.id}, not {self.rollout}", where=where, fix=_FIX)
        if self.step not in (None, current.step):
            state = current.status.replace("_", " ")
            at = f" at step {current.step + 1} of {len(current.steps)}" if current.live else ""
            raise Refused(f"rollout {current.id} went on meanwhile: it is {state}{at}", where=where, fix=_FIX)
        champion = get_alias(session, current.name, current.scope)
        digest = champion.version if champion else ""
        if self.champion not in (None, digest):
            serves = f"{short(digest)} serves" if digest else "nothing serves"
            raise Refused(f"the champion changed meanwhile: {serves} {current.name} now", where=where, fix=_FIX)

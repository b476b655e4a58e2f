"""Start, change and show rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.numbers import is_number
from tunesmith.core.version_ref import VersionRef
from tunesmith.core.view import View
from tunesmith.project import Project
from tunesmith.registry.versions import resolve
from tunesmith.rollout import commands, controller
from tunesmith.rollout.analysis import Outcome
from tunesmith.rollout.seen import NOT_SAID
from tunesmith.rollout.seen import Seen as Seen
from tunesmith.rollout.standing import Champion, list_champions
from tunesmith.rollout.state import LIVE, Rollout, Status, get_rollout, list_rollouts
from tunesmith.services.evaluations.served_scorers import check_analyses
from tunesmith.store import database
from tunesmith.store.people.identities import User, acting
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow


class Arm(View):
    """One of the two versions that share the traffic. version: its label, empty if the registry no longer has it."""

    version: str
    digest: str


class AnalysisView(View):
    """The current result of the analysis. canary, stable: counts and means; evidence: e-values, and the one needed."""

    outcome: Outcome
    reason: str
    metric: str
    canary: dict[str, float | int | None]
    stable: dict[str, float | int | None]
    evidence: dict[str, float]


class RolloutView(View):
    """One rollout. weight: percent of requests that go to the canary. step: index into steps.

    steps: as the project file writes them, each with one of setWeight, pause and analysis. stable: None where nothing
    served before. main_callers: whose requests are evidence; [] for everybody's, None if nobody called before it.
    analysis: only at an analysis step. champion: what the name means now, and why that may not serve if so; None where
    there is no champion.
    """

    rollout: int
    name: str
    tenant: str
    region: str
    status: Status
    weight: int
    step: int
    steps: tuple[dict[str, Any], ...]
    stable: Arm | None
    canary: Arm | None
    started_by: str
    main_callers: tuple[str, ...] | None
    started_at: str
    step_began_at: str
    override: str | None
    reason: str
    analysis: AnalysisView | None
    champion: Champion | None
    history: tuple[dict[str, Any], ...]

    @property
    def live(self) -> bool:
        """Whether it still divides traffic."""
        return self.status in LIVE


class RolloutList(View):
    """Rollouts, newest first."""

    rollouts: tuple[RolloutView, ...]


def start(
    project: Project,
    version: str,
    *,
    actor: str | None = None,
    override: str | None = None,
    scope: Scope = Scope(),
) -> RolloutView:
    """Start to move traffic to an approved version in the project's steps. The first version of a name serves at once.

    version: NAME@v3, an alias or the start of a digest. override: a reason to start without an approval.
    """
    check_analyses(project, project.settings.rollout.steps)
    found = resolve(project.store, version, scope=scope)
    rollout = commands.start(
        project.store,
        name=found.name,
        version=found,
        steps=project.settings.rollout.steps,
        main_callers=project.settings.rollout.main_callers,
        actor=project.actor(actor),
        override=override,
        scope=scope,
    )
    return view_of(project.store, rollout)


def status(store: Store, which: str | None = None) -> RolloutList:
    """Rollouts as they are now: one by its number, those of a name, or all."""
    if which is not None and is_number(which):
        rollouts = [get_rollout(store, int(which))]
    else:
        rollouts = list_rollouts(store, name=which)
    return _list(store, rollouts)


def refused_champions(store: Store, name: str | None = None) -> list[Champion]:
    """The champions that may not serve now, of one name or of all."""
    with database.reading(store.engine) as session:
        return [one for one in list_champions(session, store, name) if one.refused is not None]


def visible_to(store: Store, user: User) -> RolloutList:
    """The rollouts of the user's tenant and region."""
    seen = [one for one in list_rollouts(store) if user.scope.covers(one.scope)]
    return _list(store, seen)


def one_visible_to(store: Store, user: User, number: int, *, judged: bool = True) -> RolloutView | None:
    """A rollout of the user's tenant and region; None for any other number. judged: as for `view_of`."""
    try:
        found = get_rollout(store, number)
    except UsageError:
        return None
    return view_of(store, found, judged=judged) if user.scope.covers(found.scope) else None


def resume(
    store: Store, which: str, *, actor: str | None = None, reason: str = "", seen: Seen = NOT_SAID
) -> RolloutView:
    """End the pause of a rollout. which: its number, or a name with one live rollout.

    seen: what the actor looked at, here and below: where that has changed, nothing is done.
    """
    number, by = _number(store, which), acting(store, actor)
    return view_of(store, commands.resume(store, number, actor=by, reason=reason, seen=seen))


def promote(
    store: Store,
    which: str,
    *,
    actor: str | None = None,
    override: str | None = None,
    reason: str = "",
    seen: Seen = NOT_SAID,
) -> RolloutView:
    """Give the canary all traffic now. override: a reason to skip an analysis that has not passed yet."""
    number, by = _number(store, which), acting(store, actor)
    return view_of(store, commands.promote(store, number, actor=by, override=override, reason=reason, seen=seen))


def abort(store: Store, which: str, *, reason: str, actor: str | None = None, seen: Seen = NOT_SAID) -> RolloutView:
    """Give all traffic back to the champion and end the rollout."""
    number, by = _number(store, which), acting(store, actor)
    return view_of(store, commands.abort(store, number, actor=by, reason=reason, seen=seen))


def rollback(
    store: Store,
    name: str,
    *,
    reason: str,
    override: str | None = None,
    actor: str | None = None,
    scope: Scope = Scope(),
    seen: Seen = NOT_SAID,
) -> RolloutView:
    """Give a name's traffic back to the version that served before. override: a reason to do so unapproved."""
    by = acting(store, actor)
    undone = commands.rollback(store, name=name, actor=by, reason=reason, override=override, scope=scope, seen=seen)
    return view_of(store, undone)


def view_of(
    store: Store, rollout: Rollout, champions: Iterable[Champion] | None = None, *, judged: bool = True
) -> RolloutView:
    """A rollout with what its analysis, if it is at one, would decide now. champions: if they are known already.

    judged: False leaves the analysis out, which takes longer the more requests there are.
    """
    if champions is None:
        with database.reading(store.engine) as session:
            champions = list_champions(session, store, rollout.name)
    champion = next((one for one in champions if (one.name, one.scope) == (rollout.name, rollout.scope)), None)
    judgement = controller.look(store, rollout) if judged else None
    return RolloutView.of(
        rollout,
        rollout=rollout.id,
        steps=tuple(step.model_dump(mode="json", exclude_none=True) for step in rollout.steps),
        stable=_arm(store, rollout.stable),
        canary=_arm(store, rollout.canary),
        step_began_at=rollout.began_at,
        analysis=None if judgement is None else AnalysisView.model_validate(judgement.as_json()),
        champion=champion,
    )


def _list(store: Store, rollouts: Sequence[Rollout]) -> RolloutList:
    with database.reading(store.engine) as session:
        champions = list_champions(session, store)
    return RolloutList(rollouts=tuple(view_of(store, rollout, champions) for rollout in rollouts))


def _arm(store: Store, digest: str) -> Arm | None:
    if not digest:
        return None
    with database.reading(store.engine) as session:
        row = session.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
        return Arm(version=str(VersionRef(row.name, row.number)) if row else "", digest=digest)


def _number(store: Store, which: str) -> int:
    """A rollout's number, given it or a name. Raises UsageError where the name has no live rollout, or several."""
    if is_number(which):
        return int(which)
    live = list_rollouts(store, name=which, live=True)
    if len(live) != 1:
        places = ", ".join(f"{one.id} ({one.scope})" for one in live)
        raise UsageError(
            f"{which[:80]!r} has {len(live)} live rollouts{': ' if places else ''}{places}",
            fix="name one by its number" if live else "tunesmith rollout status lists those that have ended",
        )
    return live[0].id

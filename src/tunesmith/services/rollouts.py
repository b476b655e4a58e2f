"""Rollouts: start, change, list and show them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from tunesmith.core.errors import NextStep, NotThere, TunesmithError, UsageError
from tunesmith.core.text.names import Scope, is_number
from tunesmith.core.values import Page, ScopedView, View
from tunesmith.registry.serving import standing
from tunesmith.registry.versions import load_version, resolve
from tunesmith.rollout import commands, controller
from tunesmith.rollout.analysis import Judgement
from tunesmith.rollout.champions import Champion, list_champions
from tunesmith.rollout.course import Progress, RolloutCourse, StepView, course_of, progress_of, steps_of
from tunesmith.rollout.served_scorers import check_analyses
from tunesmith.rollout.state import Rollout, Seen, Status, from_row, get_rollout, list_rollouts
from tunesmith.services.actions import Acting, Because, Named, Reason, Request, ScopedRequest, action
from tunesmith.store.database import paged, within
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, LIVE, AliasRow, RolloutRow, VersionRow

LISTED = 20  # rollouts on a page
_STARTABLE = 20


class Arm(View):
    """One of the two versions that share the traffic. version: its label, empty if the registry no longer has it."""

    version: str
    digest: str


class RolloutView(ScopedView):
    """One rollout. weight: percent of requests that go to the canary. step: index into steps.

    steps: as the project file writes them, each with one of setWeight, pause and analysis. stable: None where nothing
    served before. main_callers: whose requests are evidence; [] for everybody's, None if nobody called before it.
    analysis: only at an analysis step. champion: what the name means now, and why that may not serve if so; None where
    there is no champion.
    """

    rollout: int
    name: str
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
    analysis: Judgement | None
    champion: Champion | None
    history: tuple[dict[str, Any], ...]

    @property
    def live(self) -> bool:
        """Whether it still divides traffic."""
        return self.status in LIVE


class RolloutList(View):
    """Rollouts, newest first."""

    rollouts: tuple[RolloutView, ...]


class RolloutLine(ScopedView):
    """One rollout in a list. stable, canary: labels of versions, "" for none. waits: for a person to end a pause."""

    rollout: int
    name: str
    status: Status
    weight: int
    stable: str
    canary: str
    started_by: str
    started_at: str
    reason: str
    waits: bool


class RolloutPage(Page):
    """Rollouts, newest first."""

    rollouts: tuple[RolloutLine, ...]


class StartableVersion(ScopedView):
    """A version that a rollout could start with. waits: why it may not serve, "" where it may."""

    version: str
    waits: str


class Startable(View):
    """What a rollout may start with. steps: those that it would take."""

    versions: tuple[StartableVersion, ...]
    steps: tuple[StepView, ...]


class StartRollout(ScopedRequest):
    """A rollout to start, in the steps of the project file. version: NAME@v3, an alias or the start of a digest.

    tenant, region: by default those of whoever starts it. override: an admin's reason to start without an approval.
    """

    version: Named
    override: Reason | None = None


class ChangeRollout(Request):
    """A change of a rollout. rollout: its number, or a name with one live rollout. reason: for the audit log.

    step, champion: what was seen before, the index of the rollout's step and the digest of what serves its name
    ("" or "nothing" where nothing does). Where one of them has changed meanwhile, nothing is done.
    """

    rollout: Named
    reason: Reason = ""
    step: Annotated[int, Field(strict=True, ge=0, le=10_000)] | None = None
    champion: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64}|nothing)?$")] | None = None

    def seen(self, number: int | None) -> Seen:
        """What was seen of a rollout."""
        champion = "" if self.champion == "nothing" else self.champion
        return Seen(number, self.step, champion)


class PromoteRollout(ChangeRollout):
    """All traffic for the new version. override: an admin's reason to skip an analysis that has not passed yet."""

    override: Reason | None = None


class AbortRollout(ChangeRollout):
    """All traffic back to the version that serves."""

    reason: Because


class RollBack(AbortRollout, ScopedRequest):
    """Back to the version that served before. override: an admin's reason to do so without an approval of that one.

    rollout: a rollout's number, or the name that its versions share. tenant, region: of a name; by default those of
    whoever asks.
    """

    override: Reason | None = None

    @model_validator(mode="after")
    def _scope_of_a_name(self) -> RollBack:
        if is_number(self.rollout) and (self.tenant, self.region) != (None, None):
            raise ValueError("a rollout's number says for which tenant and region it is; leave them out")
        return self


@action(
    "rollout.start", says="started the rollout", permission="rollout.start", tokens=("operate",), at="/rollouts",
    form=True, reads_files=True,
)  # fmt: skip
def start(acting: Acting, asked: StartRollout) -> RolloutView:
    """Start to move traffic to an approved version, in the project's steps. A name's first version serves at once."""
    acting.unchanged()
    project, scope = acting.project, acting.scope(asked)
    plan = project.settings.rollout
    check_analyses(project.settings.task.scorers, plan.steps)
    version = resolve(project.store, asked.version, scope=scope)
    rollout = commands.start(
        project.store,
        name=version.name,
        version=version,
        steps=plan.steps,
        main_callers=plan.main_callers,
        actor=acting.actor,
        override=asked.override,
        scope=scope,
    )
    return view_of(project.store, rollout)


def status(acting: Acting, which: str | None = None) -> RolloutList:
    """Rollouts of the user's tenant and region, as they are now: one by its number, those of a name, or all."""
    store, scope = acting.store, acting.user.scope
    if which is not None and is_number(which):
        rollouts = [_seen_by(acting, int(which))]
    else:
        rollouts = [one for one in list_rollouts(store, name=which) if scope.covers(one.scope)]
    with store.reading() as session:
        champions = list_champions(session, store)
    return RolloutList(rollouts=tuple(view_of(store, rollout, champions) for rollout in rollouts))


def champions(store: Store, name: str | None = None) -> list[Champion]:
    """The champions of one name or of all."""
    with store.reading() as session:
        return list_champions(session, store, name)


def refused_champions(store: Store, name: str | None = None) -> list[Champion]:
    """The champions that may not serve now, of one name or of all."""
    return [one for one in champions(store, name) if one.refused is not None]


def one_visible_to(acting: Acting, number: int, *, judged: bool = True) -> RolloutView:
    """A rollout of the user's tenant and region. Raises NotThere for any other number. judged: as for `view_of`."""
    return view_of(acting.store, _seen_by(acting, number), judged=judged)


def list_page(acting: Acting, page: int = 1) -> RolloutPage:
    """A page of the rollouts of the user's tenant and region."""
    query = select(RolloutRow).where(*within(RolloutRow, acting.user.scope)).order_by(RolloutRow.id.desc())
    with acting.store.reading() as session:
        at, query = paged(session, query, page, LISTED)
        lines = _lines(session, query)
    return RolloutPage(**dict(at), rollouts=tuple(lines))


def live_lines(session: Session, scope: Scope) -> list[RolloutLine]:
    """The newest rollouts of a scope that divide traffic."""
    query = select(RolloutRow).where(RolloutRow.status.in_(LIVE), *within(RolloutRow, scope))
    return _lines(session, query.order_by(RolloutRow.id.desc()).limit(LISTED))


def _lines(session: Session, query: Select[RolloutRow]) -> list[RolloutLine]:
    rollouts = [from_row(row) for row in session.scalars(query)]
    labels = labels_of(session, {digest for one in rollouts for digest in (one.stable, one.canary)})
    return [
        RolloutLine.of(
            one,
            rollout=one.id,
            stable=labels.get(one.stable, ""),
            canary=labels.get(one.canary, ""),
            waits=_waits(one),
        )
        for one in rollouts
    ]


def _waits(rollout: Rollout) -> bool:
    pause = rollout.current.pause if rollout.status == "paused" and rollout.current else None
    return pause is not None and pause.seconds is None


def labels_of(session: Session, digests: set[str]) -> dict[str, str]:
    """Labels of versions by digest. A version that the registry does not have is left out."""
    rows = session.scalars(select(VersionRow).where(VersionRow.digest.in_(digests)))
    return {row.digest: row.label for row in rows}


def startable(acting: Acting) -> Startable:
    """The newest versions of the project's name for the user's scope, without those that serve all of it now."""
    settings, store = acting.project.settings, acting.store
    name = settings.name
    query = select(VersionRow.digest).where(VersionRow.name == name, *within(VersionRow, acting.user.scope))
    versions = []
    with store.reading() as session:
        serving = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == CHAMPION)
        query = query.where(VersionRow.digest.not_in(serving)).order_by(VersionRow.number.desc())
        for digest in session.scalars(query.limit(_STARTABLE)).all():
            try:
                version = load_version(store, digest, session)
            except TunesmithError:  # a record that cannot be read cannot be served
                continue
            permission = standing(session, version, version.scope)
            waits = "" if permission.granted else permission.message
            versions.append(StartableVersion(version=version.label, waits=waits, **version.scope.fields()))
    return Startable(versions=tuple(versions), steps=steps_of(settings.rollout.steps))


def progress(acting: Acting, number: int) -> Progress:
    """A rollout's steps and changes. Raises NotThere as `one_visible_to` does."""
    return progress_of(acting.store, _seen_by(acting, number))


def course(acting: Acting, number: int) -> RolloutCourse:
    """Everything about how a rollout goes. Raises NotThere as `one_visible_to` does."""
    return course_of(acting.store, _seen_by(acting, number))


_change = partial(action, permission="rollout.change", tokens=("operate",), form=True, reads_files=True)


@_change("rollout.resume", says="resumed the rollout", at="/rollouts/{rollout}/resume")
def resume(acting: Acting, asked: ChangeRollout) -> RolloutView:
    """End the pause of a rollout."""
    acting.unchanged()
    return _changed(acting, asked, commands.resume)


@_change("rollout.promote", says="promoted the canary", at="/rollouts/{rollout}/promote")
def promote(acting: Acting, asked: PromoteRollout) -> RolloutView:
    """Give the new version all traffic now."""
    acting.unchanged()
    return _changed(acting, asked, partial(commands.promote, override=asked.override))


@_change("rollout.abort", says="aborted the rollout", at="/rollouts/{rollout}/abort")
def abort(acting: Acting, asked: AbortRollout) -> RolloutView:
    """Give all traffic back and end the rollout."""
    return _changed(acting, asked, commands.abort)


@_change("rollout.rollback", says="rolled back to the version before", at="/rollouts/{rollout}/rollback")
def rollback(acting: Acting, asked: RollBack) -> RolloutView:
    """Give the traffic of the rollout's name, tenant and region back to the version that served before."""
    if is_number(asked.rollout):
        one = _find(acting, asked.rollout)
        name, scope, seen = one.name, one.scope, asked.seen(one.id)
    else:
        name, scope, seen = asked.rollout, acting.scope(asked), asked.seen(None)
    done = commands.rollback(
        acting.store,
        name=name,
        actor=acting.actor,
        override=asked.override,
        reason=asked.reason,
        scope=scope,
        seen=seen,
    )
    return view_of(acting.store, done)


def _changed(acting: Acting, asked: ChangeRollout, change: Callable[..., Rollout]) -> RolloutView:
    number = _find(acting, asked.rollout).id
    done = change(acting.store, number, actor=acting.actor, reason=asked.reason, seen=asked.seen(number))
    return view_of(acting.store, done)


def view_of(
    store: Store, rollout: Rollout, champions: Iterable[Champion] | None = None, *, judged: bool = True
) -> RolloutView:
    """A rollout with what its analysis, if it is at one, would decide now. champions: if they are known already.

    judged: False leaves the analysis out, which takes longer the more requests there are.
    """
    with store.reading() as session:
        if champions is None:
            champions = list_champions(session, store, rollout.name, rollout.scope)
        labels = labels_of(session, {rollout.stable, rollout.canary})
    champion = next((one for one in champions if (one.name, one.scope) == (rollout.name, rollout.scope)), None)
    arms = (rollout.stable, rollout.canary)
    stable, canary = (Arm(version=labels.get(digest, ""), digest=digest) if digest else None for digest in arms)
    return RolloutView.of(
        rollout,
        rollout=rollout.id,
        steps=tuple(step.model_dump(mode="json", exclude_none=True) for step in rollout.steps),
        stable=stable,
        canary=canary,
        step_began_at=rollout.began_at,
        analysis=controller.look(store, rollout) if judged else None,
        champion=champion,
    )


def _seen_by(acting: Acting, number: int) -> Rollout:
    with contextlib.suppress(UsageError, OverflowError):
        rollout = get_rollout(acting.store, number)
        if acting.user.scope.covers(rollout.scope):
            return rollout
    raise NotThere(f"there is no rollout {str(number)[:20]}", fix=NextStep("list the rollouts", "rollout status"))


def _find(acting: Acting, which: str) -> Rollout:
    """A rollout of the user's scope by its number, or the live one of a name. Raises NotThere, UsageError."""
    if is_number(which):
        return _seen_by(acting, int(which))
    live = [one for one in list_rollouts(acting.store, name=which, live=True) if acting.user.scope.covers(one.scope)]
    if len(live) != 1:
        places = ", ".join(f"{one.id} ({one.scope})" for one in live)
        raise UsageError(
            f"{which[:80]!r} has {len(live)} live rollouts{': ' if places else ''}{places}",
            fix="name one by its number" if live else NextStep("list those that have ended", "rollout status"),
        )
    return live[0]

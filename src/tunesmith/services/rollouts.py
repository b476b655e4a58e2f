"""Rollouts: start, change and show them, and the scorers that service can apply to served answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from tunesmith.core.errors import NextStep, NotThere, UsageError
from tunesmith.core.text.names import is_number
from tunesmith.core.view import View
from tunesmith.evaluation.metrics.declared import (
    CONTEXT_SCORERS,
    DeclaredScorer,
    GrammarScorer,
    JudgeScorer,
    PatternScorer,
    Scoring,
    make_scoring,
    metric_of,
)
from tunesmith.evaluation.metrics.scorers import Schema
from tunesmith.project import Project
from tunesmith.registry.versions import resolve
from tunesmith.rollout import commands, controller
from tunesmith.rollout.analysis import Judgement
from tunesmith.rollout.champions import Champion, list_champions
from tunesmith.rollout.settings import Step
from tunesmith.rollout.state import Rollout, Seen, Status, get_rollout, list_rollouts
from tunesmith.services.actions import Acting, Because, Named, Reason, Request, Short, action
from tunesmith.services.rollout_course import labels_of
from tunesmith.store import database
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import LIVE


class Arm(View):
    """One of the two versions that share the traffic. version: its label, empty if the registry no longer has it."""

    version: str
    digest: str


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


class StartRollout(Request):
    """A rollout to start, in the steps of the project file. version: NAME@v3, an alias or the start of a digest.

    tenant, region: by default those of whoever starts it. override: an admin's reason to start without an approval.
    """

    version: Named
    tenant: Short | None = None
    region: Short | None = None
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


class RollBack(AbortRollout):
    """Back to the version that served before. override: an admin's reason to do so without an approval of that one.

    rollout: a rollout's number, or the name that its versions share. tenant, region: of a name; by default those of
    whoever asks.
    """

    tenant: Short | None = None
    region: Short | None = None
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
    project, scope = acting.project, acting.scope(asked.tenant, asked.region)
    plan = project.settings.rollout
    check_analyses(project, plan.steps)
    found = resolve(project.store, asked.version, scope=scope)
    rollout = commands.start(
        project.store,
        name=found.name,
        version=found,
        steps=plan.steps,
        main_callers=plan.main_callers,
        actor=acting.actor,
        override=asked.override,
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
    found = _seen_by(user, store, number)
    return None if found is None else view_of(store, found, judged=judged)


@action(
    "rollout.resume", says="resumed the rollout", permission="rollout.change", tokens=("operate",),
    at="/rollouts/{rollout}/resume", form=True, reads_files=True,
)  # fmt: skip
def resume(acting: Acting, asked: ChangeRollout) -> RolloutView:
    """End the pause of a rollout."""
    number = _find(acting, asked.rollout).id
    done = commands.resume(acting.store, number, actor=acting.actor, reason=asked.reason, seen=asked.seen(number))
    return view_of(acting.store, done)


@action(
    "rollout.promote", says="promoted the canary", permission="rollout.change", tokens=("operate",),
    at="/rollouts/{rollout}/promote", form=True, reads_files=True,
)  # fmt: skip
def promote(acting: Acting, asked: PromoteRollout) -> RolloutView:
    """Give the new version all traffic now."""
    number = _find(acting, asked.rollout).id
    done = commands.promote(
        acting.store, number, actor=acting.actor, override=asked.override, reason=asked.reason, seen=asked.seen(number)
    )
    return view_of(acting.store, done)


@action(
    "rollout.abort", says="aborted the rollout", permission="rollout.change", tokens=("operate",),
    at="/rollouts/{rollout}/abort", form=True, reads_files=True,
)  # fmt: skip
def abort(acting: Acting, asked: AbortRollout) -> RolloutView:
    """Give all traffic back and end the rollout."""
    number = _find(acting, asked.rollout).id
    done = commands.abort(acting.store, number, actor=acting.actor, reason=asked.reason, seen=asked.seen(number))
    return view_of(acting.store, done)


@action(
    "rollout.rollback", says="rolled back to the version before", permission="rollout.change", tokens=("operate",),
    at="/rollouts/{rollout}/rollback", form=True, reads_files=True,
)  # fmt: skip
def rollback(acting: Acting, asked: RollBack) -> RolloutView:
    """Give the traffic of the rollout's name, tenant and region back to the version that served before."""
    if is_number(asked.rollout):
        one = _find(acting, asked.rollout)
        name, scope, seen = one.name, one.scope, asked.seen(one.id)
    else:
        name, scope, seen = asked.rollout, acting.scope(asked.tenant, asked.region), asked.seen(None)
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


def view_of(
    store: Store, rollout: Rollout, champions: Iterable[Champion] | None = None, *, judged: bool = True
) -> RolloutView:
    """A rollout with what its analysis, if it is at one, would decide now. champions: if they are known already.

    judged: False leaves the analysis out, which takes longer the more requests there are.
    """
    if champions is None:
        with database.reading(store.engine) as session:
            champions = list_champions(session, store, rollout.name, rollout.scope)
    champion = next((one for one in champions if (one.name, one.scope) == (rollout.name, rollout.scope)), None)
    return RolloutView.of(
        rollout,
        rollout=rollout.id,
        steps=tuple(step.model_dump(mode="json", exclude_none=True) for step in rollout.steps),
        stable=_arm(store, rollout.stable),
        canary=_arm(store, rollout.canary),
        step_began_at=rollout.began_at,
        analysis=controller.look(store, rollout) if judged else None,
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
        return Arm(version=labels_of(session, {digest}).get(digest, ""), digest=digest)


def _seen_by(user: User, store: Store, number: int) -> Rollout | None:
    with contextlib.suppress(UsageError):
        found = get_rollout(store, number)
        if user.scope.covers(found.scope):
            return found
    return None


def _find(acting: Acting, which: str) -> Rollout:
    """A rollout of the user's scope by its number, or the live one of a name. Raises NotThere, UsageError."""
    if is_number(which):
        found = _seen_by(acting.user, acting.store, int(which))
        if found is not None:
            return found
        raise NotThere(f"there is no rollout {which[:20]}", fix=NextStep("list the rollouts", "rollout status"))
    live = [one for one in list_rollouts(acting.store, name=which, live=True) if acting.user.scope.covers(one.scope)]
    if len(live) != 1:
        places = ", ".join(f"{one.id} ({one.scope})" for one in live)
        raise UsageError(
            f"{which[:80]!r} has {len(live)} live rollouts{': ' if places else ''}{places}",
            fix="name one by its number" if live else NextStep("list those that have ended", "rollout status"),
        )
    return live[0]


_FREE = PatternScorer | GrammarScorer  # need no reference


@dataclass(frozen=True, slots=True)
class ServedScorers:
    """How served answers are scored. every_answer: scorers that need no reference answer, by metric.

    with_reference: scorers that need the expected answer, which feedback gives. unmeasured: metric -> why service
    cannot apply its scorer.
    """

    every_answer: Mapping[str, Scoring] = field(default_factory=dict)
    with_reference: Mapping[str, Scoring] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def served_scorers(scorers: Sequence[str | DeclaredScorer], schema: Schema, root: Path) -> ServedScorers:
    """Sort the task's scorers by what they need. schema: of JSON answers. root: the project's folder.

    Raises UsageError for a function scorer whose file cannot be run.
    """
    reasons = {metric_of(scorer): reason for scorer in scorers if (reason := _unmeasured(scorer)) is not None}
    known = {metric_of(scorer): scorer for scorer in scorers if metric_of(scorer) not in reasons}
    free = {metric for metric, scorer in known.items() if metric == "json_valid" or isinstance(scorer, _FREE)}
    scoring = {metric: make_scoring(scorer, schema, root) for metric, scorer in known.items()}
    return ServedScorers(
        every_answer={metric: scoring[metric] for metric in scoring if metric in free},
        with_reference={metric: scoring[metric] for metric in scoring if metric not in free},
        unmeasured=reasons,
    )


def check_analyses(project: Project, steps: Sequence[Step]) -> None:
    """Raise UsageError where an analysis of a rollout needs a metric that service does not measure."""
    scorers = project.settings.task.scorers
    reasons = {metric_of(each): reason for each in scorers if (reason := _unmeasured(each))}
    if "json_valid" not in map(metric_of, scorers):
        reasons["json_valid"] = "task.scorers does not list it"
    for number, step in enumerate(steps, start=1):
        if step.analysis is not None and step.analysis.metric in reasons:
            metric = step.analysis.metric
            raise UsageError(
                f"step {number} analyses {metric}, which service does not measure: {reasons[metric]}",
                where="rollout.steps",
                fix="write rollout.steps with a metric that is measured: success_rate (whether requests are answered), "
                "or one of task.scorers that feedback can score",
            )


def _unmeasured(scorer: str | DeclaredScorer) -> str | None:
    if isinstance(scorer, JudgeScorer):
        return "it asks a judge model, and service sends served texts nowhere"
    if metric_of(scorer) in CONTEXT_SCORERS:
        return "it needs the retrieved texts, which service does not keep"
    return None

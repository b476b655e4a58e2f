"""What people do to rollouts: start, resume, promote, abort, and roll back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from sqlalchemy.orm import Session

from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import Verified
from tunesmith.registry.serving import standing_of
from tunesmith.registry.versions import Alias, Version, get_alias, load_version
from tunesmith.rollout import traffic, transitions
from tunesmith.rollout.champions import point_champion, promotions_to_undo, verify_files
from tunesmith.rollout.settings import Step
from tunesmith.rollout.state import Rollout, Seen, from_row, get_rollout, live_rollout
from tunesmith.rollout.transitions import (
    Transition,
    apply,
    make_transition,
    to_aborted,
    to_promoted,
    with_warning,
    written,
)
from tunesmith.store import audit
from tunesmith.store.people.identities import get_user, require
from tunesmith.store.store import Store
from tunesmith.store.tables import RolloutRow


def start(
    store: Store,
    *,
    name: str,
    version: Version,
    steps: Sequence[Step],
    actor: str,
    main_callers: Sequence[str] | None = None,
    override: str | None = None,
    scope: Scope = Scope(),
) -> Rollout:
    """Start to move a name's traffic to a version. If nothing serves yet, the version becomes champion at once.

    steps, main_callers: of RolloutSettings. override: the reason to start without an approval; it needs the permission
    rollout.override and has its own audit entry. Raises Refused if the version may not serve, serves already, or if a
    rollout of that name is live; UsageError for a version of another name or an unknown caller.
    """
    if version.name != name:
        raise UsageError(f"{version.label} is a version of {version.name}, not of {name}")
    _check_reason(override)
    override_by = None if override is None else actor
    verified: Verified = {}
    with store.reading() as before:
        require(before, actor, "rollout.start", scope=scope)
        check_may_serve(before, store, version, scope, override_by, verified)
    detail: JsonObject = {"version": version.digest, "label": version.label, **scope.fields()}
    with store.change(actor, "rollout.start", name, detail) as session:
        # Inside the transaction, so that a role or an approval that was just taken away counts.
        require(session, actor, "rollout.start", scope=scope)
        check_may_serve(session, store, version, scope, override_by, verified)
        running = live_rollout(session, name, scope)
        if running is not None:
            raise Refused(
                f"rollout {running.id} of {name} is still {running.status}",
                fix=NextStep("wait for it, or abort it", "rollout abort", rollout=running.id),
            )
        champion = get_alias(session, name, scope)
        unopposed = _no_rival(session, store, champion, scope)
        if champion is not None and champion.version == version.digest and unopposed is None:
            raise Refused(f"{version.label} serves all of {name}'s traffic already")
        at = transitions.now()
        if main_callers is None:
            main_callers = traffic.usual_callers(session, name, scope, at)
        else:
            main_callers = [get_user(session, caller).name for caller in main_callers]
        row = RolloutRow(
            name=name,
            **scope.fields(),
            stable=champion.version if champion else "",
            canary=version.digest,
            started_at=written(at),
        )
        row.status, row.step, row.weight = ("promoted", len(steps), 100) if unopposed else ("running", 0, 0)
        row.state = {
            "steps": [step.model_dump(mode="json", exclude_none=True) for step in steps],
            "started_by": actor,
            "main_callers": None if main_callers is None else list(main_callers),
            "override": override,
            "stable_override_by": champion.override_by if champion else "",
            "reason": unopposed or "",
            "began_at": written(at),
            "history": [],
        }
        session.add(row)
        session.flush()
        rollout = from_row(row)
        if unopposed is not None:
            point_champion(session, store, rollout, version.digest, actor, override_by)
        if override is not None:
            _note_override(session, actor, override, rollout, version.digest)
        detail.update(rollout=row.id, stable=row.stable, status=row.status)
        detail |= {key: row.state[key] for key in ("override", "main_callers")}
        return rollout


def resume(store: Store, rollout: int, *, actor: str, reason: str = "", seen: Seen = Seen()) -> Rollout:
    """End the pause of a rollout. reason: for the audit log. Raises Refused if it is not at a pause.

    seen: what the actor looked at, here and below. Raises Refused where that has changed.
    """

    def decide(session: Session, current: Rollout) -> Transition:
        if current.current is None or current.current.pause is None:
            raise Refused(f"rollout {rollout} is not at a pause: it is {current.status}", where=_place(current))
        return Transition("rollout.resume", {"status": "running", "step": current.step + 1}, _because(reason))

    return _command(store, rollout, actor, "rollout.resume", decide, seen)


def promote(
    store: Store,
    rollout: int,
    *,
    actor: str,
    override: str | None = None,
    reason: str = "",
    seen: Seen = Seen(),
) -> Rollout:
    """Make the canary champion now, and skip the remaining steps. reason: for the audit log.

    override: the reason to promote without what is missing, an analysis or an approval; it needs the permission
    rollout.override and has its own audit entry. Raises Refused if a remaining step is an analysis or the canary is not
    approved, unless override gives a reason; if the canary may not be loaded; or if the champion changed since the
    rollout started.
    """
    _check_reason(override)

    def decide(session: Session, current: Rollout) -> Transition:
        skipped, approved = [step.kind for step in current.steps[current.step :]], True
        if override is not None:
            require(session, actor, "rollout.override", scope=current.scope)
            _note_override(session, actor, override, current, current.canary)
            # The override replaces the approval only where there is none: an approved canary serves by its approval.
            approved = standing_of(session, store, current.canary, current.scope).granted
        elif "analysis" in skipped:
            raise Refused(
                "this rollout has an analysis that has not passed yet",
                where=_place(current),
                fix=NextStep("wait for it, or override it", "rollout promote", rollout=current.id, override=...),
            )
        detail = {"skipped": skipped, "override": override, **_because(reason)}
        return to_promoted(current, detail, None if approved else actor)

    return _command(store, rollout, actor, "rollout.promote", decide, seen)


def abort(store: Store, rollout: int, *, actor: str, reason: str, seen: Seen = Seen()) -> Rollout:
    """Send all traffic back to stable, which serves if it may. Raises Refused if the rollout has ended already."""
    return _command(store, rollout, actor, "rollout.abort", lambda *_: to_aborted(reason), seen)


def rollback(
    store: Store,
    *,
    name: str,
    actor: str,
    reason: str,
    override: str | None = None,
    scope: Scope = Scope(),
    seen: Seen = Seen(),
) -> Rollout:
    """Give a name's traffic back to the version that served before; returns the rollout that was undone.

    If a rollout is live, it ends and the champion stays. Otherwise the champion becomes the version that the newest
    promotion replaced. If that one may not serve any more, it becomes the one before it. override: the reason to go
    back to a version that is not approved; it needs the permission rollout.override and has its own audit entry.
    Raises Refused, with the versions that could serve now, if none that served before may serve.
    """
    _check_reason(override)
    detail: JsonObject = {**scope.fields(), "reason": reason}
    by = None if override is None else actor
    require(store, actor, "rollout.change", scope=scope)
    verified = _verified_target(store, name, scope, by)
    with store.change(actor, "rollout.rollback", name, detail) as session:
        require(session, actor, "rollout.change", scope=scope)
        running = live_rollout(session, name, scope)
        undo = Transition("rollout.rollback", {"status": "rolled_back", "weight": 0, "reason": reason})
        if by is not None:
            require(session, by, "rollout.override", scope=scope)
        if running is not None:
            seen.check(session, running)
            if override is not None:
                _let_champion_serve(session, store, running, actor, override, verified)
            return apply(session, running, with_warning(session, store, running, undo), detail)
        promotions, target, override_by = promotions_to_undo(session, store, name, scope, by, verified)
        seen.check(session, promotions[0])
        point_champion(session, store, promotions[0], target, actor, override_by)
        if override is not None:
            _note_override(session, actor, override, promotions[0], target)
        undone = [apply(session, promotion, undo, {}) for promotion in promotions]
        detail |= {"rollout": undone[0].id, "undone": [one.id for one in undone], "champion": target}
        return undone[0]


def _verified_target(store: Store, name: str, scope: Scope, override_by: str | None) -> Verified:
    """The verified files of the version to which a rollback would give the traffic."""
    verified: Verified = {}
    with contextlib.suppress(Refused, UsageError), store.reading() as session:
        if live_rollout(session, name, scope) is None:
            promotions_to_undo(session, store, name, scope, override_by, verified)
        elif override_by is not None and (champion := get_alias(session, name, scope)) is not None:
            with contextlib.suppress(TunesmithError):  # its files cannot be read now, and the rollout must end
                return verify_files(store, champion.version, scope)
    return verified


def _let_champion_serve(
    session: Session, store: Store, rollout: Rollout, actor: str, reason: str, verified: Verified
) -> None:
    """Let the champion of a rollout's name serve by an override, where it has no standing of its own.

    Leaves alone a champion that no override lets serve, such as a recalled one, or whose files cannot be read now: the
    rollout must end all the same.
    """
    champion = get_alias(session, rollout.name, rollout.scope)
    if champion is None:
        return
    try:
        approved = standing_of(session, store, champion.version, rollout.scope).granted
        by = champion.override_by or None if approved else actor
        version = load_version(store, champion.version, session)
        check_may_serve(session, store, version, rollout.scope, by, verified)
    except TunesmithError:
        return
    point_champion(session, store, rollout, champion.version, actor, by)
    _note_override(session, actor, reason, rollout, champion.version)


def _because(reason: str) -> dict[str, str]:
    return {"reason": reason} if reason else {}


def _note_override(session: Session, actor: str, reason: str, rollout: Rollout, version: str) -> None:
    about = {"rollout": rollout.id, "version": version, "reason": reason}
    audit.append(session, actor=actor, action="rollout.override", subject=rollout.name, detail=about)


def _check_reason(override: str | None) -> None:
    if override is not None and not override.strip():
        raise UsageError("an override needs a reason", fix="say why the version need not be approved")


def _command(
    store: Store,
    rollout: int,
    actor: str,
    action: str,
    decide: Callable[[Session, Rollout], Transition],
    seen: Seen,
) -> Rollout:
    """A transition of a live rollout that a person asks for, decided in the transaction: it never has to be redone."""
    current = get_rollout(store, rollout)
    require(store, actor, "rollout.change", scope=current.scope)  # before anything is copied

    def permitted(session: Session, present: Rollout) -> Transition:
        require(session, actor, "rollout.change", scope=present.scope)
        seen.check(session, present)
        if not present.live:
            raise Refused(f"rollout {present.id} of {present.name} is {present.status.replace('_', ' ')} already")
        return decide(session, present)

    return make_transition(store, current, actor, action, permitted)


def _no_rival(session: Session, store: Store, champion: Alias | None, scope: Scope) -> str | None:
    """Why there is no champion to compare a canary with, None if there is one."""
    if champion is None:
        return "nothing served before"
    permission = standing_of(session, store, champion.version, scope)
    return None if permission.granted else f"the champion {permission.message}"


def _place(rollout: Rollout) -> str:
    return f"rollout {rollout.id} of {rollout.name}, step {rollout.step + 1} of {len(rollout.steps)}"

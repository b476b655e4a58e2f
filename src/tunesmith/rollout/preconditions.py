"""What must hold for a rollout to start, go on, promote or roll back."""

from __future__ import annotations

from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.scope import Scope
from tunesmith.registry.aliases import get_alias, revision_of, set_alias
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.serving import Permission, may_load, may_serve
from tunesmith.registry.versions import Version, load_version
from tunesmith.rollout.state import Rollout, promoted_rollouts
from tunesmith.store.identities import require
from tunesmith.store.store import Store


def broken_precondition(session: Session, store: Store, rollout: Rollout) -> str | None:
    """Why a live rollout cannot go on, None if it can: an arm may not be loaded any more, or the champion changed."""
    for arm, digest in (("canary", rollout.canary), ("champion", rollout.stable)):
        permission = arm_permission(session, store, digest, rollout.scope)
        if not permission.granted:
            return f"the {arm} {permission.message}"
    champion = get_alias(session, rollout.name, "champion", rollout.scope)
    if champion is None:
        return "the champion was removed during the rollout"
    if champion.version != rollout.stable:
        return f"the champion was changed during the rollout, to {short(champion.version)}"
    return None


def arm_permission(session: Session, store: Store, digest: str, scope: Scope) -> Permission:
    """Whether a version, given by its digest, may be loaded to answer a scope."""
    try:
        version = load_version(store, digest, session)
    except Refused:
        return Permission("unknown", "is not in the registry")
    return may_load(session, version, scope)


def promotion_problem(session: Session, store: Store, rollout: Rollout) -> str | None:
    """Why the canary may not become champion now, None if it may.

    The user who started the rollout must still be allowed to, and the canary may serve: by an approval, or by that
    user's override.
    """
    try:
        require(session, rollout.started_by, "rollout.start", scope=rollout.scope)
        canary = load_version(store, rollout.canary, session)
        override_by = rollout.started_by if rollout.override else None
        check_may_serve(session, store, canary, rollout.scope, override_by=override_by)
    except TunesmithError as error:
        return error.what
    return None


def check_may_serve(session: Session, store: Store, version: Version, scope: Scope, *, override_by: str | None) -> None:
    """Raise Refused unless a version may serve a scope.

    First what the database knows (serving.may_serve), then the files of its approval, unless an override replaces it.
    """
    may_serve(session, version, scope=scope, override_by=override_by).require(version.label)
    if override_by is None:
        require_approved(store, version, session)


def point_champion(session: Session, rollout: Rollout, version: str, actor: str) -> None:
    """Make a version (its digest) the champion of a rollout's name, tenant and region."""
    expected = revision_of(session, rollout.name, "champion", rollout.scope)
    set_alias(
        session,
        name=rollout.name,
        alias="champion",
        version=version,
        expected=expected,
        actor=actor,
        scope=rollout.scope,
    )


def promotions_to_undo(session: Session, store: Store, name: str, scope: Scope) -> tuple[list[Rollout], str]:
    """The promotions that a rollback undoes, newest first, and the digest of the version that served before them.

    There are several if the version that the newest one replaced may not be loaded any more. Raises Refused if nothing
    served before, or if a person set the champion by hand.
    """
    champion = get_alias(session, name, "champion", scope)
    current, undone = champion.version if champion else "", list[Rollout]()
    problem = f"{name} has no champion" if champion is None else ""
    for promotion in promoted_rollouts(session, name, scope):
        if not problem and not undone and promotion.canary != current:
            break  # set by hand: no rollout knows what it replaced
        undone.append(promotion)
        if not promotion.stable:
            problem = "nothing served before it"
            break
        permission = arm_permission(session, store, promotion.stable, scope)
        if permission.granted:
            return undone, promotion.stable
        problem = f"the version that served before, {short(promotion.stable)}, {permission.message}"
    raise Refused(
        problem or f"no rollout promoted the champion of {name}, so it is not known what served before",
        where=f"champion {short(current)}" if current else None,
        fix=f"tunesmith rollout start moves traffic to any approved version of {name}",
    )

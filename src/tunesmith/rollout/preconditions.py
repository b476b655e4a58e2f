"""What must hold for a rollout to start, go on, promote or roll back."""

from __future__ import annotations

import contextlib

from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import Verified
from tunesmith.registry.serving import set_alias, standing_of
from tunesmith.registry.versions import get_alias, load_version, revision_of
from tunesmith.rollout.champions import advice, could_serve
from tunesmith.rollout.state import Rollout, promoted_rollouts
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store


def broken_precondition(session: Session, store: Store, rollout: Rollout, override_by: str | None = None) -> str | None:
    """Why a live rollout cannot go on, None if it can: an arm may not serve any more, or the champion changed.

    override_by: a user who lets the canary serve without an approval.
    """
    for arm, digest, by in (("canary", rollout.canary, override_by), ("champion", rollout.stable, None)):
        permission = standing_of(session, store, digest, rollout.scope, override_by=by)
        if not permission.granted:
            return f"the {arm} {permission.message}"
    champion = get_alias(session, rollout.name, rollout.scope)
    if champion is None:
        return "the champion was removed during the rollout"
    if champion.version != rollout.stable:
        return f"the champion was changed during the rollout, to {short(champion.version)}"
    return None


def promotion_problem(
    session: Session, store: Store, rollout: Rollout, override_by: str | None, verified: Verified
) -> str | None:
    """Why the canary may not become champion now, None if it may.

    The user who started the rollout must still be allowed to, and the canary may serve: by an approval, or by an
    override of the user override_by. verified: as of check_may_serve. Raises TunesmithError where that cannot be
    decided now, since the disk is full or a bucket cannot be reached.
    """
    try:
        require(session, rollout.started_by, "rollout.start", scope=rollout.scope)
        canary = load_version(store, rollout.canary, session)
        check_may_serve(session, store, canary, rollout.scope, override_by, verified)
    except (Refused, UsageError) as error:
        return error.what
    return None


def verify_files(store: Store, version: str, scope: Scope) -> Verified:
    """Verify the files of a version (its digest) that may serve a scope, before a transaction that needs it.

    Its weights are copied for that, and all other writers would wait. What may not serve is left for the transaction to
    refuse. Raises TunesmithError where the files cannot be read or copied now.
    """
    verified: Verified = {}
    with contextlib.suppress(Refused, UsageError), store.reading() as session:
        found = load_version(store, version, session)
        check_may_serve(session, store, found, scope, verified=verified)
    return verified


def point_champion(
    session: Session, store: Store, rollout: Rollout, version: str, actor: str, override_by: str | None
) -> None:
    """Make a version (its digest) the champion of a rollout's name, tenant and region.

    override_by: the user who lets it serve without an approval. Raises Refused if it may not serve.
    """
    expected = revision_of(session, rollout.name, rollout.scope)
    set_alias(
        session,
        name=rollout.name,
        version=load_version(store, version, session),
        expected=expected,
        actor=actor,
        scope=rollout.scope,
        override_by=override_by,
    )


def promotions_to_undo(
    session: Session,
    store: Store,
    name: str,
    scope: Scope,
    override_by: str | None,
    verified: Verified,
) -> tuple[list[Rollout], str, str | None]:
    """The promotions that a rollback undoes, newest first, the digest of the version that served before them, and the
    user by whose override it serves.

    There are several if the version that the newest one replaced may not serve any more. override_by: a user who lets
    it serve without an approval. verified: as of check_may_serve. Raises Refused, with the versions that could serve
    now, if no version that served before may serve, or if a person set the champion by hand; TunesmithError if that
    cannot be decided now: a version that may serve must not be passed over.
    """
    champion = get_alias(session, name, scope)
    current, undone = champion.version if champion else "", list[Rollout]()
    problem = f"{name} has no champion" if champion is None else ""
    for promotion in promoted_rollouts(session, name, scope):
        if not problem and not undone and promotion.canary != current:
            break  # set by hand: no rollout knows what it replaced
        undone.append(promotion)
        if not promotion.stable:
            problem = problem or "nothing served before it"
            break
        if promotion.stable == promotion.canary:  # the champion was started again, under an override
            continue
        # An explicit override counts only where the version has no standing of its own.
        before_by = promotion.stable_override_by or None
        for by in dict.fromkeys((before_by, override_by or before_by)):
            try:
                before = load_version(store, promotion.stable, session)
                check_may_serve(session, store, before, scope, by, verified)
                return undone, promotion.stable, by
            except (Refused, UsageError) as error:
                problem = problem or f"the version that served before may not serve now: {error.what}"
    fix = advice(could_serve(session, store, name, scope), scope)
    if undone:
        words = f"{fix}; an admin may go back to a version that is only not approved, by an override"
        fix = NextStep(words, "rollout rollback", rollout=name, **scope.fields(), override=...)
    raise Refused(
        problem or f"no rollout promoted the champion of {name}, so it is not known what served before",
        where=f"champion {short(current)}" if current else None,
        fix=fix,
    )

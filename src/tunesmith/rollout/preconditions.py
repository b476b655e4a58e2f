"""What a rollout stands on: the champion it set out against, versions that may be served, and the way back."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.registry.aliases import get_alias, revision_of, set_alias
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.versions import load_version
from tunesmith.rollout.state import Rollout, promoted_rollouts
from tunesmith.store.identities import require
from tunesmith.store.recalls import recalled
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow


def lost_ground(session: Session, store: Store, rollout: Rollout) -> str | None:
    """Why a live rollout cannot go on: an arm may not be served any more, or the champion is another. Else None."""
    for arm, digest in (("canary", rollout.canary), ("champion", rollout.stable)):
        problem = unservable(session, store, digest)
        if problem is not None:
            return f"the {arm} {problem}"
    champion = get_alias(session, rollout.name, "champion", rollout.tenant, rollout.region)
    if champion is None:
        return "the champion was taken away under the rollout"
    if champion.version != rollout.stable:
        return f"the champion was changed under the rollout, to {short(champion.version)}"
    return None


def unservable(session: Session, store: Store, digest: str) -> str | None:
    """Why a version may not be served, as the end of a sentence about it; None where nothing speaks against it."""
    reason = recalled(session, digest)
    if reason is not None:
        return f"was recalled: {reason}"
    registered = session.scalars(select(VersionRow.digest).where(VersionRow.digest == digest)).first()
    if registered is None or not store.record_path(digest).is_file():
        return "is gone from the registry"
    return None


def unpromotable(session: Session, store: Store, rollout: Rollout) -> str | None:
    """Why the canary may not become champion today, whatever held when the rollout began. None where it may.

    The approval, or for an override the role of who gave it, must still stand.
    """
    scope = {"tenant": rollout.tenant, "region": rollout.region}
    try:
        require(session, rollout.started_by, "rollout.start", **scope)
        if rollout.override is None:
            require_approved(store, load_version(store, rollout.canary), session)
        else:
            require(session, rollout.started_by, "rollout.override", **scope)
    except TunesmithError as error:
        return error.what
    return None


def point_champion(session: Session, rollout: Rollout, version: str, actor: str) -> None:
    """Make version the champion where rollout's name is served, by compare-and-set on what this session sees."""
    place = {"name": rollout.name, "alias": "champion", "tenant": rollout.tenant, "region": rollout.region}
    set_alias(session, version=version, expected=revision_of(session, **place), actor=actor, **place)


def way_back(session: Session, store: Store, name: str, tenant: str, region: str) -> tuple[list[Rollout], str]:
    """The promotions to undo, newest first, and the version that served before them.

    More than one where what the newest replaced may not be served any more. Raises Refused where nothing served before.
    """
    champion = get_alias(session, name, "champion", tenant, region)
    standing, undone = champion.version if champion else "", list[Rollout]()
    problem = f"{name} has no champion" if champion is None else ""
    for promotion in promoted_rollouts(session, name, tenant, region):
        if not problem and not undone and promotion.canary != standing:
            break  # the champion was set by hand: what it replaced, no rollout knows
        undone.append(promotion)
        if not promotion.stable:
            problem = "nothing served before it"
            break
        unfit = unservable(session, store, promotion.stable)
        if unfit is None:
            return undone, promotion.stable
        problem = f"what served before, {short(promotion.stable)}, {unfit}"
    raise Refused(
        problem or f"the champion of {name} was not promoted by a rollout, so what it replaced is not known",
        where=f"champion {short(standing)}" if standing else None,
        fix=f"tunesmith rollout start moves traffic to any approved version of {name}",
    )

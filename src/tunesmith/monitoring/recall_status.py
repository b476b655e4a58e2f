"""The status of a recall: what still uses the recalled records, and which versions replaced the recalled ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.data.governance.withdrawn import ROW_CAUSES, load_withdrawn, recalled_values, same_name
from tunesmith.monitoring.recall import Cause, find_reached
from tunesmith.records.version import VersionBody
from tunesmith.registry.opening import check_not_recalled
from tunesmith.registry.signing.release import read_version
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow


class RecallStatus(BaseModel):
    """Whether nothing uses what was recalled any more. left: what still has to be done, one line each.

    retrain: names of recalled versions without a replacement. replaced: name -> the newest version made without it.
    other_licences, near: see Recall; they do not count as what is left.
    """

    model_config = ConfigDict(frozen=True)

    cause: str
    gone: bool
    left: tuple[str, ...]
    retrain: tuple[str, ...]
    replaced: Mapping[str, str]
    other_licences: tuple[str, ...] = ()
    near: tuple[str, ...] = ()


def recall_status(store: Store, cause: Cause) -> RecallStatus:
    """The status of a recall, from the graph of records as it is now.

    Gone: every record made from the cause is marked as recalled, no alias points at one, no live rollout has one as an
    arm, the review queue does not hold its rows, and the next build leaves them out. Raises UsageError if the cause was
    never recalled.
    """
    with database.reading(store.engine) as session:
        marked = recalled_values(session, cause.kind).get(same_name(cause.kind, cause.value))
        if not marked:
            raise UsageError(
                f"{cause.label} was never recalled in this store",
                fix=NextStep("recall it", "recall", reason=..., **{cause.kind: cause.value}),
            )
        found, items = find_reached(store, session, cause, reason="", done=False)
        since = [one for one in found.reached if one.digest not in marked]
        left = [f"{one.kind} {one.label} was made from it since: recall it again" for one in since]
        left += [f"{one.name}@{one.alias}{_scope(one.tenant, one.region)} still points at it" for one in found.aliases]
        left += [f"rollout {number} still has an arm of it" for number in found.rollouts]
        if items:
            left.append(f"the review queue holds its text (items: {len(items)}): recall it again")
        names = {VersionBody.read(store, one.digest).name for one in found.reached if one.kind == "version"}
        newest = _replacements(store, session, names)
    if cause.kind in ROW_CAUSES:
        withdrawn = load_withdrawn(store)
        if not withdrawn.names(cause.kind, cause.value):
            left.append("the next build would include its rows again")
    return RecallStatus(
        cause=cause.label,
        gone=not left,
        left=tuple(left),
        retrain=tuple(sorted(names - newest.keys())),
        replaced=newest,
        other_licences=found.other_licences,
        near=found.near,
    )


def _replacements(store: Store, session: Session, names: set[str]) -> dict[str, str]:
    """Name -> the newest version of that name that was made from nothing recalled."""
    newest: dict[str, str] = {}
    for name in sorted(names):
        query = select(VersionRow.digest).where(VersionRow.name == name).order_by(VersionRow.number.desc())
        for digest in session.scalars(query):
            version, statement = read_version(store.record(digest, kind="version"), short(digest))
            with contextlib.suppress(Refused):
                check_not_recalled(session, version, statement)
                newest[name] = version.label
                break
    return newest


def _scope(tenant: str, region: str) -> str:
    said = ", ".join(f"{kind} {value}" for kind, value in (("tenant", tenant), ("region", region)) if value)
    return f" ({said})" if said else ""

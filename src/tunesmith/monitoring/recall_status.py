"""After a recall: is what was withdrawn gone, and what took its place?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.governance.withdrawn import load_withdrawn
from tunesmith.monitoring.recall import Cause, reach
from tunesmith.registry.signing.release import read_version
from tunesmith.registry.versions import check_not_recalled
from tunesmith.store import database
from tunesmith.store.recalls import causes
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow


class Standing(BaseModel):
    """Whether a cause is gone. left: what still has to be done, a line each; replaced: reached name -> new version."""

    model_config = ConfigDict(frozen=True)

    cause: str
    gone: bool
    left: tuple[str, ...]
    retrain: tuple[str, ...]
    replaced: Mapping[str, str]


def check_gone(store: Store, cause: Cause) -> Standing:
    """Walk the graph again, as it is now.

    Gone: everything that comes of the cause is marked, no alias means any of it, no live rollout has an arm of it, and
    a build leaves its rows out. retrain: names of reached versions that nothing sound has replaced yet. Raises
    UsageError where the cause was never recalled.
    """
    with database.reading(store.engine) as session:
        marked = set(causes(session).get(cause.label, ()))
        if not marked:
            raise UsageError(
                f"{cause.label} was never recalled here",
                fix=f"tunesmith recall --{cause.kind} {cause.value} --reason ...",
            )
        found = reach(store, session, cause, reason="", done=False)
        since = [one for one in found.reached if one.digest not in marked]
        left = [f"{one.kind} {one.label} came of it since: recall it again" for one in since]
        left += [f"{one.name}@{one.alias}{_place(one.tenant, one.region)} still means it" for one in found.aliases]
        left += [f"rollout {number} still has an arm of it" for number in found.rollouts]
        names = {str(store.record(one.digest).body["name"]) for one in found.reached if one.kind == "version"}
        newest = _replacements(store, session, names)
    if cause.kind in ("row", "source", "licence", "subject"):
        withdrawn = load_withdrawn(store)
        if cause.value not in withdrawn.values.get(cause.kind, ()):
            left.append("a build would take its rows in again")
    return Standing(
        cause=cause.label,
        gone=not left,
        left=tuple(left),
        retrain=tuple(sorted(names - newest.keys())),
        replaced=newest,
    )


def _replacements(store: Store, session: Session, names: set[str]) -> dict[str, str]:
    """Name -> the newest version of that name that nothing recalled stands behind."""
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


def _place(tenant: str, region: str) -> str:
    said = ", ".join(f"{kind} {value}" for kind, value in (("tenant", tenant), ("region", region)) if value)
    return f" ({said})" if said else ""

"""What a recall left to be made anew: names whose withdrawn version no later sound one has replaced in service.

Nothing is queued. What is due follows each time from the recalls, the history of the champion in the audit log and the
versions there are: so it can neither be lost nor go stale, and it is over by itself when the retrained version serves.
A version that was withdrawn before it ever was champion leaves nothing due.
"""

from __future__ import annotations

import contextlib

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.signing.release import read_version
from tunesmith.registry.versions import Version, check_not_recalled
from tunesmith.rollout.state import LIVE
from tunesmith.store import database
from tunesmith.store.recalls import causes
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, AuditRow, RolloutRow, VersionRow

_Place = tuple[str, str, str]  # name, tenant, region


class Due(BaseModel):
    """A place whose champion was withdrawn. version: the newest withdrawn one that was champion there.

    causes: by which recalls; serves: what the champion means now, "" for nothing; answers: whether that may be served;
    replacement: a later sound version that does not serve yet; next: commands, in order.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    tenant: str
    region: str
    version: str
    causes: tuple[str, ...]
    serves: str
    answers: bool
    replacement: str | None
    next: tuple[str, ...]


def list_due(store: Store, name: str | None = None) -> list[Due]:
    """What is due, of one name or of all, in the order of names, tenants and regions; changes nothing."""
    with database.reading(store.engine) as session:
        reached = causes(session)
        if not reached:
            return []
        places = _champions(session)
        found = [
            _due(store, session, place, places[place], reached) for place in sorted(places) if name in (None, place[0])
        ]
    return [one for one in found if one is not None]


def _champions(session: Session) -> dict[_Place, set[str]]:
    """Every version that was ever champion, by place, from the audit log."""
    places: dict[_Place, set[str]] = {}
    for row in session.scalars(select(AuditRow).where(AuditRow.action == "alias.set").order_by(AuditRow.seq)):
        if row.detail["alias"] == "champion" and row.detail["version"]:
            place = (row.detail["name"], row.detail["tenant"], row.detail["region"])
            places.setdefault(place, set()).add(row.detail["version"])
    return places


def _due(store: Store, session: Session, place: _Place, served: set[str], reached: dict[str, list[str]]) -> Due | None:
    name, tenant, region = place
    versions = [_read(store, digest) for digest in served]
    withdrawn = [version for version in versions if not _sound(store, session, version)]
    if not withdrawn:
        return None
    last = max(withdrawn, key=lambda version: version.number)
    alias = session.get(AliasRow, (name, "champion", tenant, region))
    now = _read(store, alias.version) if alias is not None and alias.version else None
    answers = now is not None and _sound(store, session, now)
    if now is not None and answers and now.number > last.number:
        return None
    later = select(VersionRow).where(
        VersionRow.name == name,
        VersionRow.number > last.number,
        VersionRow.tenant.in_(("", tenant)),
        VersionRow.region.in_(("", region)),
    )
    newer = [_read(store, row.digest) for row in session.scalars(later.order_by(VersionRow.number.desc()))]
    replacement = next((version for version in newer if _sound(store, session, version)), None)
    by = _causes(store, last, reached)
    return Due(
        name=name,
        tenant=tenant,
        region=region,
        version=last.label,
        causes=tuple(by),
        serves=now.label if now else "",
        answers=answers,
        replacement=replacement.label if replacement else None,
        next=tuple(_next(store, session, place, by, replacement)),
    )


def _read(store: Store, digest: str) -> Version:
    return read_version(store.record(digest, kind="version"), short(digest))[0]


def _sound(store: Store, session: Session, version: Version) -> bool:
    statement = read_version(store.record(version.digest, kind="version"), version.label)[1]
    with contextlib.suppress(Refused):
        check_not_recalled(session, version, statement)
        return True
    return False


def _causes(store: Store, version: Version, reached: dict[str, list[str]]) -> list[str]:
    """The recalls behind it. That of another version says nothing of what was merely measured beside it."""
    statement = read_version(store.record(version.digest, kind="version"), version.label)[1]
    own = {version.digest, version.candidate}
    rests = {*own, *statement.records, *statement.blobs}
    return [
        cause
        for cause, digests in reached.items()
        if not (own if cause.startswith("version ") else rests).isdisjoint(digests)
    ]


def _next(store: Store, session: Session, place: _Place, by: list[str], replacement: Version | None) -> list[str]:
    name, tenant, region = place
    if replacement is None:
        kinds = {cause.partition(" ")[0] for cause in by}
        change = "name another `base`" if "base" in kinds else "change what made these weights"
        # Rows stay out by themselves; what a recalled version or base was made of does not change by itself.
        return [*([f"{change} in tunesmith.yaml"] if kinds & {"base", "version"} else []), "tunesmith run"]
    live = select(RolloutRow).where(RolloutRow.name == name, RolloutRow.status.in_(LIVE))
    if any(
        row.canary == replacement.digest and (row.tenant, row.region) == (tenant, region)
        for row in session.scalars(live)
    ):
        return ["tunesmith rollout status"]
    scope = "".join(f" --{key} {value}" for key, value in (("tenant", tenant), ("region", region)) if value)
    steps = [f"tunesmith rollout start {replacement.label}{scope}"]
    try:
        require_approved(store, replacement, session)
    except Refused:
        steps.insert(0, f"tunesmith approve {replacement.label} --as NAME --reason WHY")
    return steps

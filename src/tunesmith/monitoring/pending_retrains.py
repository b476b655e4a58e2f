"""Retrains that recalls left pending: names whose recalled champion no later version has replaced yet.

Nothing is queued. The list is computed each time from the recalls, the champions that the audit log names, and the
registered versions. So it cannot be lost or go stale, and an entry disappears when the retrained version serves.
A version that was recalled before it became champion leaves nothing pending.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView
from tunesmith.records.version import VersionBody
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import recall_of
from tunesmith.registry.signing.release import read_version
from tunesmith.registry.versions import Version, get_alias
from tunesmith.rollout.state import live_rollout
from tunesmith.store.records import causes
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, AuditRow, VersionRow

_Place = tuple[str, Scope]  # a name, and for whom


class PendingRetrain(ScopedView):
    """A name, for a tenant and region, whose champion was recalled. version: the newest recalled champion.

    causes: of its recalls. serves: the version that is champion now, "" for none. answers: whether that one may be
    loaded. replacement: a later version that was made without what was recalled but is not champion yet. next: what
    to do, in order.
    """

    name: str
    version: str
    causes: tuple[str, ...]
    serves: str
    answers: bool
    replacement: str | None
    next: tuple[NextStep, ...]


def list_pending_retrains(store: Store, name: str | None = None) -> list[PendingRetrain]:
    """Pending retrains of one name, or of all, in the order of names, tenants and regions. Changes nothing."""
    with store.reading() as session:
        by_cause = causes(session)
        if not by_cause:
            return []
        places = _champions(session)
        pending = [
            _pending(store, session, place, places[place], by_cause)
            for place in sorted(places)
            if name in (None, place[0])
        ]
    return [one for one in pending if one is not None]


def _champions(session: Session) -> dict[_Place, set[str]]:
    """Digests of every version that ever was champion, by place, from the audit log."""
    places: dict[_Place, set[str]] = {}
    for row in session.scalars(select(AuditRow).where(AuditRow.action == "alias.set").order_by(AuditRow.seq)):
        if row.detail["alias"] == CHAMPION and row.detail["version"]:
            place = (row.detail["name"], Scope(row.detail["tenant"], row.detail["region"]))
            places.setdefault(place, set()).add(row.detail["version"])
    return places


def _pending(
    store: Store, session: Session, place: _Place, champions: set[str], by_cause: dict[str, list[str]]
) -> PendingRetrain | None:
    name, scope = place
    recalled = [each for each in (_read(store, digest) for digest in champions) if recall_of(session, *each)]
    if not recalled:
        return None
    last, statement = max(recalled, key=lambda each: each[0].number)
    alias = get_alias(session, name, scope)
    now, made_from = (None, None) if alias is None else _read(store, alias.version)
    answers = now is not None and made_from is not None and recall_of(session, now, made_from) is None
    if now is not None and answers and now.number > last.number:
        return None
    covering = (VersionRow.tenant.in_(("", scope.tenant)), VersionRow.region.in_(("", scope.region)))
    replacement = newest_left(store, session, name, VersionRow.number > last.number, *covering)
    by = _causes(last, statement, by_cause)
    return PendingRetrain(
        name=name,
        **scope.fields(),
        version=last.label,
        causes=tuple(by),
        serves=now.label if now else "",
        answers=answers,
        replacement=replacement.label if replacement else None,
        next=tuple(_next(store, session, place, by, replacement)),
    )


def newest_left(store: Store, session: Session, name: str, *conditions: ColumnElement[bool]) -> Version | None:
    """The newest version of a name, under these conditions, that was made from nothing recalled."""
    query = select(VersionRow.digest).where(VersionRow.name == name, *conditions).order_by(VersionRow.number.desc())
    read = (_read(store, digest) for digest in session.scalars(query))
    return next((version for version, statement in read if recall_of(session, version, statement) is None), None)


def _read(store: Store, digest: str) -> tuple[Version, VersionBody]:
    return read_version(store.record(digest, kind="version"), short(digest))


def _causes(version: Version, statement: VersionBody, by_cause: dict[str, list[str]]) -> list[str]:
    """The recalls that reached a version. A recall of another version reaches it only through its weights."""
    own = {version.digest, version.candidate}
    everything = {*own, *statement.records, *statement.blobs}
    return [
        cause
        for cause, digests in by_cause.items()
        if not (own if cause.startswith("version ") else everything).isdisjoint(digests)
    ]


def _next(store: Store, session: Session, place: _Place, by: list[str], replacement: Version | None) -> list[NextStep]:
    name, scope = place
    if replacement is None:
        kinds = {cause.partition(" ")[0] for cause in by}
        change = "name another `base`" if "base" in kinds else "change the rows or settings"
        # The next build leaves recalled rows out. It does not replace a base, or what a recalled version was made from.
        changes = [NextStep(f"{change} in tunesmith.yaml")] if kinds & {"base", "version"} else []
        return [*changes, NextStep("build, train and measure again", "run")]
    rollout = live_rollout(session, name, scope)
    if rollout is not None and rollout.canary == replacement.digest:
        return [NextStep("see how its rollout goes", "rollout status")]
    label = replacement.label
    steps = [NextStep(f"start a rollout of {label}", "rollout start", version=label, **scope.fields())]
    try:
        check_may_serve(session, store, replacement, scope)
    except Refused:
        steps.insert(0, NextStep(f"have {label} approved", "approve", version=label, actor=..., reason=...))
    return steps

"""What the console shows of versions: a list with their states, one version, and the records that it was made from.

A person sees the versions of their tenant and region, and those that are for all; one without a tenant sees all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.numbers import is_number
from tunesmith.core.view import View
from tunesmith.evaluation.summary import VerdictSummary, verdict_summary
from tunesmith.registry import serving, versions
from tunesmith.registry.aliases import list_aliases
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.registry.risk import Approvals
from tunesmith.registry.serving import DECIDED
from tunesmith.registry.signing.attestations import Decision
from tunesmith.registry.signing.release import Version
from tunesmith.rollout.state import LIVE
from tunesmith.services.datasets import datasheet
from tunesmith.services.versions import RegisteredVersion, approvals_for, registered
from tunesmith.store import database
from tunesmith.store.people.identities import User
from tunesmith.store.scoping import visible
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, KeyRow, RecordRow, RolloutRow, VersionRow

PAGE = 50
State = Literal["serving", "rolling out", "approved", "waiting", "refused", "recalled", "expired", "untrusted"]
STATES: tuple[State, ...] = get_args(State)
_REASONS: dict[str | None, State] = {
    None: "approved",
    "not_approved": "waiting",
    "refused": "refused",
    "recalled": "recalled",
    "expired": "expired",
}


class ListedVersion(View):
    """A version in a list. version: NAME@v3. state, why: whether it may serve, and what stands against it."""

    version: str
    name: str
    number: int
    digest: str
    tenant: str
    region: str
    signer: str
    created_at: str
    expires_at: str | None
    override: str | None
    marks: tuple[str, ...]
    state: State
    why: str


class VersionPage(View):
    """A page of a list, the newest versions first. total: on all pages."""

    versions: tuple[ListedVersion, ...]
    total: int
    page: int
    pages: int


class Decided(View):
    """A decision on a version, as the audit log has it. entry: its number there. key: the label of the key that signed.

    counts: whether it is among those that say now whether the version may serve.
    """

    entry: int
    at: str
    approver: str
    decision: Decision
    reason: str
    key: str
    counts: bool


class VersionDetails(View):
    """One version. base, candidate, evaluation, verdict: digests. approvals: what it still takes; decisions: the newest
    first. may_decide: whether the person who looks may approve or refuse it; not_because: why not, if they are an
    approver. notice: whether it has a NOTICE.md. dataset: of its rows, None without.
    """

    listed: ListedVersion
    candidate: str
    evaluation: str
    judged: VerdictSummary | None
    approvals: Approvals | None
    decisions: tuple[Decided, ...]
    may_decide: bool
    not_because: str
    notice: bool
    dataset: str | None


def page_of_versions(store: Store, user: User, *, text: str = "", state: str = "", page: int = 1) -> VersionPage:
    """A page of the versions that a user may see. text: a part of the name, NAME@v3, or the start of a digest.

    state: only versions in this state; then all that fit the text are looked at. Raises UsageError for an unknown one.
    """
    if state and state not in STATES:
        raise UsageError(f"{state[:40]!r} is no state of a version", fix=f"one of {', '.join(STATES)}")
    query = _visible(user.scope, text)
    with database.reading(store.engine) as session:
        if state:
            found = [one for one in _listed(store, session, session.scalars(query)) if one.state == state]
            total, first = len(found), (page - 1) * PAGE
            shown = found[first : first + PAGE]
        else:
            total = session.scalar(select(func.count()).select_from(query.order_by(None).subquery())) or 0
            shown = _listed(store, session, session.scalars(query.offset((page - 1) * PAGE).limit(PAGE)))
    return VersionPage(versions=tuple(shown), total=total, page=page, pages=max(1, -(-total // PAGE)))


def find_version(store: Store, user: User, name: str, number: int) -> RegisteredVersion | None:
    """A version that a user may see; None for any other."""
    query = _visible(user.scope, "").where(VersionRow.name == name, VersionRow.number == number)
    with database.reading(store.engine) as session:
        digest = session.scalars(query.with_only_columns(VersionRow.digest)).first()
    return None if digest is None else registered(versions.load_version(store, digest))


def details(store: Store, user: User, version: Version) -> VersionDetails:
    """What a version's page shows."""
    with database.reading(store.engine) as session:
        row = session.get_one(VersionRow, (version.name, version.number))
        (listed,) = _listed(store, session, [row])
    try:
        approvals = approvals_for(store, version)
        judged = verdict_summary(store, version.verdict)
    except (TunesmithError, KeyError):  # the state says what is wrong with its signature or evidence
        approvals, judged = None, None
    not_because = _not_because(user, version)
    return VersionDetails(
        listed=listed,
        candidate=version.candidate,
        evaluation=version.evaluation,
        judged=judged,
        approvals=approvals,
        decisions=_decisions(store, version, approvals),
        may_decide=user.may("version.approve") and not not_because,
        not_because=not_because,
        notice=NOTICE in store.record(version.digest).blobs,
        dataset=_dataset(store, version),
    )


def notice_of(store: Store, version: Version) -> str:
    """The text of a version's NOTICE.md. Raises Refused where it has none."""
    blob = store.record(version.digest).blobs.get(NOTICE)
    if blob is None:
        raise Refused(f"{version.label} was made from no rows, so it has no {NOTICE}", where=version.label)
    return store.read_blob(blob).decode()


def datasheet_of(store: Store, version: Version) -> str:
    """The datasheet of a version's rows, in Markdown. Raises Refused where it was made from none."""
    dataset = _dataset(store, version)
    if dataset is None:
        raise Refused(f"{version.label} was made from no rows", where=version.label)
    return datasheet(store, dataset, version.name)[1]


def _dataset(store: Store, version: Version) -> str | None:
    """The digest of the rows that a version was trained on, or else answers with."""
    parents = store.record(version.candidate).parents
    if "training" in parents:
        return store.record(parents["training"]).parents.get("dataset")
    return parents.get("dataset")


def _not_because(user: User, version: Version) -> str:
    if user.name == version.signer:
        return "You registered this version: another person decides on it."
    if not user.scope.covers(version.scope):
        return "This version is for more than your tenant or region: somebody who speaks for all of it decides."
    return ""


def _decisions(store: Store, version: Version, approvals: Approvals | None) -> tuple[Decided, ...]:
    entries = select(AuditRow).where(AuditRow.subject == version.digest, AuditRow.action.in_(DECIDED))
    with database.reading(store.engine) as session:
        rows = list(session.scalars(entries.order_by(AuditRow.seq.desc())))
        prints = [str(row.detail.get("signature", {}).get("key")) for row in rows]
        known = {key.fingerprint: key for key in session.scalars(select(KeyRow).where(KeyRow.fingerprint.in_(prints)))}
    found: list[Decided] = []
    overturned = approvals is None
    for row, fingerprint in zip(rows, prints, strict=True):
        refused, key = row.action == "version.refuse", known.get(fingerprint)
        in_time = key is not None and (key.until is None or row.seq < key.until)
        counts = False
        if approvals is not None and in_time and not overturned:
            counts = approvals.refused_by == row.actor if refused else row.actor in approvals.approvers
        overturned = overturned or (refused and in_time)
        found.append(
            Decided(
                entry=row.seq,
                at=row.at,
                approver=row.actor,
                decision="refuse" if refused else "approve",
                reason=str(row.detail.get("reason", "")),
                key=key.label if key else "",
                counts=counts,
            )
        )
    return tuple(found)


def _listed(store: Store, session: Session, rows: Iterable[VersionRow]) -> list[ListedVersion]:
    found = [versions.version_of(store, row) for row in rows]
    permissions = serving.permissions(session, found)
    aliases = list_aliases(store)
    champions = {alias.version: alias for alias in aliases if alias.alias == "champion"}
    canaries = set(session.scalars(select(RolloutRow.canary).where(RolloutRow.status.in_(LIVE))))
    listed = []
    for version in found:
        permission = permissions[version.digest]
        state = _REASONS.get(permission.reason, "untrusted")
        champion = champions.get(version.digest)
        if champion is not None and (state == "approved" or (state == "waiting" and champion.override_by)):
            state = "serving"
        elif version.digest in canaries and state in ("approved", "waiting"):
            state = "rolling out"
        listed.append(ListedVersion.of(version, version=version.label, state=state, why=permission.message))
    return listed


def _visible(scope: Scope, text: str) -> Select[VersionRow]:
    """The versions that a scope may see and that fit a text, the newest first."""
    query = select(VersionRow).join(RecordRow, RecordRow.digest == VersionRow.digest)
    query = query.where(*visible(VersionRow, scope))
    query = query.order_by(RecordRow.created_at.desc(), VersionRow.name, VersionRow.number.desc())
    return query.where(_fits(text.strip())) if text.strip() else query


def _fits(text: str) -> ColumnElement[bool]:
    name, _, number = text.partition("@v")
    if is_number(number) and len(number) < 10:
        return (VersionRow.name == name) & (VersionRow.number == int(number))
    start = f"sha256:{text.removeprefix('sha256:').lower()}"
    return or_(VersionRow.name.contains(text, autoescape=True), VersionRow.digest.startswith(start, autoescape=True))

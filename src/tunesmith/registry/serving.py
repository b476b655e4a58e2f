"""Whether a version may serve, decided from the database only: cheap enough for every request.

`standing` decides for a version that serves: may its answers leave now? `may_serve` decides whether it may begin to.
Both take what `may_load` takes. A change to what serves asks `approvals.check_may_serve`, which also reads files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.text.names import Scope, check_name
from tunesmith.registry.risk import Approvals
from tunesmith.registry.signing.attestations import check_approver
from tunesmith.registry.signing.release import Version, check_expiry, check_signer
from tunesmith.registry.signing.signatures import Expired, Untrusted, check_in_time
from tunesmith.registry.versions import Alias, get_alias, load_version
from tunesmith.store import audit
from tunesmith.store.people.identities import require, trusted_keys
from tunesmith.store.people.trust import TrustedKey, find_key
from tunesmith.store.records import recalled, recalls_of
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, LIVE, AliasRow, AuditRow, RolloutRow, VersionRow

Reason = Literal["unknown", "wrong_scope", "recalled", "expired", "signer", "not_approved", "refused", "override"]
# The audit log's actions for an approver's decision: an approval, a refusal.
DECIDED = ("version.approve", "version.refuse")


class Permission(NamedTuple):
    """Whether a version may serve. reason: the first condition that fails, None if the version may serve.

    message: why not, to follow the version's name: "was recalled: consent withdrawn". fix: what to do about it.
    """

    reason: Reason | None = None
    message: str = ""
    fix: str | None = None

    @property
    def granted(self) -> bool:
        """Whether it may serve."""
        return self.reason is None

    def require(self, name: str) -> None:
        """Raise Refused with the message unless granted; Untrusted or Expired for these reasons."""
        if not self.granted:
            error = {"signer": Untrusted, "expired": Expired}.get(str(self.reason), Refused)
            raise error(f"{name} {self.message}", where=name, fix=self.fix)


GRANTED = Permission()


def may_serve(
    session: Session, version: Version, *, scope: Scope = Scope(), override_by: str | None = None
) -> Permission:
    """Whether a version may begin to serve a scope now.

    Checks what may_load checks, and that as many users have approved it as its risk class takes, who may approve it
    today, and that nobody refused it since. override_by: the user who lets it serve without enough approvals, not
    against a refusal; they must hold the permission rollout.override now.
    """
    permission = may_load(session, version, scope)
    if permission.granted:
        permission = unmet(version, *_decisions(session, version))
        if permission.reason == "not_approved" and override_by is not None:
            try:
                require(session, override_by, "rollout.override", scope=scope)
            except Refused as error:
                message = f"is not approved, and the override does not count: {error.what}"
                return Permission("override", message, error.fix)
            return GRANTED
    return permission


def may_load(session: Session, version: Version, scope: Scope = Scope()) -> Permission:
    """Whether a version may be loaded to answer requests of a scope, approved or not.

    It must be registered, made for this scope, not recalled and not expired, and its signer must be allowed
    to sign it today.
    """
    row = session.scalars(select(VersionRow).where(VersionRow.digest == version.digest)).first()
    if row is None:
        return Permission("unknown", "is not in the registry", NextStep("register it again", "register"))
    if not row.scope.covers(scope):
        what = f"is for {row.scope}, not for {scope}"
        return Permission("wrong_scope", what, "register it for that tenant and region")
    return _usable(version, recalled(session, version.digest), trusted_keys(session), row.key)


def standing(session: Session, version: Version, scope: Scope) -> Permission:
    """Whether a version may answer requests of a scope now: by an approval, or by an override that is in force."""
    return may_serve(session, version, scope=scope, override_by=override_in_force(session, version, scope))


def standing_of(
    session: Session, store: Store, digest: str, scope: Scope, *, override_by: str | None = None
) -> Permission:
    """The standing of a version given by its digest. override_by: a user whose override counts, if none is in force.

    Raises TunesmithError where its record cannot be read now, as while a bucket cannot be reached.
    """
    try:
        version = load_version(store, digest, session)
    except (Refused, UsageError):
        return Permission("unknown", "is not in the registry", NextStep("check the audit log", "audit verify"))
    by = override_in_force(session, version, scope) or override_by
    return may_serve(session, version, scope=scope, override_by=by)


def override_in_force(session: Session, version: Version, scope: Scope) -> str | None:
    """The user by whose override a version serves a scope as champion or live canary. None where nobody's does."""
    for covering in scope.covering():
        alias = get_alias(session, version.name, covering)
        if alias is not None and alias.version == version.digest and alias.override_by:
            return alias.override_by
        live = select(RolloutRow.state).where(RolloutRow.status.in_(LIVE), RolloutRow.canary == version.digest)
        for state in session.scalars(live.filter_by(name=version.name, **covering.fields())):
            if state["override"] is not None:
                return str(state["started_by"])
    return None


def permissions(session: Session, versions: Sequence[Version]) -> dict[str, Permission]:
    """Whether each version may begin to serve the tenant and region that it is for: digest -> what may_serve says.

    For lists: takes five queries for any number of versions. They must be registered.
    """
    keys, digests = trusted_keys(session), [version.digest for version in versions]
    rows = select(VersionRow.digest, VersionRow.key).where(VersionRow.digest.in_(digests))
    signed_with = {row.digest: row.key for row in session.execute(rows)}
    reasons = recalls_of(session, digests, as_evidence=False)
    entries: defaultdict[str, list[AuditRow]] = defaultdict(list)
    for entry in decisions(session, digests):
        entries[entry.subject].append(entry)
    allowed = {}
    for version in versions:
        key = signed_with[version.digest]
        permission = _usable(version, reasons.get(version.digest), keys, key)
        if permission.granted:
            permission = unmet(version, *_judged(version, keys, key, entries[version.digest]))
        allowed[version.digest] = permission
    return allowed


def _usable(version: Version, recall: str | None, keys: Sequence[TrustedKey], signed_with: str) -> Permission:
    """Whether a version is neither recalled nor expired, and signed by somebody who may sign it today."""
    if recall is not None:
        return Permission("recalled", f"was recalled: {recall}", "use another version")
    if not (unexpired := still_valid(version)).granted:
        return unexpired
    try:
        check_signer(version, _key(keys, signed_with, version.signer))
    except Refused as error:
        return Permission("signer", f"has no trusted signature: {error.what}", error.fix)
    return GRANTED


def still_valid(version: Version) -> Permission:
    """Whether a version's time is not over: the only condition that changes without an entry in the audit log."""
    try:
        check_expiry(version)
    except Refused as error:
        return Permission("expired", error.what, error.fix)
    return GRANTED


def set_alias(
    session: Session,
    *,
    name: str,
    version: Version | None,
    expected: int,
    actor: str,
    scope: Scope = Scope(),
    override_by: str | None = None,
) -> Alias:
    """Point a name's champion at a version, or nowhere (None), if its revision is still the expected one.

    session: a write transaction (Store.change). expected: revision_of when the caller decided. override_by: the user
    who lets the version serve without an approval. Raises Refused where another change came first, where the version
    is another name's, or where it may not serve this scope.
    """
    check_name(name, "version name")
    if version is not None:
        if version.name != name:
            raise Refused(f"{version.label} is not a version of {name}", fix="register it under that name")
        may_serve(session, version, scope=scope, override_by=override_by).require(version.label)
    points: dict[str, Any] = {"version": version.digest if version else "", "override_by": override_by or ""}
    place: dict[str, Any] = {"name": name, "alias": CHAMPION, **scope.fields()}
    if expected == 0 and session.get(AliasRow, tuple(place.values())) is None:
        session.add(AliasRow(**place, **points, revision=1))
        session.flush()
    else:
        query = update(AliasRow).filter_by(**place).where(AliasRow.revision == expected)
        changed = session.execute(query.values(**points, revision=expected + 1))
        if changed.rowcount != 1:  # type: ignore[attr-defined]
            raise Refused(
                f"{name}@{CHAMPION} was changed by somebody else",
                where=f"revision {expected}",
                fix="read the alias again, then decide again",
            )
    after = Alias(**place, **points, revision=expected + 1)
    audit.append(session, actor=actor, action="alias.set", subject=f"{name}@{CHAMPION}", detail=after.model_dump())
    return after


def approvals_of(session: Session, version: Version) -> Approvals:
    """Who decided on a version, by the audit log and the roles of today. Reads no signature."""
    return _decisions(session, version)[0]


def unmet(version: Version, approvals: Approvals, problems: Sequence[str]) -> Permission:
    """Why a version with these approvals may not serve; granted if nothing is missing.

    problems: why other approvals do not count.
    """
    if not approvals.missing:
        return GRANTED
    # With one approver to find, "is not approved" says it all.
    several = version.risk is not None and (version.risk.approvers > 1 or bool(version.risk.roles))
    needs = [f"needs {' and '.join(approvals.missing)}"] if several else []
    if approvals.refused_by is not None:
        said = "; ".join([f"was refused by {approvals.refused_by}: {approvals.reason}", *needs])
        return Permission("refused", said, "use another version, or have an approver approve it all the same")
    why = "; ".join(dict.fromkeys([*needs, *problems]))
    person = "another person" if approvals.approvers else "a second person"
    return Permission(
        "not_approved",
        "is not approved" + (f": {why}" if why else ""),
        NextStep(f"ask {person} to approve it", "approve", version=version.label, actor=...),
    )


def _decisions(session: Session, version: Version) -> tuple[Approvals, list[str]]:
    """Who decided on a version, and why each decision that does not count does not."""
    signed_with = session.scalars(select(VersionRow.key).where(VersionRow.digest == version.digest)).one()
    return _judged(version, trusted_keys(session), signed_with, decisions(session, [version.digest]))


def decisions(session: Session, versions: Collection[str]) -> Sequence[AuditRow]:
    """The log's entries of approvals and refusals of versions (their digests), newest first."""
    decided = select(AuditRow).where(AuditRow.action.in_(DECIDED), AuditRow.subject.in_(versions))
    return session.scalars(decided.order_by(AuditRow.seq.desc())).all()


def _judged(
    version: Version, keys: Sequence[TrustedKey], signed_with: str, newest_first: Sequence[AuditRow]
) -> tuple[Approvals, list[str]]:
    """What the log's entries about a version, the newest first, come to."""
    signer = _key(keys, signed_with, version.signer)
    problems: list[str] = []
    people: dict[str, Sequence[str]] = {}
    refused_by, reason = None, ""
    for entry in newest_first:
        signature = entry.detail.get("signature", {})
        try:
            approver = _key(keys, signature.get("key", ""), entry.actor)
            check_in_time(approver, signature["digest"], version.label)
            if entry.action == "version.refuse":  # it still counts when its approver has left
                refused_by, reason = entry.actor, str(entry.detail.get("reason", ""))
                break
            check_approver(version, signer, approver, signature["digest"])
        except Untrusted as error:
            problems.append(error.what)
        else:
            people[entry.actor] = approver.roles
    problems.reverse()
    return Approvals.by(version.risk, dict(reversed(people.items())), refused_by, reason), problems


def _key(keys: Sequence[TrustedKey], fingerprint: str, user: str) -> TrustedKey:
    key = find_key(keys, fingerprint)
    if key is None or key.user != user:
        raise Untrusted(f"{user} does not have the key that signed", fix=NextStep("check the log", "audit verify"))
    return key

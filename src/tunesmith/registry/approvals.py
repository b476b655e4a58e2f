"""Approvals: a second person's signature over a version's digest, without which nothing is promoted."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import ENVELOPE, Approval, own_proposal, read_approval, seal, statement_of
from tunesmith.registry.signing.release import Version
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import open_release
from tunesmith.store import audit, database, identities
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, EdgeRow, RecordRow
from tunesmith.store.trust import TrustedKey


def approve(store: Store, version: Version, *, approver: str, reason: str = "") -> str:
    """Sign a version as a second person; returns the approval record's digest. Once is enough: again gives the same.

    The version is verified first, with all it came of. Raises Refused where it does not verify or was recalled, where
    the approver lacks the role or proposed it, UsageError where an overridden version is approved without a reason.
    """
    identities.require(store, approver, "version.approve", tenant=version.tenant, region=version.region)
    reason = reason.strip()
    if version.override is not None and not reason:
        raise UsageError(
            f"{version.label} was let through its gates ({version.override}): approving it needs a reason",
            fix='--reason "why"',
        )
    if approver == version.signer:
        raise own_proposal(version, approver)
    signer = _verify(store, version)
    user = keys.ensure_key(store, approver)
    private = keys.load_signing_key(store, user)
    with database.reading(store.engine) as reading:
        given, _ = _standing(store, reading, version, signer)
    for digest, approval in given:
        if approval.approver == approver:
            return digest
    detail: dict[str, Any] = {}
    with store.change(approver, "version.approve", version.digest, detail) as session:
        # Here and now: a role taken away since the beginning counts.
        identities.require(session, approver, "version.approve", tenant=version.tenant, region=version.region)
        approval = Approval(
            approver=approver,
            role="approver",
            decision="approve",
            reason=reason,
            override=version.override,
            at=stamp(),
            audit=audit.newest(session),
        )
        envelope = seal(statement_of(version, approval), private, user.fingerprint or "")
        record = Record(
            kind="approval",
            parents={"version": version.digest},
            blobs={ENVELOPE: store.put_bytes(envelope)},
            body=approval.model_dump(mode="json"),
        )
        read_approval(record, envelope, version, signer, identities.trusted_keys(session))
        store.put_record(record, session)
        detail |= {"version": version.label, "approval": record.digest, "reason": reason, "override": version.override}
    identities.publish_trust(store)
    return record.digest


def require_approved(store: Store, version: Version, session: Session | None = None) -> Approval:
    """The approval on which a version may be promoted. Raises Refused where none counts now, saying why not.

    Its signature, the approver's role today, and that it is of this very digest are all checked again. session: decide
    inside the caller's transaction.
    """
    if session is None:
        with database.reading(store.engine) as own:
            return require_approved(store, version, own)
    with open_release(store, version, session) as (_, release):
        given, reasons = _standing(store, session, version, release.signer)
    if given:
        return given[0][1]
    raise Refused(
        f"{version.label} is not approved" + (f": {'; '.join(reasons)}" if reasons else ""),
        where=version.label,
        fix=f"have a second person run: tunesmith approve {version.label} --as NAME",
    )


def _verify(store: Store, version: Version) -> TrustedKey:
    """Whose signature a version bears, after it was verified with everything it came of."""
    with open_release(store, version) as (_, release):
        signer = release.signer
    found = verify_version(store.root, version.label, keys=identities.trusted_keys(store), whole_store=False)
    if found.problems:
        first = found.problems[0]
        raise Refused(
            f"{version.label} does not verify: {first.reason}",
            where=first.path,
            fix="tunesmith verify lists everything",
        )
    return signer


def _standing(
    store: Store, session: Session, version: Version, signer: TrustedKey
) -> tuple[list[tuple[str, Approval]], list[str]]:
    """The version's approvals that count now, with their digests, and why each other one does not."""
    query = (
        select(EdgeRow.child)
        .join(RecordRow, RecordRow.digest == EdgeRow.child)
        .where(EdgeRow.parent == version.digest, EdgeRow.role == "version", RecordRow.kind == "approval")
        .order_by(RecordRow.created_at, RecordRow.digest)
    )
    # A record whose transaction was cut short lies on disk without an entry of the log: it never came to count.
    entries = select(AuditRow).where(AuditRow.action == "version.approve", AuditRow.subject == version.digest)
    logged = {row.detail.get("approval") for row in session.scalars(entries)}
    trusted = identities.trusted_keys(session)
    given, reasons = [], []
    for digest in session.scalars(query):
        try:
            if digest not in logged:
                raise Refused(f"the audit log does not know approval {short(digest)}")
            record = store.record(digest, kind="approval")
            envelope = store.read_blob(record.blobs.get(ENVELOPE, ""))
            given.append((digest, read_approval(record, envelope, version, signer, trusted)))
        except TunesmithError as error:
            reasons.append(error.what)
    return given, reasons

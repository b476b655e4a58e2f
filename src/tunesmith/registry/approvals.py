"""Approvals: a second person's signature over a version's digest, without which nothing is promoted. And refusals.

Three steps, so that the signing can happen where the approver's key is and the rest where the store is:
`prepare_approval` states what is to be signed, `attestations.seal` signs it, `submit_approval` checks and records it.

A refusal blocks the version until as many people who read it approve it again as its risk class takes: approvals older
than the newest refusal count for nothing. So a decision must have been prepared after the one that it overturns, and an
old approval cannot be submitted again.

What is signed ends an hour after it was prepared, so that a signature that was never sent cannot be used next month. It
holds a random nonce, which the audit log keeps with the decision: the same signed statement is recorded once.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import takewhile
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core import clock
from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope
from tunesmith.records.version import ApprovalBody, Decision, Paper
from tunesmith.registry.opening import Verified, open_release, still_usable
from tunesmith.registry.papers.writing import require_papers
from tunesmith.registry.risk import Approvals
from tunesmith.registry.serving import decisions, may_serve, unmet
from tunesmith.registry.signing.attestations import (
    ENVELOPE,
    check_not_signer,
    open_envelope,
    read_approval,
    read_statement,
    statement_of,
)
from tunesmith.registry.signing.release import Version
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import load_version
from tunesmith.store import audit
from tunesmith.store.audit import Head
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey, signature_entry
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, EdgeRow, RecordRow

LASTS = timedelta(hours=1)  # from preparing a decision to submitting it
_NONCE_BYTES = 16
_NONCE = re.compile(f"[0-9a-f]{{{2 * _NONCE_BYTES}}}")


class RecordedApproval(NamedTuple):
    """An approval or refusal that counts. digest: its record's; seq: the number of its entry in the audit log."""

    digest: str
    approval: ApprovalBody
    seq: int


def prepare_approval(
    store: Store, version: Version, actor: str, reason: str = "", decision: Decision = "approve"
) -> JsonObject:
    """The in-toto statement that actor signs to approve or to refuse a version. Changes nothing and needs no key.

    A version to approve is verified first, with every record that it was made from. Raises Refused if it does not
    verify or was recalled, if actor may not approve it or registered it; UsageError if there is no reason for a
    refusal, or for the approval of a version whose gates were overridden.
    """
    reason = reason.strip()
    _, papers = _check_decidable(store, version, actor, reason, decision)
    with store.reading() as session:
        head = audit.newest(session)
    approval = ApprovalBody(
        approver=actor,
        role="approver",
        decision=decision,
        reason=reason,
        override=version.override,
        at=clock.stamp(),
        audit=head,
        until=clock.stamp(LASTS),
        nonce=secrets.token_hex(_NONCE_BYTES),
        papers=papers,
    )
    return statement_of(version, approval)


def submit_approval(store: Store, envelope: bytes, by: str | None = None) -> RecordedApproval:
    """Check a signed approval or refusal and record it. Where one of the approver stands already, that one stays.

    The actor is the user whose key signed it; by: who this must be, by default anybody. It repeats every check of
    prepare_approval. It also checks the signature, that this store's audit log holds the entry that the statement names
    as the newest one, that what the decision overturns was recorded before that entry, that its nonce was not used and
    that its time is not over. Raises as prepare_approval does, and Refused for an envelope that is not a decision by a
    trusted key.
    """
    statement, key = open_envelope(envelope, identities.trusted_keys(store), "the approval's envelope")
    _, digest, approval = read_statement(statement)
    if by not in (None, key.user):
        raise Refused(f"signed with {key.user}'s key, and sent by {by}", fix="sign it with a key of yours")
    version = load_version(store, digest)
    signer, papers = _check_decidable(store, version, key.user, approval.reason, approval.decision)
    _check_papers(version, approval, papers)
    record = approval.record({"version": version.digest}, {ENVELOPE: store.put_bytes(envelope)})
    read_approval(record, envelope, version, signer, identities.trusted_keys(store))
    stated = {"version": version.label, "reason": approval.reason, "nonce": approval.nonce}
    detail: JsonObject = {**stated, "override": version.override}
    with store.reading() as reading:
        _check_unused(reading, version, approval)
        counting, _ = _counting(store, reading, version, signer)
    # Those that no later decision overturned.
    for recorded in takewhile(lambda each: each.approval.decision == approval.decision, reversed(counting)):
        if recorded.approval.approver == approval.approver:
            return recorded
    _check_time(approval)
    with store.change(key.user, f"version.{approval.decision}", version.digest, detail) as session:
        # In this transaction: a role that was taken away since then counts, and a decision that came first.
        identities.require(session, key.user, "version.approve", scope=version.scope)
        trusted = identities.trusted_keys(session)
        read_approval(record, envelope, version, signer, trusted)
        _check_known(session, approval.audit)
        _check_unused(session, version, approval)
        counting, _ = _counting(store, session, version, signer)
        _check_newer(approval, counting)
        store.put_record(record, session)
        detail |= signature_entry(key.fingerprint, record.digest)
        seq = audit.newest(session).seq + 1
    return RecordedApproval(record.digest, approval, seq)


def check_may_serve(
    session: Session,
    store: Store,
    version: Version,
    scope: Scope,
    override_by: str | None = None,
    verified: Verified | None = None,
) -> None:
    """Raise Refused unless a version may begin to serve a scope: what each change of that asks.

    First what the database knows (serving.may_serve), then the version's files and those of its approvals, unless an
    override replaces them. verified: as of require_approved.
    """
    may_serve(session, version, scope=scope, override_by=override_by).require(version.label)
    if override_by is None:
        require_approved(store, version, session, verified)


def require_approved(
    store: Store, version: Version, session: Session | None = None, verified: Verified | None = None
) -> ApprovalBody:
    """The first of the approvals by which a version may be promoted, read from their files and verified again.

    session: decide by what the caller's transaction sees. verified: the weights of a version in it are not read again;
    another one is added, also with its error, which is raised again. So a caller verifies them before its write
    transaction, for which all other writers wait.
    Raises Refused if fewer people approved the version than its risk class takes, and says why: who is missing, that an
    approver may not approve any more, or who refused it since.
    """
    if session is None:
        with store.reading() as own:
            return require_approved(store, version, own, verified)
    verified = {} if verified is None else verified
    known = verified.get(version.digest)
    if isinstance(known, TunesmithError):
        raise known
    if known is not None:
        release = still_usable(store, version, known, session)
    else:
        try:
            with open_release(store, version, session) as (_, release):
                verified[version.digest] = release
        except TunesmithError as error:
            verified[version.digest] = error
            raise
    counting, reasons = _counting(store, session, version, release.signer)
    roles = {key.user: key.roles for key in identities.trusted_keys(session)}
    approvals, refused_by, reason = list[ApprovalBody](), None, ""
    for _, approval, _ in counting:
        if approval.decision == "approve":
            approvals.append(approval)
        else:
            approvals, refused_by, reason = [], approval.approver, approval.reason
    people = {approval.approver: roles[approval.approver] for approval in approvals}
    unmet(version, Approvals.by(version.risk, people, refused_by, reason), reasons).require(version.label)
    if version.papers and any(approval.papers for approval in approvals):
        papers = require_papers(store, version)
        for approval in approvals:
            _check_papers(version, approval, papers)
    return approvals[0]


def _check_papers(version: Version, approval: ApprovalBody, papers: Mapping[Paper, str]) -> None:
    """Raise Refused where an approver saw other papers than these."""
    if approval.decision == "approve" and dict(approval.papers) != papers:
        what = f"the papers of {version.label} are not those that {approval.approver} saw"
        raise Refused(what, where=version.label, fix=NextStep("approve it again", "approve", version=version.label))


def _check_decidable(
    store: Store, version: Version, actor: str, reason: str, decision: Decision
) -> tuple[TrustedKey, dict[Paper, str]]:
    """The key that signed a version which actor may approve or refuse now, and the records of the papers that it takes
    for an approval. Raises as prepare_approval does."""
    identities.require(store, actor, "version.approve", scope=version.scope)
    check_not_signer(version, actor)
    if not reason.strip() and decision == "refuse":
        raise UsageError(f"a refusal of {version.label} needs a reason", where="reason")
    if not reason.strip() and version.override is not None:
        what = f"the gates of {version.label} were overridden ({version.override}): an approval of it needs a reason"
        raise UsageError(what, where="reason")
    with open_release(store, version) as (_, release):
        signer = release.signer
    if decision == "approve":
        keys = identities.trusted_keys(store)
        for first in verify_version(store, version.label, keys=keys, whole_store=False).problems:
            fix = NextStep("list every problem", "verify", version=version.label)
            raise Refused(f"{version.label} does not verify: {first.reason}", where=first.path, fix=fix)
        return signer, require_papers(store, version)
    return signer, {}


def _check_time(approval: ApprovalBody) -> None:
    """Raise Refused if a decision may not be submitted any more, or far later than one that was prepared just now.

    The signer's client states the time, so it is checked at both ends; clocks may differ by an hour.
    """
    fix = "prepare and sign it again"
    try:
        left = datetime.fromisoformat(approval.until) - clock.now()
    except (ValueError, TypeError):
        raise Refused("the signed statement does not say until when it may be submitted", fix=fix) from None
    if left <= timedelta():
        raise Refused(f"the time of the signed statement ended at {approval.until}", fix=fix)
    if left > 2 * LASTS:
        raise Refused(f"the time of the signed statement ends too late, at {approval.until}", fix=fix)


def _check_unused(session: Session, version: Version, approval: ApprovalBody) -> None:
    """Raise Refused if the nonce of a decision is missing, or a decision on this version was recorded with it before.

    A statement names its version, so the nonces of other versions do not matter.
    """
    if not _NONCE.fullmatch(approval.nonce):
        raise Refused("the signed statement has no nonce", fix="prepare and sign it again")
    for row in decisions(session, [version.digest]):
        if row.detail.get("nonce") == approval.nonce:
            raise Refused(
                f"this signed statement was recorded before, on {row.at[:10]}: its nonce is used",
                where=f"audit entry {row.seq}",
                fix="nothing is left to do; to decide again, prepare and sign another one",
            )


def _check_known(session: Session, head: Head) -> None:
    """Raise Refused unless the audit log holds an entry: an approval states the newest one when it was prepared."""
    known = session.scalars(select(AuditRow.digest).where(AuditRow.seq == head.seq)).first()
    if known != head.digest:
        raise Refused(
            f"the approval was prepared on another audit log: entry {head.seq} is not {short(head.digest)} here",
            where="audit log",
            fix="prepare and sign it again on this store; if it was prepared here, verify the audit log",
        )


def _check_newer(approval: ApprovalBody, counting: Sequence[RecordedApproval]) -> None:
    """Raise Refused if the other decision was recorded after this one was prepared: its signer did not know of it."""
    for recorded in reversed(counting):
        other = recorded.approval
        if other.decision != approval.decision and recorded.seq > approval.audit.seq:
            said = "refused" if other.decision == "refuse" else "approved"
            raise Refused(
                f"{other.approver} {said} the version after this was prepared"
                + (f": {other.reason}" if other.reason else ""),
                where=f"audit entry {recorded.seq}",
                fix="read that, then prepare and sign yours again",
            )


def _counting(
    store: Store, session: Session, version: Version, signer: TrustedKey
) -> tuple[list[RecordedApproval], list[str]]:
    """The approvals and refusals of a version that count, in the order of the log, and why each other does not.

    Raises TunesmithError where one cannot be read now.
    """
    query = (
        select(EdgeRow.child)
        .join(RecordRow, RecordRow.digest == EdgeRow.child)
        .where(EdgeRow.parent == version.digest, EdgeRow.role == "version", RecordRow.kind == "approval")
        .order_by(RecordRow.created_at, RecordRow.digest)
    )
    # A record whose transaction was killed is in the store without an audit entry: it does not count.
    entries = decisions(session, [version.digest])
    logged = {row.detail.get("signature", {}).get("digest"): row.seq for row in entries}
    trusted = identities.trusted_keys(session)
    counting, reasons = [], []
    for digest in session.scalars(query):
        try:
            if digest not in logged:
                raise Refused(f"the audit log has no entry for approval {short(digest)}")
            record = store.record(digest, kind="approval")
            envelope = store.read_blob(record.blobs.get(ENVELOPE, ""))
            approval = read_approval(record, envelope, version, signer, trusted)
            counting.append(RecordedApproval(digest, approval, logged[digest]))
        except (Refused, UsageError) as error:
            reasons.append(error.what)
    return sorted(counting, key=lambda recorded: recorded.seq), reasons

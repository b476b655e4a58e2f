"""Stewards' sign-offs of dataset versions, kept as records and in the audit log."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import short, stamp
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.records.dataset import SignOffBody
from tunesmith.store.people import identities
from tunesmith.store.records import recalled
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

ACTION = "data.sign"


def sign_off(store: Store, digest: str, *, steward: str, reason: str) -> str:
    """Record a steward's sign-off of a dataset version, which is verified first; returns the record's digest.

    Raises Refused where the version was recalled or does not verify, or the user is not allowed to sign; UsageError
    without a reason.
    """
    identities.require(store, steward, ACTION)
    if not reason.strip():
        raise UsageError("a sign-off needs a reason", fix="say what was checked")
    verified = verify_dataset(store, digest)
    if not verified.ok:
        first = verified.problems[0]
        raise Refused(f"the dataset version does not verify: {first.reason}", where=first.path)
    detail: JsonObject = {}
    with store.change(steward, ACTION, digest, detail) as session:
        identities.require(session, steward, ACTION)  # the role may have been revoked meanwhile
        if recall := recalled(session, digest):
            fix = NextStep("build a version without it, and sign that one", "data build")
            raise Refused(f"dataset version {short(digest)} was recalled: {recall}", fix=fix)
        record = SignOffBody(steward=steward, reason=reason.strip(), at=stamp()).record({"dataset": digest})
        store.put_record(record, session)
        detail |= {"signoff": record.digest, "reason": reason.strip()}
    return record.digest


class SignOff(SignOffBody):
    """A steward's sign-off that counts. signoff: its record's digest."""

    signoff: str


def sign_offs(store: Store, digest: str) -> list[SignOff]:
    """The valid sign-offs, oldest first.

    A sign-off is valid while the audit log has it, its record agrees, and the user who signed is still a steward.
    """
    return sign_offs_of(store, [digest])[digest]


def sign_offs_of(store: Store, digests: Sequence[str]) -> dict[str, list[SignOff]]:
    """The valid sign-offs of several dataset versions, by digest, each as `sign_offs` gives them."""
    signed: dict[str, list[SignOff]] = {digest: [] for digest in digests}
    query = select(AuditRow).where(AuditRow.action == ACTION, AuditRow.subject.in_(digests)).order_by(AuditRow.seq)
    with store.reading() as session:
        for row in session.scalars(query):
            if valid := _valid_sign_off(store, session, row):
                signed[row.subject].append(valid)
    return signed


def require_signed(store: Store, digest: str) -> None:
    """Raise Refused where a dataset version has no valid sign-off."""
    if not sign_offs(store, digest):
        raise Refused(
            f"no steward has signed off dataset version {short(digest)}",
            where="data.sign_off",
            fix=NextStep("have a steward check and sign it", "data sign", dataset=short(digest), actor=...),
        )


def _valid_sign_off(store: Store, session: Session, entry: AuditRow) -> SignOff | None:
    try:
        record = store.record(str(entry.detail.get("signoff")), kind="signoff")
        identities.require(session, entry.actor, ACTION)
        body = SignOffBody.of(record)
    except TunesmithError:
        return None
    same = record.parents == {"dataset": entry.subject} and body.steward == entry.actor
    return SignOff(**dict(body), signoff=record.digest) if same else None

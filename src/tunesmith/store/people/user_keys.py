"""Changes of users' keys: enrol, retire, revoke. A key is never deleted and never enrolled a second time.

A user changes their own keys by proving that they hold an active one; an admin changes anybody's without. Only an admin
revokes: a thief who could do so would take the versions out of service that the stolen key signed before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.text.names import check_name
from tunesmith.store import audit
from tunesmith.store.people.identities import User, add_key, changing, get_user, state, user_row
from tunesmith.store.people.roles import permits
from tunesmith.store.people.trust import KeyStatus
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, KeyRow, UserRow


@dataclass(frozen=True, slots=True)
class Proof:
    """A verified proof that the acting user holds a key. key: its fingerprint; envelope: the signed statement."""

    key: str
    envelope: str


def next_label(user: User) -> str:
    """The label of a user's next key where they give none: key-1, key-2 and so on."""
    return f"key-{len(user.keys) + 1}"


def enrol_key(
    store: Store, name: str, public_key: str, *, actor: str, label: str | None = None, proof: Proof | None = None
) -> User:
    """Give a user another key (PEM). Users prove that they hold an active key, except for their first one.

    Raises Refused without that proof, for a deactivated user, or if anybody has or had this key: a key stands for one
    person. Raises UsageError for a label that the user gave to a key before.
    """
    with changing(store, actor, "user.key", name, own=True) as (session, detail):
        row = user_row(session, name)
        if not row.active:
            raise Refused(f"{name} is deactivated", fix="add a new user")
        given = check_name(label, "key label") if label else next_label(get_user(session, name))
        if given in {key.label for key in row.keys}:
            raise UsageError(f"{name} has a key {given} already", where=name, fix="give the new key another label")
        if row.keys:
            _require_proof(session, row, actor, proof)
        add_key(session, row, public_key, given, proof.key if proof else "")
        detail |= {"key": row.keys[-1].fingerprint, "label": given, "user": state(row)}
        detail |= {"proof": proof.envelope} if proof else {}
    return get_user(store, name)


def retire_key(store: Store, name: str, label: str, *, actor: str, proof: Proof | None = None) -> User:
    """End a key's use: what the log recorded before keeps counting, what the key signs from now on does not.

    Raises Refused without a proof by an active key or an admin, UsageError unless the user has such an active key.
    """
    with changing(store, actor, "user.key.retire", name, own=True) as (session, detail):
        row = user_row(session, name)
        key = find_label(row, label)
        if key.status != "active":
            raise UsageError(f"the key {label} of {name} was {key.status} already", where=name)
        _require_proof(session, row, actor, proof)
        _end(key, "retired", audit.newest(session).seq + 1)
        detail |= {"key": key.fingerprint, "label": label, "until": key.until, "user": state(row)}
        detail |= {"proof": proof.envelope} if proof else {}
    return get_user(store, name)


def revoke_key(store: Store, name: str, label: str, *, since: datetime | int, actor: str) -> tuple[User, list[str]]:
    """End a stolen key's use from a moment of the past on. Returns the user and the labels of all keys revoked.

    since: a time, or the number of the first audit entry that may be the thief's. A signature that the log recorded
    from then on does not count, nor does a key that was enrolled from then on with this key's proof: it is revoked too.
    Raises Refused unless actor is an admin, UsageError for a time that is not in the past or an unknown key.
    """
    if isinstance(since, datetime) and since > now():
        raise UsageError(
            "a key cannot be revoked from a time in the future on", fix=NextStep("end it now", "keys retire")
        )
    with changing(store, actor, "user.key.revoke", name) as (session, detail):
        row = user_row(session, name)
        key = find_label(row, label)
        newest = audit.newest(session).seq
        until = _first_entry(session, since) if isinstance(since, datetime) else since
        if not 1 <= until <= newest + 1:
            raise UsageError(
                f"the audit log has no entry {until}", fix=NextStep(f"give one of 1 to {newest}", "audit show")
            )
        if key.status == "revoked" and (key.until or 0) <= until:
            raise UsageError(f"the key {label} of {name} was revoked from entry {key.until} on already", where=name)
        revoked = _revoke(row, key, until)
        told = since.isoformat() if isinstance(since, datetime) else f"entry {since}"
        detail |= {"key": key.fingerprint, "label": label, "since": told, "until": key.until}
        detail |= {"revoked": revoked, "user": state(row)}
    return get_user(store, name), revoked


def enrolled_by(store: Store, actor: str, since: int) -> dict[str, str]:
    """The keys that a user gave to anybody from an audit entry on: fingerprint -> what to call it, in the log's order.

    Includes those that were ended since.
    """
    entries = select(AuditRow).where(
        AuditRow.actor == actor, AuditRow.action.in_(("user.add", "user.key")), AuditRow.seq >= since
    )
    keys: dict[str, str] = {}
    with store.reading() as session:
        for row in session.scalars(entries.order_by(AuditRow.seq)):
            for key in row.detail["user"]["keys"]:
                if key["enrolled"] == row.seq:
                    keys[key["fingerprint"]] = f"{key['label']} of {row.subject} (entry {row.seq})"
    return keys


def find_label(row: UserRow, label: str) -> KeyRow:
    """A user's key by its label. Raises UsageError where there is none."""
    for key in row.keys:
        if key.label == label:
            return key
    known = ", ".join(key.label for key in row.keys) or "none"
    raise UsageError(f"{row.name} has no key {label[:80]!r}", where=row.name, fix=f"keys of {row.name}: {known}")


def _require_proof(session: Session, row: UserRow, actor: str, proof: Proof | None) -> None:
    """Raise Refused unless the actor is an admin, or proved to hold a key of this user that is active now."""
    if proof is not None:
        if not any(key.fingerprint == proof.key and key.status == "active" for key in row.keys):
            raise Refused(f"the proof is not by an active key of {row.name}", where=row.name, fix=_ASK)
    elif not permits(user_row(session, actor).roles, "user.change"):
        raise Refused(f"{row.name} did not prove to hold an active key", where=row.name, fix=_ASK)


_ASK = "point $TUNESMITH_KEYS at the folder with an active key, or ask an admin"


def _end(key: KeyRow, status: KeyStatus, until: int) -> None:
    key.status, key.until = status, until if key.until is None else min(until, key.until)


def _revoke(row: UserRow, key: KeyRow, until: int) -> list[str]:
    """Revoke a key, and each key that was enrolled with its proof from then on, from its enrolment on."""
    _end(key, "revoked", until)
    labels = [key.label]
    for other in row.keys:
        if other.proven_by == key.fingerprint and other.enrolled >= until and other.label not in labels:
            labels += _revoke(row, other, other.enrolled)
    return labels


def _first_entry(session: Session, moment: datetime) -> int:
    """The number of the first audit entry that may have been written at a moment or later.

    The clock may have been set back in between, so an entry's own time is not enough: every entry counts as later
    unless it, or an entry after it, has a time before the moment that is not below the time of any earlier entry.
    """
    first, latest = 1, ""
    for seq, at in session.execute(select(AuditRow.seq, AuditRow.at).order_by(AuditRow.seq)):
        if datetime.fromisoformat(at) >= moment:
            break
        if at >= latest:  # all stamps have the same form, so their order is that of time
            first, latest = seq + 1, at
    return first

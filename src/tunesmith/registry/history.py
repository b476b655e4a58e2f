"""Verification of the audit log: against heads that were signed or kept elsewhere, and against the database's state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_bytes, short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.text.names import version_label
from tunesmith.records.version import ApprovalBody, VersionBody
from tunesmith.registry.erasures import CONFIRM, read_erasures
from tunesmith.registry.holds import read_holds
from tunesmith.registry.serving import DECIDED
from tunesmith.registry.signing.attestations import key_statement, open_envelope
from tunesmith.store import audit
from tunesmith.store.audit import Pin
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, AuditRow, ErasedRow, KeyRow, TokenRow, UserRow, VersionRow

State = dict[tuple[str, ...], Mapping[str, Any]]


def verify_log(store: Store, kept: Iterable[Pin] = ()) -> list[str]:
    """The problems of the audit log, one sentence each; empty if there are none.

    The chain must be whole. It must contain its own head, the head that each version, approval and refusal was signed
    with, and the heads of kept, which the caller has from elsewhere. Replaying it must give the users, tokens,
    versions and aliases of the database, so that a row that was changed without an entry is found.
    """
    pins = list(kept)
    problems: list[str] = []
    for model, digest in _signed_with_head(store):
        named = f"{model.kind} {short(digest)}"
        try:
            pins.append(Pin(witness=named, head=model.read(store, digest).audit))
        except TunesmithError as error:
            problems.append(f"{named} cannot be compared with the log: {error.what}")
    with store.reading() as session:
        problems += audit.verify(session, pins)
        if not problems:
            problems += _differences(_replay(session), _actual(session))
            problems += _unproven(session)
            problems += _unsigned_erasures(store, session)
            problems += [f"{key} does not count: {reason}" for key, reason in read_holds(store).problems.items()]
    return problems


def lost_signatures(store: Store, fingerprints: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """Labels of the versions that were signed, of those approved and of those refused with one of these keys after its
    end.
    """
    with store.reading() as session:
        keys = {key.fingerprint: key for key in identities.trusted_keys(session) if key.fingerprint in fingerprints}
        entries = select(AuditRow).where(AuditRow.action.in_(("version.register", *DECIDED)))
        labels: dict[str, str] = {}
        lost: dict[str, list[str]] = {"version.register": [], "version.approve": [], "version.refuse": []}
        for row in session.scalars(entries.order_by(AuditRow.seq)):
            signature = row.detail.get("signature", {})
            if row.action == "version.register":
                version = row.detail["version"]
                labels[version["digest"]] = version_label(version["name"], version["number"])
            key = keys.get(signature.get("key"))
            if key is not None and not key.counts_for(signature["digest"]):
                subject = signature["digest"] if row.action == "version.register" else row.subject
                lost[row.action].append(labels.get(subject, subject))
    return lost["version.register"], lost["version.approve"], lost["version.refuse"]


def _signed_with_head(store: Store) -> list[tuple[type[VersionBody | ApprovalBody], str]]:
    """(model, digest) of every record that was signed with a head of the log, by the index and by the version folders.

    An attacker who rewrites the log can also remove rows from the index, but a version that is served needs its folder.
    """
    versions = {digest_bytes(store.read_release(ref)) for ref in store.version_folders()}
    versions.update(store.records_of("version"))
    approvals = store.records_of("approval")
    return [(VersionBody, digest) for digest in sorted(versions)] + [(ApprovalBody, digest) for digest in approvals]


def _unproven(session: Session) -> list[str]:
    """The changes of keys whose proof is not a signature by another key of that user."""
    keys = identities.trusted_keys(session)
    rows = {key.fingerprint: key for key in session.scalars(select(KeyRow))}
    problems = []
    changes = select(AuditRow).where(AuditRow.action.in_(("user.key", "user.key.retire"))).order_by(AuditRow.seq)
    for row in session.scalars(changes):
        detail = row.detail
        if "proof" not in detail:
            continue
        try:
            statement, key = open_envelope(str(detail["proof"]).encode(), keys, f"entry {row.seq}")
        except Refused as error:
            problems.append(f"the proof in entry {row.seq} does not hold: {error.what}")
            continue
        expected = key_statement(row.subject, row.action, str(detail.get("label")), str(detail.get("key")))
        if key.user != row.subject or statement != expected:
            problems.append(f"the proof in entry {row.seq} is not of this change of a key of {row.subject}")
        elif (given := rows.get(str(detail.get("key")))) is None or given.status != "active":
            continue  # one that a stolen key enrolled was revoked with it, and nobody relies on its proof any more
        elif not _was_active(rows[key.fingerprint], row.seq):
            problems.append(f"the proof in entry {row.seq} is by a key of {row.subject} that was not active then")
    return problems


def _was_active(key: KeyRow, entry: int) -> bool:
    return key.enrolled < entry <= (key.until or entry)


def _unsigned_erasures(store: Store, session: Session) -> list[str]:
    """What the database says was erased and nobody signed, and statements that do not count or are missing."""
    erasures = read_erasures(store.blobs, identities.trusted_keys(session))
    signed = {each.digest for each in erasures.signed}
    pairs = {(one.old, one.new) for each in erasures.signed for one in each.statement.replaced}
    problems = [f"{key} does not count: {reason}" for key, reason in erasures.problems.items()]
    for row in session.scalars(select(AuditRow).where(AuditRow.action == CONFIRM).order_by(AuditRow.seq)):
        if row.detail["signature"]["digest"] not in signed:
            problems.append(f"the statement of the erasure in entry {row.seq} is missing")
    for erased in session.scalars(select(ErasedRow).order_by(ErasedRow.old)):
        if (erased.old, erased.new) not in pairs:
            problems.append(f"{short(erased.old)} is said to be erased, and nobody signed that")
    return problems


def _replay(session: Session) -> State:
    """The users, tokens, versions and aliases that result from the log's entries."""
    state: State = {}
    for row in audit.entries(session):
        detail = row.detail
        if row.action.startswith("user."):
            if isinstance(user := detail.get("user"), dict):
                state["user", row.subject] = user
            for token in detail.get("tokens", []):
                state["token", f"{token.get('name')} of {row.subject}"] = token
        elif row.action == "version.register" and isinstance(detail.get("version"), dict):
            version = detail["version"]
            state["version", version_label(version.get("name"), version.get("number"))] = version
        elif row.action == "alias.set":
            place = "/".join(str(detail.get(part, "")) for part in ("tenant", "region"))
            state["alias", f"{row.subject} for {place}"] = detail
    return state


def _actual(session: Session) -> State:
    """The users, tokens, versions and aliases in the tables."""
    state: State = {}
    for user in session.scalars(select(UserRow)):
        state["user", user.name] = identities.state(user)
    for token in session.scalars(select(TokenRow)):
        state["token", f"{token.name} of {token.user}"] = identities.token_state(token)
    for version in session.scalars(select(VersionRow)):
        state["version", version.label] = _columns(version)
    for alias in session.scalars(select(AliasRow)):
        state["alias", f"{alias.name}@{alias.alias} for {alias.tenant}/{alias.region}"] = _columns(alias)
    return state


def _columns(row: AliasRow | VersionRow) -> dict[str, Any]:
    return {column.name: getattr(row, column.name) for column in row.__table__.columns}


def _differences(logged: State, actual: State) -> list[str]:
    problems = []
    for key in sorted(logged.keys() | actual.keys()):
        kind, name = key
        if key not in logged:
            problems.append(f"{kind} {name} is in the database but not in the log")
        elif key not in actual:
            problems.append(f"{kind} {name} is in the log but not in the database")
        elif logged[key] != actual[key]:
            before, after = logged[key], actual[key]
            parts = sorted(part for part in before.keys() | after.keys() if before.get(part) != after.get(part))
            problems.append(f"{kind} {name} differs between the log and the database: {', '.join(parts)}")
    return problems

"""Register a judged candidate as the next version of a name: check its evidence, sign it, and record it.

Weights are read, signed and uploaded before the write transaction, for which all other writers of the store wait. The
transaction decides: it checks what may have changed meanwhile, and writes the version's row with its audit entry.

The signature covers the version's number, and the files' keys contain it, so it must be known before the transaction. A
lock of the name keeps it: one process at a time registers versions of a name, and the others wait.

Without its row a version is not registered and cannot serve. So what a killed process leaves is harmless:

- Killed before `release.json` is uploaded, the last file: the name's next registration replaces the incomplete folder.
- Killed after that: the same registration by the same user takes the folder up; any other one takes the next number.
- The record and the notice, small objects named by their content, may stay without a use. Nothing deletes them.

A process that could not renew its lock for a minute loses it to a process on another machine. If it is still uploading,
the files of the two may be mixed: such a version fails verification and does not serve.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now, stamp
from tunesmith.core.digests import digest_file, short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.system.files import copy_durably
from tunesmith.core.text.names import Scope, VersionRef, check_name
from tunesmith.records.candidate import BaseBody
from tunesmith.records.dataset import Duties
from tunesmith.records.evaluation import VerdictBody
from tunesmith.records.version import Paper, Requirement, VersionBody
from tunesmith.registry.licence_duties import NOTICE, carried, notice
from tunesmith.registry.opening import current_signer, open_release
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.release import (
    Release,
    Version,
    check_evidence,
    check_release,
    check_replay,
    marks_of,
    weight_blobs,
)
from tunesmith.registry.signing.signatures import RELEASE, Expired, Untrusted, private_copy, sign_folder, sync_files
from tunesmith.registry.versions import list_versions
from tunesmith.store import audit
from tunesmith.store.audit import Head
from tunesmith.store.locks import LockHeld
from tunesmith.store.people import identities
from tunesmith.store.people.identities import User
from tunesmith.store.people.trust import signature_entry
from tunesmith.store.records import Record, ancestors, blobs_of, first_recalled
from tunesmith.store.store import Store, session_of
from tunesmith.store.tables import VersionRow

_RESTORE = "restore the file from a backup"
_WAIT_SECONDS = 0.2  # until a registration that waits for another one looks again
_MOST_SECONDS = 1800.0  # that it waits


class _Plan(NamedTuple):
    """Everything that a version will state except its number, which the process that holds the lock chooses."""

    name: str
    scope: Scope
    override: str | None
    expires_at: str | None
    risk: Requirement | None
    papers: tuple[Paper, ...]
    parents: Mapping[str, str]
    records: Mapping[str, Record]
    blobs: Mapping[str, str]  # the weights' files and the notice
    duties: Duties | None


def register(
    store: Store,
    *,
    name: str,
    verdict: str,
    actor: str,
    scope: Scope = Scope(),
    override: str | None = None,
    expires_at: str | None = None,
    risk: Requirement | None = None,
    papers: tuple[Paper, ...] = (),
    changed: Sequence[str] = (),
) -> Version:
    """Sign a judged candidate as the next version of a name.

    The same verdict, risk and papers again give the same version, unless another end is stated.

    verdict: a verdict record's digest. override: the reason to register it although it did not pass (admins only;
    the version states it). expires_at: ISO 8601 with a time zone. risk: what it takes to serve; None takes one
    approver. papers: that must be written before its approval. changed: gates and policy checks that are others than
    the verdict's, whose pass then needs an override as well. Raises Refused if the evidence, the adapter or the actor's
    roles do not allow it, or if something that the
    version would be made from was recalled; UsageError for bad names. If the call is killed, the next one carries on.
    """
    check_name(name, "version name")
    identities.require(store, actor, "version.register", scope=scope)
    override = _reason(override)
    expires_at = _expiry(expires_at)
    plan = _Plan(name, scope, override, expires_at, risk, papers, *_evidence(store, name, verdict, override, changed))
    if override is not None:
        identities.require(store, actor, "version.override", scope=scope)
    with _alone(store, name):
        known = _find_registered(store, plan)
        if known is not None:
            return known
        version = _register(store, plan, keys.ensure_key(store, actor))
    identities.publish_trust(store)
    return version


@contextlib.contextmanager
def _alone(store: Store, name: str) -> Iterator[None]:
    """Wait until nobody else registers a version of a name, and keep the others waiting. Raises LockHeld after half an
    hour: the process that holds it may have been paused."""
    until = time.monotonic() + _MOST_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(store.lock(f"versions of {name}", f"registering a version of {name}"))
                break
            except LockHeld:
                if time.monotonic() > until:
                    raise
                time.sleep(_WAIT_SECONDS)
        yield


def _register(store: Store, plan: _Plan, signer: User) -> Version:
    """Sign the next version and put its files into the store; then record it, in one transaction."""
    taken = _rows(store, plan.name)
    carried_on = _carry_on(store, plan, signer, taken)
    release = carried_on or _make(store, plan, signer, taken)
    version, key = release.version, release.signer.fingerprint
    detail: JsonObject = {}
    try:
        with store.change(signer.name, "version.register", plan.name, detail) as session:
            _check_unchanged(session, plan, release, taken)
            store.index_record(release.record, session)
            row = {"name": plan.name, "number": version.number, **plan.scope.fields(), "digest": version.digest}
            row["key"] = key
            session.add(VersionRow(**row))
            detail |= {"version": row, "verdict": version.verdict, **signature_entry(key, version.digest)}
            detail |= {"override": version.override, "expires_at": version.expires_at}
            detail["risk"] = None if version.risk is None else version.risk.model_dump(mode="json")
    except BaseException:
        # Without a row, the signed folder must not stay. After a commit the row exists.
        if carried_on is None and version.number not in _rows(store, plan.name):
            store.drop_version(version.ref)
        raise
    return version


def _check_unchanged(session: Session, plan: _Plan, release: Release, taken: set[int]) -> None:
    """Raise unless the signer may still register this version, and its number is still free."""
    if _rows(session, plan.name) != taken:  # this process lost the lock: it could not renew it for a minute
        raise TunesmithError(
            f"another process registered a version of {plan.name} meanwhile",
            where=release.version.label,
            fix="run the same command again",
        )
    actor = release.statement.signer
    identities.require(session, actor, "version.register", scope=plan.scope)
    if plan.override is not None:
        identities.require(session, actor, "version.override", scope=plan.scope)
    _check_not_recalled(session, plan.parents, plan.records)
    current_signer(session, release.version, release.signer.fingerprint)


def _evidence(
    store: Store, name: str, verdict: str, override: str | None, changed: Sequence[str]
) -> tuple[Mapping[str, str], Mapping[str, Record], Mapping[str, str], Duties | None]:
    """The parents, records, blobs and duties of a plan, checked."""
    judged = store.record(verdict, kind="verdict")
    parents = {role: judged.parents[role] for role in ("candidate", "evaluation")} | {"verdict": verdict}
    records = ancestors(store.record, parents.values())
    with store.reading() as session:
        _check_not_recalled(session, parents, records)
    check_evidence(records, parents, override)
    if changed and override is None:
        raise Refused(
            f"the gates or policy checks changed since this verdict: {', '.join(changed)}",
            where=f"verdict {short(verdict)}",
            fix=NextStep("judge it again; an admin may register it by an override", "gate"),
        )
    if override is not None and VerdictBody.of(judged).verdict == "pass" and not changed:
        raise UsageError("the verdict is a pass, so there is nothing to override", where="override", fix="leave it out")
    for digest in sorted(blobs_of(records.values())):
        if digest_file(path := store.blob_path(digest)) != digest:
            raise Refused("the blob's bytes do not match its digest", where=str(path), fix=_RESTORE)
    for gate, what in check_replay(store, verdict).items():
        raise Refused(
            f"the gate {gate} of this verdict is no longer computed: {what} was removed",
            where=f"verdict {short(verdict)}",
            fix=NextStep("take the gate out of the project file and judge it again", "gate"),
        )
    duties = carried(records, parents["candidate"])
    notices = {} if duties is None else {NOTICE: store.put_bytes(notice(name, duties))}
    return parents, records, {**weight_blobs(records, parents["candidate"]), **notices}, duties


def _check_not_recalled(session: Session, parents: Mapping[str, str], records: Mapping[str, Record]) -> None:
    """Raise Refused if a record that a version would be made from was recalled.

    A recall of another version or of a base counts if the candidate or its weights are of it, and not if it was only
    compared with one.
    """
    candidate = parents["candidate"]
    made = records[candidate].parents
    own = [candidate, made["base"], made.get("training", candidate)]
    if (recall := first_recalled(session, records, own)) is not None:
        digest, reason = recall
        raise Refused(
            f"verdict {short(parents['verdict'])} was made from something that was recalled: {reason}",
            where=f"{records[digest].kind} {short(digest)}",
            fix=NextStep("make, measure and judge a candidate without it", "run"),
        )


def _find_registered(store: Store, plan: _Plan) -> Version | None:
    """The version already made from this verdict and risk class, unless it expired or its signer may not sign now.

    Where the plan states an end, one with another end is a different version.
    """
    for version in list_versions(store, plan.name):
        if (version.verdict, version.scope) != (plan.parents["verdict"], plan.scope):
            continue
        if (version.risk, version.papers) != (plan.risk, plan.papers):
            continue
        if plan.expires_at not in (None, version.expires_at):
            continue
        with contextlib.suppress(Untrusted, Expired), open_release(store, version):
            return version
    return None


def _carry_on(store: Store, plan: _Plan, signer: User, taken: set[int]) -> Release | None:
    """The release in a signed folder that has no database row because its process was killed."""
    trusted = identities.trusted_keys(store)
    for number in sorted(_numbers(store, plan.name) - taken):
        with (
            contextlib.suppress(TunesmithError),
            private_copy(store.version_folder(VersionRef(plan.name, number))) as folder,
        ):
            release = check_release(folder, trusted)
            stated = release.statement
            if release.record.digest == _record(plan, number, signer, stated.audit, stated.created_at).digest:
                store.write_record(release.record)
                return release
    return None


def _record(plan: _Plan, number: int, signer: User, head: Head, at: str) -> Record:
    """The record of the version that a plan states. head: of the audit log; at: the time of signing."""
    base = plan.records[plan.parents["candidate"]].parents["base"]
    statement = VersionBody(
        name=plan.name,
        number=number,
        **plan.scope.fields(),
        base=base,
        fingerprint=BaseBody.of(plan.records[base]).fingerprint,
        signer=signer.name,
        override=plan.override,
        created_at=at,
        expires_at=plan.expires_at,
        records=tuple(sorted(plan.records)),
        blobs=tuple(sorted(blobs_of(plan.records.values()))),
        audit=head,
        duties=plan.duties,
        marks=marks_of(plan.records, plan.parents["candidate"]),
        risk=plan.risk,
        papers=plan.papers,
    )
    return statement.record(plan.parents, plan.blobs)


def _make(store: Store, plan: _Plan, signer: User, taken: set[int]) -> Release:
    """Sign the next version in a temporary folder, and move its files into the store."""
    private_key = keys.signing_key(store, signer)
    # Never the number of an existing folder: a restored older database must not overwrite a release.
    number = max({0, *taken, *_numbers(store, plan.name)}) + 1
    with store.reading() as session:
        record = _record(plan, number, signer, audit.newest(session), stamp())
    with store.scratch() as scratch:
        folder = scratch / f"v{number}"
        folder.mkdir()
        for file, digest in plan.blobs.items():
            copy_durably(store.blob_path(digest), folder / file)
        (folder / RELEASE).write_bytes(record.encoded)
        sign_folder(folder, private_key)
        sync_files(folder)
        release = check_release(folder, identities.trusted_keys(store))  # one that does not verify is not registered
        # The record first: a complete folder implies its record.
        store.write_record(record)
        store.put_version(VersionRef(plan.name, number), folder)
    return release


def _numbers(store: Store, name: str) -> set[int]:
    return {ref.number for ref in store.version_folders(name)}


def _rows(where: Store | Session, name: str) -> set[int]:
    with session_of(where) as session:
        return set(session.scalars(select(VersionRow.number).where(VersionRow.name == name)))


def _reason(override: str | None) -> str | None:
    if override is not None and not override.strip():
        raise UsageError("an override needs a reason", where="override")
    return override.strip() if override is not None else None


def _expiry(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or moment <= now():
        raise UsageError(f"{text[:80]!r} is not a time in the future", fix="write it as 2030-01-31T00:00:00Z")
    return text

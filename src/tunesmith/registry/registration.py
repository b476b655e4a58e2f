"""Register a judged candidate as the next version of a name: check its evidence, sign it, and record it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now, stamp
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.files import copy_durably, room_for
from tunesmith.core.scope import Scope
from tunesmith.core.scratch import scratch_folder
from tunesmith.core.text.names import check_name
from tunesmith.core.version_ref import VersionRef
from tunesmith.registry.licence_duties import NOTICE, carried, notice
from tunesmith.registry.lineage import ancestors, blobs_of
from tunesmith.registry.opening import open_release
from tunesmith.registry.risk import Requirement
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.release import (
    Release,
    Statement,
    Version,
    check_evidence,
    check_release,
    check_replay,
    marks_of,
    weight_blobs,
)
from tunesmith.registry.signing.signatures import RELEASE, Expired, Untrusted, private_copy, sign_folder, sync_files
from tunesmith.registry.versions import list_versions
from tunesmith.store import audit, database, identities
from tunesmith.store.identities import User
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow
from tunesmith.store.trust import signature_entry

_RESTORE = "restore the file from a backup"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that a version will state except its number, which the transaction chooses."""

    name: str
    scope: Scope
    override: str | None
    expires_at: str | None
    parents: Mapping[str, str]
    records: Mapping[str, Record]
    blobs: Mapping[str, str]  # the weights' files and the notice
    duties: Mapping[str, Any] | None
    risk: Requirement | None


class _Again(Exception):
    pass


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
) -> Version:
    """Sign a judged candidate as the next version of a name. The same verdict and risk again give the same version.

    verdict: a verdict record's digest. override: the reason to register it although it did not pass (admins only;
    the version states it). expires_at: ISO 8601 with a time zone. risk: what it takes to serve; None takes one
    approver. Raises Refused if the evidence, the adapter or the actor's roles do not allow it, UsageError for bad
    names. If the call is killed, the next one carries on.
    """
    check_name(name, "version name")
    identities.require(store, actor, "version.register", scope=scope)
    plan = _plan(store, name, verdict, scope, _reason(override), _expiry(expires_at), risk)
    if plan.override is not None:
        identities.require(store, actor, "version.override", scope=scope)
    signer: User | None = None
    while True:
        before = _rows(store, name)
        known = _find_registered(store, plan)
        if known is not None:
            return known
        signer = signer or keys.ensure_key(store, actor)
        with contextlib.suppress(_Again):
            version = _register(store, plan, signer, before)
            identities.publish_trust(store)
            return version


def _register(store: Store, plan: _Plan, signer: User, before: set[int]) -> Version:
    """Register in one transaction. before: the name's numbers when this verdict was found not to be registered."""
    private_key = keys.signing_key(store, signer)
    detail: dict[str, Any] = {}
    made: int | None = None
    try:
        # The weights are copied before the transaction, for which all other writers wait.
        with (
            _blobs_aside(store, plan) as aside,
            store.change(signer.name, "version.register", plan.name, detail) as session,
        ):
            if _rows(session, plan.name) != before:  # another process registered a version: search again
                raise _Again
            identities.require(session, signer.name, "version.register", scope=plan.scope)
            release = _carry_on(store, session, plan, signer)
            if release is None:
                release = _make(store, session, plan, signer, private_key, aside)
                made = release.version.number
            version, key = release.version, release.signer.fingerprint
            row = {"name": plan.name, "number": version.number, **plan.scope.fields(), "digest": version.digest}
            row["key"] = key
            session.add(VersionRow(**row))
            detail |= {"version": row, "verdict": version.verdict, **signature_entry(key, version.digest)}
            detail |= {"override": version.override, "expires_at": version.expires_at}
            detail["risk"] = None if version.risk is None else version.risk.model_dump(mode="json")
    except BaseException:
        # Without a row, the signed folder must not stay. After a commit the row exists.
        if made is not None and made not in _rows(store, plan.name):
            store.drop_version(VersionRef(plan.name, made))
        raise
    return version


def _plan(
    store: Store,
    name: str,
    verdict: str,
    scope: Scope,
    override: str | None,
    expires_at: str | None,
    risk: Requirement | None,
) -> _Plan:
    judged = store.record(verdict, kind="verdict")
    parents = {role: judged.parents[role] for role in ("candidate", "evaluation")} | {"verdict": verdict}
    records = ancestors(store, parents.values())
    check_evidence(records, parents, override)
    if override is not None and judged.body["verdict"] == "pass":
        raise UsageError("the verdict is a pass, so there is nothing to override", fix="leave --override out")
    for digest in sorted(blobs_of(records.values())):
        if digest_file(path := store.blob_path(digest)) != digest:
            raise Refused("the blob's bytes do not match its digest", where=str(path), fix=_RESTORE)
    check_replay(store, verdict)
    duties = carried(records, parents["candidate"])
    notices = {} if duties is None else {NOTICE: store.put_bytes(notice(name, duties))}
    return _Plan(
        name=name,
        scope=scope,
        override=override,
        expires_at=expires_at,
        parents=parents,
        records=records,
        blobs={**weight_blobs(records, parents["candidate"]), **notices},
        duties=duties,
        risk=risk,
    )


def _find_registered(store: Store, plan: _Plan) -> Version | None:
    """The version already made from this verdict and risk class, unless it expired or its signer may not sign now."""
    for version in list_versions(store, plan.name):
        if (version.verdict, version.scope, version.risk) != (plan.parents["verdict"], plan.scope, plan.risk):
            continue
        with contextlib.suppress(Untrusted, Expired), open_release(store, version):
            return version
    return None


def _carry_on(store: Store, session: Session, plan: _Plan, signer: User) -> Release | None:
    """The release in a signed folder that has no database row because its process was killed."""
    trusted = identities.trusted_keys(session)
    for number in sorted(_numbers(store, plan.name) - _rows(session, plan.name)):
        with (
            contextlib.suppress(TunesmithError),
            private_copy(store.version_folder(VersionRef(plan.name, number))) as folder,
        ):
            release = check_release(folder, trusted)
            if _states(release, plan, number, signer):
                store.put_record(release.record, session)
                return release
    return None


def _states(release: Release, plan: _Plan, number: int, signer: User) -> bool:
    stated = release.statement
    return (
        dict(release.record.parents) == dict(plan.parents)
        and dict(release.record.blobs) == dict(plan.blobs)
        and (stated.name, stated.number, Scope(stated.tenant, stated.region)) == (plan.name, number, plan.scope)
        and (stated.override, stated.expires_at, stated.signer) == (plan.override, plan.expires_at, signer.name)
        and stated.risk == plan.risk
    )


@contextlib.contextmanager
def _blobs_aside(store: Store, plan: _Plan) -> Iterator[Path]:
    """A temporary folder with copies of the version's blobs."""
    work = store.local("work")
    work.mkdir(parents=True, exist_ok=True)
    with scratch_folder(work) as scratch:
        folder = scratch / "blobs"
        folder.mkdir()
        for file, digest in plan.blobs.items():
            copy_durably(store.blob_path(digest), folder / file)
        yield folder


def _make(store: Store, session: Session, plan: _Plan, signer: User, private_key: Path, aside: Path) -> Release:
    """Build and sign the next version's folder of the blobs in aside, then move its files into the store."""
    # Never the number of an existing folder: a restored older database must not overwrite a release.
    number = max({0, *_rows(session, plan.name), *_numbers(store, plan.name)}) + 1
    base = plan.records[plan.parents["candidate"]].parents["base"]
    statement = Statement(
        name=plan.name,
        number=number,
        **plan.scope.fields(),
        base=base,
        fingerprint=plan.records[base].body["fingerprint"],
        signer=signer.name,
        override=plan.override,
        created_at=stamp(),
        expires_at=plan.expires_at,
        records=sorted(plan.records),
        blobs=sorted(blobs_of(plan.records.values())),
        audit=audit.newest(session),
        duties=None if plan.duties is None else dict(plan.duties),
        marks=marks_of(plan.records, plan.parents["candidate"]),
        risk=plan.risk,
    )
    record = Record(kind="version", parents=plan.parents, blobs=plan.blobs, body=statement.model_dump(mode="json"))
    folder = aside.rename(aside.with_name(f"v{number}"))
    with room_for(folder):
        (folder / RELEASE).write_bytes(record.encoded)
        sign_folder(folder, private_key)
        sync_files(folder)
    release = check_release(folder, identities.trusted_keys(session))  # one that does not verify is not registered
    # The record first: a complete folder implies its record.
    store.put_record(record, session)
    store.put_version(VersionRef(plan.name, number), folder)
    return release


def _numbers(store: Store, name: str) -> set[int]:
    return {ref.number for ref in store.version_folders(name)}


def _rows(where: Store | Session, name: str) -> set[int]:
    if not isinstance(where, Session):
        with database.reading(where.engine) as session:
            return _rows(session, name)
    return set(where.scalars(select(VersionRow.number).where(VersionRow.name == name)))


def _reason(override: str | None) -> str | None:
    if override is not None and not override.strip():
        raise UsageError("an override needs a reason", fix='--override "why to register it although it did not pass"')
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

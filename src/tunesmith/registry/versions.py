"""Versions: register, find and open them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.clock import now, stamp
from tunesmith.core.digests import digest_file, is_digest, short
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.files import copy_durably, room_for
from tunesmith.core.scope import Scope
from tunesmith.core.scratch import scratch_folder
from tunesmith.core.text.names import check_name
from tunesmith.core.version_ref import VersionRef
from tunesmith.registry.aliases import ALIASES, get_alias
from tunesmith.registry.licence_duties import NOTICE, carried, notice
from tunesmith.registry.lineage import ancestors, blobs_of
from tunesmith.registry.risk import Requirement
from tunesmith.registry.serving import may_load
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.release import (
    Release,
    Statement,
    Version,
    check_evidence,
    check_release,
    check_replay,
    check_signer,
    has_weights,
    marks_of,
    read_version,
    weight_blobs,
)
from tunesmith.registry.signing.signatures import RELEASE, Expired, Untrusted, private_copy, sign_folder, sync_files
from tunesmith.registry.verification import Verification, verify_version
from tunesmith.store import audit, database, identities
from tunesmith.store.identities import User
from tunesmith.store.recalls import recalled
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import RecordRow, VersionRow
from tunesmith.store.trust import find_key, signature_entry

_RESTORE = "restore the file from a backup"
_FIX = "restore the version's folder from where it was signed, or register it again"

# Releases whose files were verified before a transaction began, by their version's digest; or why they were not.
Verified = dict[str, Release | TunesmithError]

__all__ = [
    "LoadedVersion",
    "Verification",
    "Verified",
    "Version",
    "count_versions",
    "list_versions",
    "load_version",
    "open_release",
    "register",
    "resolve",
    "still_usable",
    "verified_copy",
    "verify_version",
    "version_of",
]


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A verified version. adapter: a private folder to load its weights from; None if it has no weights."""

    version: Version
    candidate: Candidate
    adapter: Path | None


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
    """Sign a judged candidate as the next version of a name.

    The same verdict and risk again give the same version, unless another end is stated.

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


def resolve(store: Store, text: str, *, scope: Scope = Scope(), session: Session | None = None) -> Version:
    """The version that text names: `name@v3`, `name@champion` or the start of a digest.

    scope: the caller's. A version of another tenant or region is treated like one that does not exist. session: read
    through the caller's. Raises UsageError where there is none, or several.
    """
    query = select(VersionRow.digest).where(
        VersionRow.tenant.in_(("", scope.tenant)), VersionRow.region.in_(("", scope.region))
    )
    name, _, rest = text.partition("@")
    if rest in ALIASES:
        alias = get_alias(session or store, name, rest, scope)
        query = query.where(VersionRow.digest == (alias.version if alias else ""))
    elif rest:
        ref = VersionRef.parse(text)
        query = query.where(VersionRow.name == ref.name, VersionRow.number == ref.number)
    else:
        start = text.removeprefix("sha256:").lower()
        if len(start) < 4 or not is_digest("sha256:" + start.ljust(64, "0")):
            raise UsageError(f"{text[:80]!r} is not a version", fix="write NAME@vNUMBER, NAME@champion or a digest")
        query = query.where(VersionRow.digest.startswith(f"sha256:{start}"))
    with _reading(store, session) as reading:
        found = list(reading.scalars(query.limit(2)))
    if not found:
        raise UsageError(f"there is no version {text[:80]!r}", fix="tunesmith show lists all versions")
    if len(found) > 1:
        raise UsageError(f"several versions start with {text[:80]!r}", fix="give more digits")
    return load_version(store, found[0], session)


def load_version(store: Store, digest: str, session: Session | None = None) -> Version:
    """A registered version by its digest. Raises Refused if it is not registered, or its row contradicts its record."""
    with _reading(store, session) as reading:
        row = reading.scalars(select(VersionRow).where(VersionRow.digest == digest)).first()
    if row is None:
        raise Refused(f"{short(digest)} is not a registered version", fix="tunesmith register")
    return version_of(store, row)


def version_of(store: Store, row: VersionRow) -> Version:
    """The version of a row. Raises Refused if the row contradicts the version's record."""
    version, _ = read_version(store.record(row.digest, kind="version"), store.record_where(row.digest), row.digest)
    stated = (version.name, version.number, version.tenant, version.region)
    if stated != (row.name, row.number, row.tenant, row.region):
        raise Refused(
            f"the database says {row.name}@v{row.number}, the version's record says {version.label}",
            where="database, table versions",
            fix="run `tunesmith audit verify`",
        )
    return version


def readable_versions(store: Store, digests: Collection[str], session: Session) -> dict[str, Version]:
    """Registered versions by digest, without those whose records cannot be read. One query for all.

    `tunesmith audit verify` says what is wrong with the others.
    """
    found = {}
    for row in session.scalars(select(VersionRow).where(VersionRow.digest.in_(digests))).all():
        with contextlib.suppress(TunesmithError):
            found[row.digest] = version_of(store, row)
    return found


def list_versions(
    store: Store, name: str | None = None, *, containing: str = "", newest: int | None = None
) -> list[Version]:
    """Registered versions by name and number, of every tenant and region.

    name: only of this name. containing: only of names with this text in them. newest: only the last so many that were
    registered; without it every record is read.
    """
    query = select(VersionRow).order_by(VersionRow.name, VersionRow.number)
    if newest is not None:
        last = _digests(name, containing).join(RecordRow, RecordRow.digest == VersionRow.digest)
        last = last.order_by(RecordRow.created_at.desc(), VersionRow.digest).limit(newest)
        query = query.where(VersionRow.digest.in_(last))
    else:
        query = query.where(VersionRow.digest.in_(_digests(name, containing)))
    with database.reading(store.engine) as session:
        rows = list(session.scalars(query))
    return [version_of(store, row) for row in rows]


def count_versions(store: Store, *, containing: str = "") -> int:
    """How many versions are registered. containing: only of names with this text in them."""
    with database.reading(store.engine) as session:
        return session.scalar(select(func.count()).select_from(_digests(None, containing).subquery())) or 0


def _digests(name: str | None, containing: str) -> Select[str]:
    query = select(VersionRow.digest)
    if name is not None:
        query = query.where(VersionRow.name == name)
    return query.where(VersionRow.name.contains(containing, autoescape=True)) if containing else query


def check_not_recalled(session: Session, version: Version, statement: Statement) -> None:
    """Raise Refused if the version, or a record or blob that it was made from, was recalled."""
    for digest in (version.digest, *statement.records, *statement.blobs):
        reason = recalled(session, digest, as_evidence=digest not in (version.digest, version.candidate))
        if reason is not None:
            raise Refused(
                f"{version.label} was recalled: {reason}",
                where=f"{short(digest)}, which it was made from" if digest != version.digest else version.label,
                fix="use a version that was made without it",
            )


@contextlib.contextmanager
def open_release(store: Store, version: Version, session: Session | None = None) -> Iterator[tuple[Path, Release]]:
    """A verified private copy of a version's folder, and the release that it holds.

    Later changes of the store's own files have no effect on the copy. session: decide by what the caller's transaction
    sees. Raises Refused if the version may not be loaded (serving.may_load), if its folder or signature is damaged, or
    if a record that it was made from was recalled.
    """
    registered = load_version(store, version.digest, session)
    if registered != version:
        raise Refused("this is not the version of that digest", where=version.label, fix="resolve it again")
    with _reading(store, session) as reading:
        may_load(reading, version, version.scope).require(version.label)
    with private_copy(store.version_folder(version.ref)) as folder:
        release = check_release(folder, identities.trusted_keys(session or store))
        if release.version != registered:
            raise Refused(f"the folder holds {release.version.label}, not {version.label}", where=str(folder), fix=_FIX)
        with _reading(store, session) as reading:
            check_not_recalled(reading, registered, release.statement)
        yield folder, release


def still_usable(store: Store, version: Version, release: Release, session: Session) -> Release:
    """A version's release whose files were verified before, decided anew by what the caller's transaction sees.

    Reads no weights, so that a write transaction is short. Raises as open_release does.
    """
    if not version == release.version == load_version(store, version.digest, session):
        raise Refused("this is not the version of that digest", where=version.label, fix="resolve it again")
    may_load(session, version, version.scope).require(version.label)
    signer = find_key(identities.trusted_keys(session), release.signer.fingerprint)
    if signer is None:
        raise Untrusted("its key is not trusted here any more", where=version.label, fix="register it again")
    check_signer(version, signer)
    check_not_recalled(session, version, release.statement)
    return replace(release, signer=signer)


def _reading(store: Store, session: Session | None) -> contextlib.AbstractContextManager[Session]:
    return database.reading(store.engine) if session is None else contextlib.nullcontext(session)


@contextlib.contextmanager
def verified_copy(store: Store, version: Version) -> Iterator[LoadedVersion]:
    """Open a version for use: a verified private copy of its files, to load them from. Raises as open_release does."""
    with open_release(store, version) as (folder, release):
        candidate = load_candidate(store, version.candidate)
        if candidate.tuned != has_weights(release.record):
            raise Refused("only one of the candidate and its release has weights", where=str(folder))
        yield LoadedVersion(version, candidate, folder if candidate.tuned else None)


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
    """The version already made from this verdict and risk class, unless it expired or its signer may not sign now.

    Where the plan states an end, one with another end is a different version.
    """
    for version in list_versions(store, plan.name):
        if (version.verdict, version.scope, version.risk) != (plan.parents["verdict"], plan.scope, plan.risk):
            continue
        if plan.expires_at not in (None, version.expires_at):
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

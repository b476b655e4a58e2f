"""Open versions: a verified private copy of a version's files, and whether what was verified is still usable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.orm import Session

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.records.version import VersionBody
from tunesmith.registry.serving import may_load
from tunesmith.registry.signing.release import Release, Version, check_release, check_signer, has_weights
from tunesmith.registry.signing.signatures import FIX, Untrusted, private_copy
from tunesmith.registry.versions import load_version
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey, find_key
from tunesmith.store.records import first_recalled
from tunesmith.store.store import Store, session_of

# Releases whose files were verified before a transaction began, by their version's digest; or why they were not.
Verified = dict[str, Release | TunesmithError]


class LoadedVersion(NamedTuple):
    """A verified version. adapter: a private folder to load its weights from; None if it has no weights."""

    version: Version
    candidate: Candidate
    adapter: Path | None


@contextlib.contextmanager
def verified_copy(store: Store, version: Version) -> Iterator[LoadedVersion]:
    """Open a version for use: a verified private copy of its files, to load them from. Raises as open_release does."""
    with open_release(store, version) as (folder, release):
        candidate = load_candidate(store, version.candidate)
        if candidate.tuned != has_weights(release.record):
            raise Refused("only one of the candidate and its release has weights", where=str(folder))
        yield LoadedVersion(version, candidate, folder if candidate.tuned else None)


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
    with session_of(session or store) as current:
        may_load(current, version, version.scope).require(version.label)
    with private_copy(store.version_folder(version.ref)) as folder:
        release = check_release(folder, identities.trusted_keys(session or store))
        if release.version != registered:
            raise Refused(f"the folder holds {release.version.label}, not {version.label}", where=str(folder), fix=FIX)
        with session_of(session or store) as current:
            check_not_recalled(current, registered, release.statement)
        yield folder, release


def still_usable(store: Store, version: Version, release: Release, session: Session) -> Release:
    """A version's release whose files were verified before, decided anew by what the caller's transaction sees.

    Reads no weights, so that a write transaction is short. Raises as open_release does.
    """
    if not version == release.version == load_version(store, version.digest, session):
        raise Refused("this is not the version of that digest", where=version.label, fix="resolve it again")
    may_load(session, version, version.scope).require(version.label)
    signer = current_signer(session, version, release.signer.fingerprint)
    check_not_recalled(session, version, release.statement)
    return release._replace(signer=signer)


def current_signer(session: Session, version: Version, fingerprint: str) -> TrustedKey:
    """The key that signed a version, as it is trusted now. Raises Untrusted if its owner may not sign it any more."""
    signer = find_key(identities.trusted_keys(session), fingerprint)
    if signer is None:
        raise Untrusted("its key is not trusted here any more", where=version.label, fix="register it again")
    check_signer(version, signer)
    return signer


def recall_of(session: Session, version: Version, statement: VersionBody) -> tuple[str, str] | None:
    """The version, record or blob that was recalled of a version and what it was made from, and why; None if none."""
    digests = (version.digest, *statement.records, *statement.blobs)
    return first_recalled(session, digests, own=(version.digest, version.candidate, statement.base))


def check_not_recalled(session: Session, version: Version, statement: VersionBody) -> None:
    """Raise Refused if the version, or a record or blob that it was made from, was recalled. An erasure recalls too."""
    if (recall := recall_of(session, version, statement)) is not None:
        digest, reason = recall
        raise Refused(
            f"{version.label} was recalled: {reason}",
            where=f"{short(digest)}, which it was made from" if digest != version.digest else version.label,
            fix="use a version that was made without it",
        )

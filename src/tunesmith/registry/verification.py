"""Offline verification: a version and all it came of, recomputed from files. No database, no network, no private key.

What is believed is the list of trusted keys: the store's own `trust/keys.json`, or a verifier's copy of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tunesmith.core.digests import digest_file, is_digest, short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.version_ref import VersionRef
from tunesmith.core.view import Problem
from tunesmith.models.base import known_folder
from tunesmith.registry.licence_duties import NOTICE, carried
from tunesmith.registry.lineage import blobs_of
from tunesmith.registry.signing.attestations import ENVELOPE, read_approval
from tunesmith.registry.signing.release import (
    Release,
    check_evidence,
    check_release,
    check_replay,
    marks_of,
    weight_blobs,
)
from tunesmith.registry.signing.signatures import RELEASE, private_copy
from tunesmith.store.records import Record, decode
from tunesmith.store.store import Store
from tunesmith.store.trust import TRUST_KEY, TrustedKey, read_trust


class Verification(BaseModel):
    """The outcome. checked: files held against a digest or signature. notes: what was, or could not be, looked at."""

    model_config = ConfigDict(frozen=True)

    version: str
    ok: bool
    digest: str | None
    checked: int
    problems: list[Problem]
    notes: list[str]


def verify_version(
    root: Path,
    label: str,
    *,
    trust: Path | None = None,
    keys: Sequence[TrustedKey] | None = None,
    base_folder: Path | None = None,
    whole_store: bool = True,
) -> Verification:
    """Verify `name@v3` from the files under a store's root.

    trust: the verifier's own list of keys; the store's otherwise. keys: the list itself, where the caller has it.
    base_folder: where the base model's files lie, to be held against the lineage too; where the store last found them
    otherwise. whole_store: hold every other blob and record against its name as well. Raises UsageError for a label
    that is none; all else is a problem in the outcome. Recalls are the database's and are not looked at.
    """
    ref = VersionRef.parse(label)
    look = _Look(root)
    release: Release | None = None
    known: Sequence[TrustedKey] = ()
    folder = look.store.version_folder(ref)
    try:
        known = keys if keys is not None else read_trust(trust or look.store.blobs.path(TRUST_KEY))
        with private_copy(folder) as copy:
            release = check_release(copy, known)
            look.checked += len(list(copy.iterdir()))
        if release.version.label != label:
            raise Refused(f"this is {release.version.label} under another name", where=str(folder / RELEASE))
    except TunesmithError as error:
        look.problem(error.where or str(folder), error.what)
    if release is not None:
        records = _check_records(look, release)
        _check_blobs(look, {**records, release.version.digest: release.record})
        _check_evidence(look, release, records)
        _check_base(look, records, release.statement.base, base_folder)
    if whole_store:
        approvals = _sweep(look)
        if release is not None:
            _check_approvals(look, release, approvals, known)
    return Verification(
        version=label,
        ok=not look.problems,
        digest=release.version.digest if release else None,
        checked=look.checked,
        problems=look.problems,
        notes=look.notes,
    )


class _Look:
    """What was found so far. seen: digests whose files were read and found right."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root)
        self.checked = 0
        self.seen: set[str] = set()
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def problem(self, path: str | Path, reason: str) -> None:
        place = Path(path)
        shown = place.relative_to(self.root) if place.is_relative_to(self.root) else place
        found = Problem(path=str(shown), reason=reason)
        if found not in self.problems:
            self.problems.append(found)


def _check_records(look: _Look, release: Release) -> dict[str, Record]:
    """The version's own record and every record it came of: each its name's, and together exactly those it states."""
    records: dict[str, Record] = {}
    waiting = [release.version.digest]
    while waiting:
        digest = waiting.pop()
        if digest in records:
            continue
        try:
            records[digest] = look.store.record(digest)
        except TunesmithError as error:
            look.problem(look.store.record_path(digest), error.what)
            continue
        look.checked += 1
        look.seen.add(digest)
        waiting += records[digest].parents.values()
    records.pop(release.version.digest, None)
    if not look.problems:
        folder = look.store.version_folder(release.version.ref)
        for odd in sorted(records.keys() ^ set(release.statement.records)):
            look.problem(folder / RELEASE, f"record {short(odd)} is in the lineage or in the release, not in both")
        for odd in sorted(blobs_of(records.values()) ^ set(release.statement.blobs)):
            look.problem(folder / RELEASE, f"blob {short(odd)} is in the lineage or in the release, not in both")
    return records


def _check_blobs(look: _Look, records: Mapping[str, Record]) -> None:
    """Every blob against its name, and the rows of datasets against what their records count."""
    lines: dict[str, int] = {}
    for digest in sorted(blobs_of(records.values())):
        try:
            path = look.store.blob_path(digest)
            actual, lines[digest] = _digest_and_lines(path)
        except (TunesmithError, OSError) as error:
            look.problem(
                error.where if isinstance(error, TunesmithError) and error.where else digest,
                error.what if isinstance(error, TunesmithError) else str(error),
            )
            continue
        look.checked += 1
        if actual == digest:
            look.seen.add(digest)
        else:
            look.problem(path, "its bytes are not the ones its name promises")
    for name, record in records.items():
        if record.kind == "dataset":
            for split, count in record.body.get("splits", {}).items():
                found = lines.get(record.blobs.get(f"{split}.jsonl", ""))
                if found is not None and found != count:
                    look.problem(look.store.record_path(name), f"says {count} rows in {split}, there are {found}")


def _check_evidence(look: _Look, release: Release, records: Mapping[str, Record]) -> None:
    """That the verdict passes this candidate, on the evaluation that measured it, with the adapter it was given."""
    version = release.version
    if not set(release.statement.records) <= records.keys():
        return  # what is missing is reported already
    folder = look.store.version_folder(version.ref)
    try:
        check_evidence(records, release.record.parents, version.override)
        weights = {name: digest for name, digest in release.record.blobs.items() if name != NOTICE}
        if release.statement.duties != carried(records, version.candidate):
            raise Refused("its duties are not those of the rows' licences that it came of")
        if weight_blobs(records, version.candidate) != weights:
            raise Refused("the adapter is not the one that the candidate was trained to")
        base = records[version.candidate].parents["base"]
        stated = (release.statement.base, release.statement.fingerprint)
        if stated != (base, records[base].body.get("fingerprint")):
            raise Refused("the release states another base or rendering than the candidate's")
        if list(version.marks) != marks_of(records, version.candidate):
            raise Refused("the release does not bear the marks that its training asks for")
    except (TunesmithError, KeyError) as error:
        look.problem(folder / RELEASE, error.what if isinstance(error, TunesmithError) else f"no record {error}")
    if version.evaluation in look.seen and not look.problems:  # damaged scores are reported already
        try:
            check_replay(look.store, version.verdict)
        except Refused as error:
            look.problem(error.where or str(folder), error.what)
    look.notes.extend(f"it was {mark}" for mark in version.marks)
    if version.override is not None:
        look.notes.append(f"its verdict is not a pass; it was let through: {version.override}")


def _check_base(look: _Look, records: Mapping[str, Record], digest: str, folder: Path | None) -> None:
    """The base model's files, which lie outside the store."""
    if digest not in records:
        return
    folder = folder or known_folder(look.store, digest)
    if folder is None or not folder.is_dir():
        look.notes.append("the base model's files were not at hand and not checked (--base FOLDER)")
        return
    for name, facts in records[digest].body.get("files", {}).items():
        path = folder / name
        try:
            whole = digest_file(path) == facts["digest"]
        except OSError as error:
            look.problem(path, f"cannot be read: {error.strerror}")
            continue
        look.checked += 1
        if not whole:
            look.problem(path, "its bytes are not the base model's that this version was evaluated on")
    look.notes.append(f"the base model's files were checked in {folder}")


def _sweep(look: _Look) -> list[Record]:
    """Every blob and record of the store that was not looked at yet, against its name; returns the approvals."""
    approvals: list[Record] = []
    for kind, suffix in (("blobs", ""), ("records", ".json")):
        for path in map(look.store.blobs.path, look.store.blobs.keys(f"{kind}/")):
            if path.name.startswith(".writing-"):
                look.notes.append(f"left over from a process that was stopped: {path.relative_to(look.root)}")
                continue
            digest = f"sha256:{path.name.removesuffix(suffix)}"
            if not is_digest(digest) or path.parent.name != digest[7:9] or not path.name.endswith(suffix):
                look.problem(path, "not a file that a store keeps here")
                continue
            if digest not in look.seen:
                _sweep_file(look, path, digest, approvals if kind == "records" else None)
    return approvals


def _sweep_file(look: _Look, path: Path, digest: str, approvals: list[Record] | None) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refused("not a regular file")
        if approvals is not None:
            record = decode(path.read_bytes(), digest, str(path))
            if record.kind == "approval":
                approvals.append(record)
        elif digest_file(path) != digest:
            raise Refused("its bytes are not the ones its name promises")
    except (TunesmithError, OSError) as error:
        look.problem(path, error.what if isinstance(error, TunesmithError) else f"cannot be read: {error}")
    else:
        look.checked += 1


def _check_approvals(look: _Look, release: Release, approvals: Sequence[Record], keys: Sequence[TrustedKey]) -> None:
    """Say who approved this version. That nobody did is not a problem of its files."""
    counted = 0
    for record in approvals:
        if record.parents.get("version") != release.version.digest:
            continue
        try:
            envelope = look.store.read_blob(record.blobs.get(ENVELOPE, ""))
            approval = read_approval(record, envelope, release.version, release.signer, keys)
        except TunesmithError as error:
            look.notes.append(f"an approval does not count: {error.what}")
            continue
        counted += 1
        look.notes.append(f"approved by {approval.approver} on {approval.at}")
    if not counted:
        look.notes.append("no approval in this store counts")


def _digest_and_lines(path: Path) -> tuple[str, int]:
    hasher, lines = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            hasher.update(piece)
            lines += piece.count(b"\n")
    return f"sha256:{hasher.hexdigest()}", lines

"""Offline verification: recompute a version and everything it was made from, using only files.

It needs no database, no network and no private key. It trusts a list of keys: the store's own `trust/keys.json`, or a
verifier's copy of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tunesmith.core.digests import digest_file, digest_pieces, is_digest, short
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import Problem, View
from tunesmith.models.base import known_folder
from tunesmith.records.candidate import BaseBody
from tunesmith.records.dataset import DatasetBody
from tunesmith.records.version import ApprovalBody
from tunesmith.registry.erasures import Erasures, ErasureStatement, Replaced, read_erasures
from tunesmith.registry.licence_duties import NOTICE, carried
from tunesmith.registry.papers.writing import read_paper
from tunesmith.registry.risk import missing
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
from tunesmith.store.people.trust import TRUST_KEY, TrustedKey, read_trust
from tunesmith.store.records import Record, blobs_of, decode
from tunesmith.store.store import ERASURES, Store, blob_key, record_key


class Verification(View):
    """The result. checked: how many files were verified. notes: what else was or was not checked."""

    version: str
    ok: bool
    digest: str | None
    checked: int
    problems: list[Problem]
    notes: list[str]


def verify_version(
    store: Store,
    label: str,
    *,
    trust: Path | None = None,
    keys: Sequence[TrustedKey] | None = None,
    base_folder: Path | None = None,
    whole_store: bool = True,
) -> Verification:
    """Verify `name@v3` from a store's files, without its database.

    trust: file with the verifier's own list of keys, by default the store's. keys: the list itself, instead of a file.
    base_folder: the base model's files, to be verified too; by default the folder where the store last found them.
    whole_store: also verify every other blob and record of the store. Raises UsageError for a label that is not
    `name@v3`; everything else that is wrong becomes a problem of the result. Does not check recalls, which only the
    database knows.
    """
    ref = VersionRef.parse(label)
    findings = _Findings(store)
    release: Release | None = None
    known: Sequence[TrustedKey] = ()
    folder = findings.store.version_folder(ref)
    try:
        if not folder.is_dir() and next(iter(store.blobs.keys(ERASURES)), None) is None:
            raise Refused(f"the store holds no version {label}", where=str(folder))
        known = keys if keys is not None else read_trust(trust or findings.store.blobs.path(TRUST_KEY))
        findings.know(erasures := read_erasures(store.blobs, known))
        gone = [each.statement for each in erasures.signed if label in each.statement.versions]
        if gone and not (folder / RELEASE).is_file():
            findings.notes.append(f"its folder was {gone[0].said}")
        else:
            with private_copy(folder) as copy:
                release = check_release(copy, known)
                findings.checked += len(list(copy.iterdir()))
            if release.version.label != label:
                raise Refused(f"this is {release.version.label} under another name", where=str(folder / RELEASE))
    except TunesmithError as error:
        findings.problem(error.where or str(folder), error.what)
    if release is not None:
        records = _check_records(findings, release)
        _check_blobs(findings, {**records, release.version.digest: release.record}, release.version.digest)
        _check_evidence(findings, release, records)
        _check_base(findings, records, release.statement.base, base_folder)
    if whole_store:
        decisions, papers = _sweep(findings)
        if release is not None:
            _check_approvals(findings, release, decisions, known)
            _check_papers(findings, release, papers, known)
    return Verification(
        version=label,
        ok=not findings.problems,
        digest=release.version.digest if release else None,
        checked=findings.checked,
        problems=findings.problems,
        notes=findings.notes,
    )


class _Findings:
    """The findings so far. seen: digests whose files were read and are right."""

    def __init__(self, store: Store) -> None:
        self.root, self.store = store.root, Store(store.root, store.url, store.blobs, erased={})
        self.replaced: dict[str, tuple[Replaced, ErasureStatement]] = {}
        self.checked = 0
        self.seen: set[str] = set()
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def problem(self, path: str | Path, reason: str) -> None:
        problem = Problem(path=str(path).removeprefix(f"{self.root}{os.sep}"), reason=reason)
        if problem not in self.problems:
            self.problems.append(problem)

    def know(self, erasures: Erasures) -> None:
        """Believe these erasures from here on: what they rewrote is not damaged."""
        self.replaced = erasures.replaced
        left = {old: one.new for old, (one, _) in self.replaced.items()}
        self.store = Store(self.store.root, self.store.url, self.store.blobs, erased=left)
        for key, reason in erasures.problems.items():
            self.problem(self.store.blobs.where(key), reason)
        for old, (one, erasure) in self.replaced.items():
            key = record_key(old) if one.kind == "record" else blob_key(old)
            if self.store.blobs.exists(key):
                self.problem(self.store.blobs.where(key), f"it was {erasure.said}, and is back: {one.name}")

    def left_of(self, digest: str) -> tuple[str, int]:
        """The digest that a file must have now, and how many lines erasures left out of it. Adds a note of them."""
        rows = 0
        for one, erasure in self._steps(digest):
            what = f"{len(one.rows)} rows" if one.rows else f"{len(one.cut)} texts"
            note = f"{one.kind} {short(digest)} ({one.name}): {what} {erasure.said}"
            self.notes += [note] if note not in self.notes else []
            digest, rows = one.new, rows + len(one.rows)
        return digest, rows

    def _steps(self, digest: str) -> Iterator[tuple[Replaced, ErasureStatement]]:
        while digest in self.replaced:
            yield (step := self.replaced[digest])
            digest = step[0].new

    def check_left(self, digest: str, name: str, version: str) -> None:
        """Raise Refused where an erasure changed what it may not: under the name that a record gives a blob, or of its
        kind, and evidence of a version that the erasure did not recall, so one that was registered over what was left.
        """
        for one, erasure in self._steps(digest):
            recalled = one.rows or version in erasure.recalled
            if not one.model_copy(update={"name": name}).allowed or not recalled:
                raise Refused(f"erasure {erasure.number} replaced this {name}, which it may not for this version")

    @contextlib.contextmanager
    def about(self, path: str | Path) -> Iterator[None]:
        """Makes an error a problem of a file or record."""
        try:
            yield
        except TunesmithError as error:
            self.problem(path, error.what)
        except OSError as error:
            self.problem(path, f"cannot be read: {error.strerror}")
        except KeyError as error:
            self.problem(path, f"no record {error}")


def _check_records(findings: _Findings, release: Release) -> dict[str, Record]:
    """The version's ancestors, each verified against its digest. They must be exactly those that the version states."""
    records: dict[str, Record] = {}
    waiting = [release.version.digest]
    while waiting:
        digest = waiting.pop()
        if digest in records:
            continue
        with findings.about(digest), findings.about(findings.store.record_where(digest)):
            records[digest] = findings.store.record(digest, cached=False)
            findings.check_left(digest, records[digest].kind, release.version.digest)
            findings.checked += 1
            findings.seen.add(digest)
            findings.seen.add(findings.left_of(digest)[0])
            waiting += records[digest].parents.values()
    records.pop(release.version.digest, None)
    if not findings.problems:
        folder = findings.store.version_folder(release.version.ref)
        odd = [f"record {short(each)}" for each in sorted(records.keys() ^ set(release.statement.records))]
        stated = set(release.statement.blobs)
        odd += [f"blob {short(each)}" for each in sorted(blobs_of(records.values()) ^ stated)]
        for what in odd:
            findings.problem(folder / RELEASE, f"{what} is in the lineage or in the release, but not in both")
    return records


def _check_blobs(findings: _Findings, records: Mapping[str, Record], version: str) -> None:
    """Verify every blob against its digest, and the row counts of datasets against their records."""
    lines: dict[str, int] = {}
    for record in records.values():
        for name, blob in record.blobs.items():
            with findings.about(findings.store.blob_where(blob)):
                findings.check_left(blob, name, version)
    for digest in sorted(blobs_of(records.values())):
        with findings.about(digest), findings.about(findings.store.blob_where(digest)):
            actual, count = _digest_and_lines(findings.store.blob_pieces(digest))
            whole, erased = (digest, 0) if actual == digest else findings.left_of(digest)
            lines[digest] = count + erased
            findings.checked += 1
            if actual != whole:
                raise Refused("its bytes do not match its digest")
            findings.seen |= {digest, whole}
    for name, record in records.items():
        if record.kind == "dataset":
            where = findings.store.record_where(name)
            with findings.about(where):
                for split, count in DatasetBody.of(record).splits.items():
                    there = lines.get(record.blobs.get(f"{split}.jsonl", ""))
                    if there is not None and there != count:
                        findings.problem(where, f"says {count} rows in {split}, there are {there}")


def _check_evidence(findings: _Findings, release: Release, records: Mapping[str, Record]) -> None:
    """Verify that the verdict passes this candidate, on the evaluation that measured it, and with its adapter."""
    version = release.version
    if not set(release.statement.records) <= records.keys():
        return  # the missing records are reported already
    with findings.about(findings.store.version_folder(version.ref) / RELEASE):
        check_evidence(records, release.record.parents, version.override)
        weights = {name: digest for name, digest in release.record.blobs.items() if name != NOTICE}
        if release.statement.duties != carried(records, version.candidate):
            raise Refused("its duties are not those of its rows' licences")
        if weight_blobs(records, version.candidate) != weights:
            raise Refused("the adapter is not the candidate's")
        base = records[version.candidate].parents["base"]
        stated = (release.statement.base, release.statement.fingerprint)
        if stated != (base, BaseBody.of(records[base]).fingerprint):
            raise Refused("the release states another base or rendering than the candidate's")
        if version.marks != marks_of(records, version.candidate):
            raise Refused("the release does not state the marks of its training")
    if version.evaluation in findings.seen and not findings.problems:  # damaged scores are reported already
        with findings.about(findings.store.record_where(version.verdict)):
            for gate, what in check_replay(findings.store, version.verdict).items():
                findings.notes.append(f"its gate {gate} is no longer computed: {what} was removed")
    findings.notes.extend(f"it was {mark}" for mark in version.marks)
    if version.override is not None:
        findings.notes.append(f"its verdict is not a pass; it was overridden: {version.override}")


def _check_base(findings: _Findings, records: Mapping[str, Record], digest: str, folder: Path | None) -> None:
    """Verify the base model's files, which are outside the store."""
    if digest not in records:
        return
    folder = folder or known_folder(findings.store, digest)
    if folder is None or not folder.is_dir():
        findings.notes.append("the base model's files were not found and not checked: give their folder")
        return
    for name, file in BaseBody.of(records[digest]).files.items():
        path = folder / name
        with findings.about(path):
            whole = digest_file(path) == file.digest
            findings.checked += 1
            if not whole:
                raise Refused("its bytes differ from the base model that this version was evaluated on")
    findings.notes.append(f"the base model's files were checked in {folder}")


def _sweep(findings: _Findings) -> tuple[list[Record], list[Record]]:
    """Verify every other blob and record of the store against its digest; returns the approvals and the papers."""
    found: dict[str, list[Record]] = {"approval": [], "paper": []}
    for kind, suffix in (("blobs", ""), ("records", ".json")):
        for key in findings.store.blobs.keys(f"{kind}/"):
            name = key.rsplit("/", 1)[-1]
            digest = f"sha256:{name.removesuffix(suffix)}"
            if not is_digest(digest) or key != f"{kind}/{digest[7:9]}/{digest[7:]}{suffix}":
                findings.problem(findings.store.blobs.where(key), "not a file that belongs here")
                continue
            if digest in findings.seen:
                continue
            where, pieces = findings.store.blobs.where(key), findings.store.blobs.pieces(key)
            with findings.about(where):
                if kind == "records":
                    record = decode(b"".join(pieces), digest, where)
                    found.get(record.kind, []).append(record)
                elif digest_pieces(pieces) != digest:
                    raise Refused("its bytes do not match its digest")
                findings.checked += 1
    return found["approval"], found["paper"]


def _check_papers(findings: _Findings, release: Release, papers: Sequence[Record], keys: Sequence[TrustedKey]) -> None:
    """Add notes about the papers of this version. Without one its files are no worse."""
    for record in papers:
        if record.parents.get("version") == release.version.digest:
            try:
                body = read_paper(findings.store, record, release.version, keys)
            except TunesmithError as error:
                findings.notes.append(f"a paper does not count: {error.what}")
            else:
                findings.notes.append(f"paper {body.line}")


def _check_approvals(
    findings: _Findings, release: Release, approvals: Sequence[Record], keys: Sequence[TrustedKey]
) -> None:
    """Add notes about who approved or refused this version. Without an approval its files are no worse."""
    counted: list[ApprovalBody] = []
    for record in approvals:
        if record.parents.get("version") != release.version.digest:
            continue
        try:
            envelope = findings.store.read_blob(record.blobs.get(ENVELOPE, ""))
            approval = read_approval(record, envelope, release.version, release.signer, keys)
        except TunesmithError as error:
            findings.notes.append(f"an approval does not count: {error.what}")
            continue
        counted.append(approval)
    # By the entry of the audit log that each was signed after: a clock may be wrong.
    counted.sort(key=lambda approval: approval.audit.seq)
    for approval in counted:
        said = "approved" if approval.decision == "approve" else f"refused ({approval.reason})"
        findings.notes.append(f"{said} by {approval.approver} on {approval.at}")
    people: dict[str, Sequence[str]] = {}
    roles = {key.user: key.roles for key in keys}
    for approval in counted:
        people = people | {approval.approver: roles[approval.approver]} if approval.decision == "approve" else {}
    if not people:
        findings.notes.append("no approval in this store counts")
    if release.version.risk is not None:
        needed = " and ".join(missing(release.version.risk, people)) or "nothing more"
        findings.notes.append(f"its risk class is {release.version.risk.risk_class}; it needs {needed}")


def _digest_and_lines(pieces: Iterable[bytes]) -> tuple[str, int]:
    hasher, lines = hashlib.sha256(), 0
    for piece in pieces:
        hasher.update(piece)
        lines += piece.count(b"\n")
    return f"sha256:{hasher.hexdigest()}", lines

"""A record: what one stage of the chain states, as canonical JSON that never changes. Its digest is its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ValidationError, model_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.values import Frozen
from tunesmith.store.tables import EdgeRow, RecallRow

_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "model.safetensors")


class RecordKind(NamedTuple):
    """What a kind of record may hold.

    made_by: the module that makes it; "" where only earlier versions did. parents: roles; `answers:NAME` stands for
    every role that begins with `answers:`. blobs: file names.
    """

    made_by: str
    parents: tuple[str, ...]
    blobs: tuple[str, ...]


# Every kind of record. A record with another kind, role or file name is refused; `records/` has a model of
# each body; the documentation is made from both.
KINDS: Mapping[str, RecordKind] = {
    "base": RecordKind("models/base.py", (), ()),
    "dataset": RecordKind(
        "data/building/build.py",
        (),
        ("train.jsonl", "validation.jsonl", "test.jsonl", "removed.jsonl", "outside.jsonl", "subjects.jsonl"),
    ),
    "signoff": RecordKind("data/building/signoff.py", ("dataset",), ()),
    "quality": RecordKind("data/quality/flags.py", ("dataset",), ("flags.jsonl",)),
    "documents": RecordKind("data/documents.py", (), ("passages.jsonl",)),
    "training": RecordKind("training/train.py", ("base", "dataset", "documents"), _WEIGHTS),
    "search": RecordKind("candidates/optimise.py", ("base", "dataset", "documents"), ("answers.jsonl",)),
    "training_search": RecordKind("pipeline/training_search.py", ("base", "dataset", "documents"), ("trials.jsonl",)),
    "candidate": RecordKind("candidates/candidate.py", ("base", "dataset", "training", "documents", "search"), ()),
    "answers": RecordKind(
        "candidates/asking.py",
        ("candidate", "dataset", "base", "training", "answers"),
        ("answers.jsonl", "items.jsonl"),
    ),
    "evaluation": RecordKind(
        "evaluation/evaluate.py",
        (
            "dataset",
            "answers:NAME",
            "probe:NAME",
            "risk:SUITE:NAME",
            "before:SUITE:NAME",
            "judged:METRIC:NAME",
            "policy:NAME",
            "policy-judged:CHECK:NAME",
            "style",
        ),
        ("scores.jsonl", "measurements.jsonl", "labels.jsonl", "policy.jsonl", "style.jsonl"),
    ),
    "verdict": RecordKind("evaluation/gates/verdict.py", ("evaluation", "candidate"), ()),
    "version": RecordKind("registry/registration.py", ("candidate", "evaluation", "verdict"), (*_WEIGHTS, "NOTICE.md")),
    "export": RecordKind("registry/export.py", ("version",), ()),
    "approval": RecordKind("registry/approvals.py", ("version",), ("envelope.json",)),
    "paper": RecordKind(
        "registry/papers/writing.py",
        ("version",),
        ("card.md", "bom.json", "provenance.intoto.jsonl", "ai-act.md", "papers.yaml", "envelope.json"),
    ),
    # Of earlier versions, for their stores to open and verify.
    "curve": RecordKind("", ("base", "dataset", "documents", "candidate:NAME"), ("scores.jsonl",)),
    "forecast": RecordKind("", ("dataset", "answers:NAME", "subset:ROWS"), ()),
}


class Record(Frozen):
    """One stage's result.

    kind: a key of KINDS. parents: role -> digest of another record. blobs: file name -> digest of its bytes.
    body: what the stage states, JSON. The record's digest is that of its canonical JSON.
    """

    kind: str
    parents: Mapping[str, str] = {}
    blobs: Mapping[str, str] = {}
    body: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _of_its_kind(self) -> Record:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise ValueError(f"{self.kind!r} is not a kind of record")
        roles = {role.split(":")[0] + ":" * (":" in role) for role in kind.parents}
        for role in self.parents:
            if role not in roles and role.split(":")[0] + ":" not in roles:
                raise ValueError(f"a {self.kind} record has no parent in the role {role!r}")
        for name in self.blobs:
            if name not in kind.blobs:
                raise ValueError(f"a {self.kind} record has no file {name!r}")
        return self

    @cached_property
    def encoded(self) -> bytes:
        """Canonical bytes."""
        return canonical(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """The record's name: of the bytes that it was made with, also where an erasure rewrote it since."""
        return digest_bytes(self.encoded)


def decode(data: bytes, digest: str, where: str, parse: Callable[[bytes], Any] = parse_json) -> Record:
    """Read a record's bytes. Raises Refused if they do not have the digest or are not a record."""
    if digest_bytes(data) != digest:
        raise Refused("the record's bytes do not have its digest", where=where, fix="restore it from a backup")
    try:
        return Record.model_validate(parse(data))
    except (ValidationError, ValueError) as error:
        raise Refused(f"not a record: {error}", where=where, fix="restore it from a backup") from error


def ancestors(read: Callable[[str], Record], digests: Iterable[str]) -> dict[str, Record]:
    """Digest -> record, for the given records and all their ancestors.

    read: gives the record of a digest, as Store.record does, which verifies it and needs no database.
    """
    known: dict[str, Record] = {}
    waiting = list(digests)
    while waiting:
        digest = waiting.pop()
        if digest not in known:
            known[digest] = read(digest)
            waiting += known[digest].parents.values()
    return known


def blobs_of(records: Iterable[Record]) -> set[str]:
    """The digests of every blob that the records name."""
    return {digest for record in records for digest in record.blobs.values()}


def recalls_of(session: Session, digests: Collection[str], *, as_evidence: bool = True) -> dict[str, str]:
    """Digest -> why a record was recalled, the oldest reason if there are several; only those that were. One query.

    as_evidence: ignore recalls of a version and of a base. A candidate that was only compared with that version, or
    with one on that base, does not contain its weights.
    """
    query = select(RecallRow.digest, RecallRow.reason).where(RecallRow.digest.in_(digests))
    if as_evidence:
        query = query.where(~RecallRow.cause.startswith("version "), ~RecallRow.cause.startswith("base "))
    newest_first = query.order_by(RecallRow.at.desc(), RecallRow.cause.desc())
    return {digest: reason for digest, reason in session.execute(newest_first)}  # noqa: C416 - rows are no pairs


def recalled(session: Session, digest: str) -> str | None:
    """Why a record was recalled, or None if it was not."""
    return recalls_of(session, [digest], as_evidence=False).get(digest)


def first_recalled(session: Session, digests: Collection[str], own: Collection[str]) -> tuple[str, str] | None:
    """The first of some records that was recalled as evidence, and why; None if none was.

    own: those of them for which recalls of a version and of a base count, too.
    """
    reasons = recalls_of(session, digests) | recalls_of(session, own, as_evidence=False)
    return next(((digest, reasons[digest]) for digest in digests if digest in reasons), None)


def ancestor_recalled(session: Session, digest: str) -> str | None:
    """Why a record that this one was made from was recalled as evidence (see `recalls_of`), or None if none was."""
    above, waiting = set[str](), {digest}
    while waiting:
        above |= waiting
        waiting = set(session.scalars(select(EdgeRow.parent).where(EdgeRow.child.in_(waiting)))) - above
    return next(iter(recalls_of(session, sorted(above - {digest})).values()), None)


def causes(session: Session) -> dict[str, list[str]]:
    """Cause, such as `licence CC-BY-NC-4.0` -> digests of the records that it reached. Sorted by cause."""
    reached: dict[str, list[str]] = {}
    for cause, digest in session.execute(select(RecallRow.cause, RecallRow.digest).order_by(RecallRow.cause)):
        reached.setdefault(cause, []).append(digest)
    return reached

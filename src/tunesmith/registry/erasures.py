"""Signed statements of erasures, kept beside the blobs: what was rewritten or deleted, by digests and ids, no text.

Whoever confirms an erasure signs its statement. The database knows which blob stands for which one; a verifier without
it believes the statements that a trusted key signed. A database that was put back knows no erasure since: the
statements are how the erasure is done again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Literal, NamedTuple

from pydantic import ValidationError

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.values import Digest, Frozen
from tunesmith.data.dataset import REMOVED, SPLITS, SUBJECTS
from tunesmith.data.documents import PASSAGES
from tunesmith.registry.signing.attestations import ENVELOPE, open_envelope, stated
from tunesmith.registry.signing.signatures import check_may_sign
from tunesmith.store.blobs import BlobStore
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.store import ERASURES

PLAN, CONFIRM = "erase.plan", "erase.confirm"  # the actions, and who may sign
_PLAN_KIND, _KIND = "urn:tunesmith:erasure-plan:v1", "urn:tunesmith:erasure:v1"
SIGNATURE = "signature"  # of a plan, the key under which it keeps its planner's envelope
ROW_FILES = {*(f"{split}.jsonl" for split in SPLITS), REMOVED, SUBJECTS, PASSAGES}
WEIGHTS = {"adapter_model.safetensors", "model.safetensors"}
_PAPERS = {"card.md", "bom.json", "provenance.intoto.jsonl", "ai-act.md", "papers.yaml", ENVELOPE}
UNCUT = ("version", "approval", "paper", "base")  # kinds of records that state no text, most under signatures
_NOTHING = digest_bytes(b"")


class Replaced(Frozen):
    """A blob or record that was rewritten: old and new digest. rows: ids of the lines that were left out; cut: places
    of strings that were cut; of weights that were deleted neither."""

    kind: Literal["blob", "record"] = "blob"
    name: str
    old: Digest
    new: Digest
    rows: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether an erasure may do this: lines leave files of rows, strings are cut in evidence and in records that
        are not signed, and weights and papers go whole. Nothing else of what decides or serves changes."""
        if self.kind == "record":
            return bool(self.cut) and not self.rows and self.name not in UNCUT
        if self.rows or self.cut:
            fits = self.name in ROW_FILES if self.rows else self.name.endswith(".jsonl") and self.name not in ROW_FILES
            return fits and not (self.rows and self.cut)
        return self.new == _NOTHING and self.name in WEIGHTS | _PAPERS


class ErasureStatement(Frozen):
    """What an erasure did. number, plan: what was planned and shown. rows: ids of erased rows and passages. deleted:
    keys of kept requests and uploaded files; entries: table -> keys of rows of the database; versions: labels of those
    whose folder was deleted, with their digests; recalled: records that were made from the rows."""

    number: int
    cause: str
    reason: str
    planned_by: str
    confirmed_by: str
    at: str
    plan: JsonObject
    rows: tuple[str, ...]
    replaced: tuple[Replaced, ...]
    deleted: tuple[str, ...]
    entries: Mapping[str, tuple[tuple[str | int, ...], ...]]
    versions: Mapping[str, Digest]
    recalled: tuple[Digest, ...]

    @property
    def said(self) -> str:
        """`erased on 2026-01-31 by ann`."""
        return f"erased on {self.at[:10]} by {self.confirmed_by}"

    @property
    def noted(self) -> str:
        """What it did, in a line."""
        return f"{self.cause} was {self.said}, rows: {len(self.rows)}"

    @property
    def key(self) -> str:
        """Where its envelope is kept."""
        return f"{ERASURES}{self.number}.json"


class Signed(NamedTuple):
    """A statement that a trusted key signed. fingerprint: the key's; digest: of the envelope. planner: both of the
    plan; None where the log recorded it before planners signed."""

    statement: ErasureStatement
    fingerprint: str
    digest: str
    planner: tuple[str, str] | None = None


class Erasures(NamedTuple):
    """The erasures of a store, oldest first. problems: key -> why what is kept there does not count."""

    signed: tuple[Signed, ...] = ()
    problems: Mapping[str, str] = {}

    @property
    def replaced(self) -> dict[str, tuple[Replaced, ErasureStatement]]:
        """Old digest -> what is left of it, and by which erasure."""
        return {one.old: (one, each.statement) for each in self.signed for one in each.statement.replaced}


def plan_statement(number: int, cause: str, reason: str, planned_by: str, plan: JsonObject) -> JsonObject:
    """The in-toto statement that a planner signs: everything that the second person is shown."""
    shown = {key: value for key, value in plan.items() if key not in (SIGNATURE, "locked")}
    predicate = {"number": number, "cause": cause, "reason": reason, "planned_by": planned_by, "plan": shown}
    return stated({f"plan of erasure {number}": digest_bytes(cause.encode())}, _PLAN_KIND, predicate)


def statement_of(erasure: ErasureStatement) -> JsonObject:
    """The in-toto statement that is signed."""
    predicate = erasure.model_dump(mode="json")
    return stated({f"erasure {erasure.number}": digest_bytes(erasure.cause.encode())}, _KIND, predicate)


def read_erasures(blobs: BlobStore, keys: Sequence[TrustedKey]) -> Erasures:
    """Every erasure of a store, verified. keys: all trusted ones, those of deactivated users too."""
    signed: list[Signed] = []
    problems: dict[str, str] = {}
    for key in blobs.keys(ERASURES):
        try:
            signed.append(read_erasure(blobs.get(key), keys, key))
        except Refused as error:
            problems[key] = error.what
    return Erasures(tuple(_ordered(signed)), problems)


def _ordered(signed: Sequence[Signed]) -> list[Signed]:
    """Each after those whose left blobs and records it rewrote again, whatever the clocks said."""
    made = defaultdict[str, set[int]](set)
    for number, each in enumerate(signed):
        for one in each.statement.replaced:
            made[one.new].add(number)
    before = {
        number: set().union(*(made[one.old] for one in each.statement.replaced)) for number, each in enumerate(signed)
    }
    try:
        return [signed[number] for number in TopologicalSorter(before).static_order()]
    except CycleError as error:
        raise Refused(
            "erasures replace each other's blobs in a circle", where=ERASURES, fix="ask who signed them"
        ) from error


def read_erasure(raw: bytes, keys: Sequence[TrustedKey], key: str) -> Signed:
    """One erasure, verified. key: where it is kept. Raises Refused for one that does not count."""
    statement, by = open_envelope(raw, keys, key)
    try:
        erasure = ErasureStatement.model_validate(statement["predicate"])
    except (KeyError, TypeError, ValidationError) as error:
        raise Refused("not an erasure's statement", where=key) from error
    if statement != statement_of(erasure) or erasure.key != key or erasure.confirmed_by != by.user:
        raise Refused("not an erasure's statement under its number, by the one who signed it", where=key)
    digest, planner = digest_bytes(raw), None
    # One that the log recorded before planners signed has one signature.
    if SIGNATURE in erasure.plan or digest not in by.signed:
        planner = read_plan(erasure.number, erasure.cause, erasure.reason, erasure.planned_by, erasure.plan, keys)
    check_may_sign(by, CONFIRM, digest, key, apart_from=planner, stands=True)
    rows, beyond = set(erasure.rows), set(erasure.rows) - set(erasure.plan.get("rows", ()))
    beyond |= erasure.versions.keys() - set(erasure.plan.get("versions", ()))
    if erasure.planned_by == by.user or beyond:
        raise Refused(f"{by.user} confirmed what {erasure.planned_by} did not plan", where=key)
    for one in erasure.replaced:
        if not one.allowed or not rows.issuperset(one.rows):
            raise Refused(f"it replaces {one.kind} {one.name}, which no erasure may change so", where=key)
    of_plan = None if planner is None else (planner.fingerprint, digest_bytes(str(erasure.plan[SIGNATURE]).encode()))
    return Signed(erasure, by.fingerprint, digest, of_plan)


def read_plan(
    number: int, cause: str, reason: str, planned_by: str, plan: JsonObject, keys: Sequence[TrustedKey]
) -> TrustedKey:
    """The key that signed a plan, in `plan` itself. Raises Refused where it is not signed by who planned it."""
    where = f"plan of erasure {number}"
    if SIGNATURE not in plan:
        fix = NextStep("have its planner sign it", "erase confirm")
        raise Refused(f"{planned_by} has not signed it", where=where, fix=fix)
    raw = str(plan[SIGNATURE]).encode()
    statement, by = open_envelope(raw, keys, where)
    if by.user != planned_by or statement != plan_statement(number, cause, reason, planned_by, plan):
        raise Refused("not what its planner signed", where=where)
    check_may_sign(by, PLAN, digest_bytes(raw), where, stands=True)
    return by

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
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.values import Digest, Frozen
from tunesmith.registry.signing.attestations import open_envelope, stated
from tunesmith.registry.signing.signatures import check_in_time
from tunesmith.store.blobs import BlobStore
from tunesmith.store.people.roles import permits
from tunesmith.store.people.trust import TrustedKey
from tunesmith.store.store import ERASURES

CONFIRM = "erase.confirm"  # the action, and who may sign
_KIND = "urn:tunesmith:erasure:v1"


class Replaced(Frozen):
    """A blob or record that was rewritten: old and new digest. rows: ids of the lines that were left out; cut: places
    of strings that were cut; of weights that were deleted neither."""

    kind: Literal["blob", "record"] = "blob"
    name: str
    old: Digest
    new: Digest
    rows: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


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
    """A statement that a trusted key signed. fingerprint: the key's; digest: of the envelope."""

    statement: ErasureStatement
    fingerprint: str
    digest: str


class Erasures(NamedTuple):
    """The erasures of a store, oldest first. problems: key -> why what is kept there does not count."""

    signed: tuple[Signed, ...] = ()
    problems: Mapping[str, str] = {}

    @property
    def replaced(self) -> dict[str, tuple[Replaced, ErasureStatement]]:
        """Old digest -> what is left of it, and by which erasure."""
        return {one.old: (one, each.statement) for each in self.signed for one in each.statement.replaced}


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
        raise Refused("erasures replace each other's blobs in a circle", where=ERASURES, fix="ask who signed them") from error


def read_erasure(raw: bytes, keys: Sequence[TrustedKey], key: str) -> Signed:
    """One erasure, verified. key: where it is kept. Raises Refused for one that does not count."""
    statement, by = open_envelope(raw, keys, key)
    try:
        erasure = ErasureStatement.model_validate(statement["predicate"])
    except (KeyError, TypeError, ValidationError) as error:
        raise Refused("not an erasure's statement", where=key) from error
    if statement != statement_of(erasure) or erasure.key != key or erasure.confirmed_by != by.user:
        raise Refused("not an erasure's statement under its number, by the one who signed it", where=key)
    check_in_time(by, digest := digest_bytes(raw), key)
    # A role that was taken away since does not count: the log says that it was there.
    if erasure.planned_by == by.user or not (digest in by.signed or permits(by.roles, CONFIRM)):
        raise Refused(f"{by.user} may not confirm it", where=key)
    return Signed(erasure, by.fingerprint, digest)

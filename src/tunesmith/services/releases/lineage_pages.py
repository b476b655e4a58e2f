"""What the console shows of a version's lineage: the picture, one of its records, and the rows of a dataset.

A person of one tenant or region sees the records of the versions that they may see, and not what else was made from
them; a person who acts for all sees everything that was made from a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.registry.lineage import ancestors, summary_line
from tunesmith.registry.signing.release import Version
from tunesmith.store.people.identities import User
from tunesmith.store.records import Record
from tunesmith.store.store import Store

ROWS = 50
_MOST = 100  # descendants of a record that are listed


class Placed(View):
    """A record in the picture. column: 0 is the oldest; row: its place in the column. parents: their digests."""

    digest: str
    kind: str
    says: str
    column: int
    row: int
    parents: tuple[str, ...]


class Picture(View):
    """A version's lineage: what it was made from in columns to the left, what was made from it to the right."""

    records: tuple[Placed, ...]
    columns: int
    rows: int


class Related(View):
    """A record that another one names, or that names it, under a role."""

    role: str
    digest: str
    kind: str
    says: str


class RecordDetails(View):
    """One record. facts: the plain values of its body; sources: of a dataset; further: how many more were made from it
    than are listed.
    """

    digest: str
    kind: str
    says: str
    facts: dict[str, str]
    blobs: dict[str, str]
    sources: tuple[dict[str, Any], ...]
    licences: dict[str, int]
    made_from: tuple[Related, ...]
    used_for: tuple[Related, ...]
    further: int


class DatasetRow(View):
    """Where a row comes from, and under which licence; never its text."""

    id: str
    split: str
    source: str
    licence: str
    group: str


class OriginPage(View):
    """A page of a dataset's rows."""

    rows: tuple[DatasetRow, ...]
    total: int
    page: int
    pages: int


def picture(store: Store, version: Version) -> Picture:
    """The lineage of a version, placed in columns."""
    records = ancestors(store, [version.digest])
    after = {digest: store.record(digest) for _, _, digest in store.children(version.digest)[:_MOST]}
    depth: dict[str, int] = {}
    _deepen(records, version.digest, 0, depth)
    columns = max(depth.values()) + 1
    taken: dict[int, int] = {}
    placed = []
    order = sorted(records, key=lambda digest: (-depth[digest], records[digest].kind, digest))
    for digest, record in [*((one, records[one]) for one in order), *after.items()]:
        column = columns - 1 - depth[digest] if digest in records else columns
        row = taken.get(column, 0)
        taken[column] = row + 1
        placed.append(
            Placed(
                digest=digest,
                kind=record.kind,
                says=summary_line(record),
                column=column,
                row=row,
                parents=tuple(dict.fromkeys(parent for parent in record.parents.values() if parent in records)),
            )
        )
    return Picture(records=tuple(placed), columns=columns + bool(after), rows=max(taken.values()))


def record_details(store: Store, user: User, version: Version, digest: str) -> RecordDetails | None:
    """A record of a version's lineage; None for one that the user may not see."""
    own = _own(store, version)
    everything = user.scope == Scope()
    if digest not in own and not (everything and store.has_record(digest)):
        return None
    record = store.record(digest)
    below = [(role, kind, child) for role, kind, child in store.children(digest) if everything or child in own]
    body = record.body
    return RecordDetails(
        digest=digest,
        kind=record.kind,
        says=summary_line(record),
        facts={
            key: str(value)
            for key, value in sorted(body.items())
            if isinstance(value, str | int | float | bool) and value != ""
        },
        blobs=dict(record.blobs),
        sources=tuple(dict(one) for one in body.get("sources", ())) if record.kind == "dataset" else (),
        licences={str(name): int(count) for name, count in body.get("licences", {}).items()}
        if record.kind == "dataset"
        else {},
        made_from=tuple(_related(store, role, parent) for role, parent in sorted(record.parents.items())),
        used_for=tuple(_related(store, role, child) for role, _, child in below[:_MOST]),
        further=max(0, len(below) - _MOST),
    )


def dataset_rows(
    store: Store, user: User, version: Version, digest: str, *, split: str = "train", text: str = "", page: int = 1
) -> OriginPage | None:
    """A page of the rows of a dataset in a version's lineage; None for one that the user may not see.

    text: a part of the id, source, licence or group. Rows of another tenant or region are left out.
    """
    found = record_details(store, user, version, digest)
    if found is None or found.kind != "dataset" or split not in SPLITS:
        return None
    rows = [
        DatasetRow(id=row.id, split=split, source=row.source, licence=row.licence, group=row.group)
        for row in load_dataset(store, digest).examples(split)
        if user.scope.covers(Scope(row.tenant or user.scope.tenant, row.region or user.scope.region))
    ]
    if text:
        rows = [row for row in rows if any(text in part for part in (row.id, row.source, row.licence, row.group))]
    shown = rows[(page - 1) * ROWS : page * ROWS]
    return OriginPage(rows=tuple(shown), total=len(rows), page=page, pages=max(1, -(-len(rows) // ROWS)))


def _own(store: Store, version: Version) -> set[str]:
    """A version, what it was made from, and what was made from it directly: its decisions and exports."""
    own = set(ancestors(store, [version.digest]))
    return own | {digest for _, _, digest in store.children(version.digest)}


def _deepen(records: Mapping[str, Record], digest: str, at: int, depth: dict[str, int]) -> None:
    """Give each record the length of the longest way from it to the version."""
    if depth.get(digest, -1) >= at:
        return
    depth[digest] = at
    for parent in records[digest].parents.values():
        _deepen(records, parent, at + 1, depth)


def _related(store: Store, role: str, digest: str) -> Related:
    record = store.record(digest)
    return Related(role=role, digest=digest, kind=record.kind, says=summary_line(record))

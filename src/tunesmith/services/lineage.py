"""What a version was made from, and what was made from it: its records, one of them, and the rows of a dataset.

A person of one tenant or region sees the records of the versions that they may see, and not what else was made from
them; a person who acts for all sees everything that was made from a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter

from tunesmith.core.errors import NotThere
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.records.dataset import DatasetBody, ReadSource
from tunesmith.registry.lineage import Node, ancestors, summary_line, tree
from tunesmith.registry.signing.release import Version
from tunesmith.registry.versions import load_version, resolve
from tunesmith.services.decisions import approvals_for
from tunesmith.store.people.identities import User
from tunesmith.store.records import Record
from tunesmith.store.store import Store

ROWS = 50
_MOST = 100  # descendants of a record that are listed


class Related(View):
    """A record that another one names, or that names it, under a role. at: when it was made, None if not known."""

    role: str
    digest: str
    kind: str
    says: str
    at: str | None


class LineageRecord(View):
    """A record of a lineage, with those that it was made from. at: when it was made, None if not known."""

    digest: str
    kind: str
    says: str
    at: str | None
    made_from: tuple[Related, ...]


class Lineage(View):
    """A version, what it was made from, and what was made from it directly. Each record comes after its parents."""

    records: tuple[LineageRecord, ...]


class RecordDetails(View):
    """One record. facts: the plain values of its body; sources: of a dataset; further: how many more were made from it
    than are listed.
    """

    digest: str
    kind: str
    says: str
    facts: dict[str, str]
    blobs: dict[str, str]
    sources: tuple[ReadSource, ...]
    licences: Mapping[str, int]
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


def show(store: Store, what: str, *, scope: Scope = Scope()) -> Node:
    """The lineage of a version or of any record, named by the start of its digest; a version's approvals too."""
    digest = resolve(store, what, scope=scope).digest if "@" in what else store.find_record(what)
    node = tree(store, digest)
    if node.kind != "version":
        return node
    return node.model_copy(update={"approvals": approvals_for(store, load_version(store, digest))})


def lineage(store: Store, version: Version) -> Lineage:
    """The lineage of a version."""
    records = ancestors(store, [version.digest])
    graph = {digest: record.parents.values() for digest, record in records.items()}
    after = [digest for _, _, digest in store.children(version.digest)[:_MOST]]
    digests = [*TopologicalSorter(graph).static_order(), *after]
    times = store.times_of(digests)
    return Lineage(records=tuple(_listed(store, each, times) for each in digests))


def record_details(store: Store, user: User, version: Version, digest: str) -> RecordDetails:
    """A record of a version's lineage. Raises NotThere for one that the user may not see."""
    own = _own(store, version)
    everything = user.scope == Scope()
    if digest not in own and not (everything and store.has_record(digest)):
        raise NotThere("there is no such record of this version")
    record = store.record(digest)
    below = [(role, kind, child) for role, kind, child in store.children(digest) if everything or child in own]
    dataset = DatasetBody.of(record) if record.kind == "dataset" else None
    times = store.times_of([*record.parents.values(), *(child for _, _, child in below[:_MOST])])
    return RecordDetails(
        digest=digest,
        kind=record.kind,
        says=summary_line(record),
        facts={
            key: str(value)
            for key, value in sorted(record.body.items())
            if isinstance(value, str | int | float | bool) and value != ""
        },
        blobs=dict(record.blobs),
        sources=dataset.sources if dataset else (),
        licences=dataset.licences if dataset else {},
        made_from=_parents(store, record, times),
        used_for=tuple(_related(store, role, child, times) for role, _, child in below[:_MOST]),
        further=max(0, len(below) - _MOST),
    )


def dataset_rows(
    store: Store, user: User, version: Version, digest: str, *, split: str = "train", text: str = "", page: int = 1
) -> OriginPage:
    """A page of the rows of a dataset in a version's lineage. Raises NotThere as `record_details`.

    text: a part of the id, source, licence or group. Rows of another tenant or region are left out.
    """
    if record_details(store, user, version, digest).kind != "dataset" or split not in SPLITS:
        raise NotThere("there are no such rows of this version")
    rows = [
        DatasetRow.of(row, split=split)
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


def _listed(store: Store, digest: str, times: Mapping[str, str]) -> LineageRecord:
    record = store.record(digest)
    parents, at = _parents(store, record, times), times.get(digest)
    return LineageRecord(digest=digest, kind=record.kind, says=summary_line(record), at=at, made_from=parents)


def _parents(store: Store, record: Record, times: Mapping[str, str]) -> tuple[Related, ...]:
    return tuple(_related(store, role, parent, times) for role, parent in sorted(record.parents.items()))


def _related(store: Store, role: str, digest: str, times: Mapping[str, str]) -> Related:
    record = store.record(digest)
    return Related(role=role, digest=digest, kind=record.kind, says=summary_line(record), at=times.get(digest))

"""The lineage of records: what a version was made from, and what was made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from tunesmith.core.digests import short
from tunesmith.core.errors import NotThere, Refused
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Omitted, Page, View
from tunesmith.data.dataset import SPLITS, load_dataset
from tunesmith.records.body import bodies
from tunesmith.records.dataset import DatasetBody, ReadSource
from tunesmith.registry.holds import Held, held_versions
from tunesmith.registry.papers.writing import PaperState, papers_of
from tunesmith.registry.risk import Approvals
from tunesmith.registry.signing.release import Version
from tunesmith.registry.versions import load_version, resolve
from tunesmith.services.actions import Acting
from tunesmith.services.versions import approvals_for
from tunesmith.store.records import Record, ancestors
from tunesmith.store.store import Store

ROWS = 50
_MOST = 100  # descendants of a record that are listed


class NamedRecord(View):
    """A record, and what distinguishes it from others of its kind."""

    digest: str
    kind: str
    says: str


class Node(NamedRecord):
    """A record in a lineage. role: its role as a parent of the record below it.

    parents or children: the records further up or down; the first node has both, and body and blobs as well. seen:
    the record also appears elsewhere in the tree, and its parents or children are listed only there. approvals, papers,
    held: of the first node, if it is a version.
    """

    role: str
    short: str
    seen: Omitted[bool] = None
    body: Omitted[dict[str, Any]] = None
    blobs: Omitted[dict[str, str]] = None
    approvals: Omitted[Approvals] = None
    papers: Omitted[tuple[PaperState, ...]] = None
    held: Omitted[Held] = None
    parents: Omitted[tuple[Node, ...]] = None
    children: Omitted[tuple[Node, ...]] = None


class DatedRecord(NamedRecord):
    """Also when it was made; None if not known."""

    at: str | None


class Related(DatedRecord):
    """A record that another one names, or that names it, under a role."""

    role: str


class LineageRecord(DatedRecord):
    """A record of a lineage, with those that it was made from."""

    made_from: tuple[Related, ...]


class Lineage(View):
    """A version, what it was made from, and what was made from it directly. Each record comes after its parents."""

    records: tuple[LineageRecord, ...]


class RecordDetails(NamedRecord):
    """One record. facts: the plain values of its body; sources: of a dataset; further: how many more were made from it
    than are listed.
    """

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


class OriginPage(Page):
    """A page of a dataset's rows."""

    rows: tuple[DatasetRow, ...]


def summary_line(record: Record) -> str:
    """One line that distinguishes a record from others of its kind."""
    try:
        return bodies()[record.kind].of(record).line
    except Refused as error:
        return error.what


def tree(store: Store, what: str, *, scope: Scope = Scope()) -> Node:
    """A version or any record, named by the start of its digest, with its lineage nested; a version's approvals too."""
    digest = resolve(store, what, scope=scope).digest if "@" in what else store.find_record(what)
    record = store.record(digest)
    version = load_version(store, digest) if record.kind == "version" else None
    with store.reading() as session:
        held = held_versions(store, session).get(digest)
    return Node(
        **_named(digest, record),
        held=held,
        role="",
        short=short(digest),
        body=dict(record.body),
        blobs=dict(record.blobs),
        approvals=None if version is None else approvals_for(store, version),
        papers=None if version is None else papers_of(store, version),
        parents=_branch(store, digest, record, {digest}, "parents"),
        children=_branch(store, digest, record, {digest}, "children"),
    )


def _branch(store: Store, digest: str, record: Record, seen: set[str], side: str) -> tuple[Node, ...]:
    """The records on one side of a record, parents or children. seen: those that the tree lists already."""
    nodes = []
    links: Sequence[tuple[str, str]] = sorted(record.parents.items())
    if side == "children":
        links = [(role, child) for role, _, child in store.children(digest)]
    for role, other in links:
        there, again = store.record(other), other in seen
        seen.add(other)
        below: dict[str, Any] = {side: () if again else _branch(store, other, there, seen, side)}
        nodes.append(Node(**_named(other, there), role=role, short=short(other), seen=again, **below))
    return tuple(nodes)


def lineage(store: Store, version: Version) -> Lineage:
    """The lineage of a version."""
    records = ancestors(store.record, [version.digest])
    graph = {digest: record.parents.values() for digest, record in records.items()}
    after = [digest for _, _, digest in store.children(version.digest)[:_MOST]]
    digests = [*TopologicalSorter(graph).static_order(), *after]
    times = store.times_of(digests)
    return Lineage(records=tuple(_lineage_record(store, each, times) for each in digests))


def record_details(acting: Acting, version: Version, digest: str) -> RecordDetails:
    """A record of a version's lineage. Raises NotThere for one that the user may not see."""
    store, everything = acting.store, acting.user.scope.unlimited
    own = _own(store, version)
    if digest not in own and not (everything and store.has_record(digest)):
        raise NotThere("there is no such record of this version")
    record = store.record(digest)
    below = [(role, kind, child) for role, kind, child in store.children(digest) if everything or child in own]
    dataset = DatasetBody.of(record) if record.kind == "dataset" else None
    times = store.times_of([*record.parents.values(), *(child for _, _, child in below[:_MOST])])
    return RecordDetails(
        **_named(digest, record),
        facts={
            key: str(value)
            for key, value in sorted(record.body.items())
            if isinstance(value, str | int | float | bool) and value != ""
        },
        blobs=dict(record.blobs),
        sources=dataset.sources if dataset else (),
        licences=dataset.licences if dataset else {},
        made_from=_parents(store, record, times),
        used_for=tuple(_related(store, child, role, times) for role, _, child in below[:_MOST]),
        further=max(0, len(below) - _MOST),
    )


def dataset_rows(
    acting: Acting, version: Version, digest: str, *, split: str = "train", text: str = "", page: int = 1
) -> OriginPage:
    """A page of the rows of a dataset in a version's lineage. Raises NotThere as `record_details`.

    text: a part of the id, source, licence or group. Rows of another tenant or region are left out.
    """
    if record_details(acting, version, digest).kind != "dataset" or split not in SPLITS:
        raise NotThere("there are no such rows of this version")
    scope = acting.user.scope
    rows = [
        DatasetRow.of(row, split=split)
        for row in load_dataset(acting.store, digest).examples(split)
        if scope.covers(Scope(row.tenant or scope.tenant, row.region or scope.region))
    ]
    if text:
        rows = [row for row in rows if any(text in part for part in (row.id, row.source, row.licence, row.group))]
    at, shown = Page.cut(rows, page, ROWS)
    return OriginPage(**dict(at), rows=tuple(shown))


def _own(store: Store, version: Version) -> set[str]:
    """A version, what it was made from, and what was made from it directly: its decisions and exports."""
    own = set(ancestors(store.record, [version.digest]))
    return own | {digest for _, _, digest in store.children(version.digest)}


def _lineage_record(store: Store, digest: str, times: Mapping[str, str]) -> LineageRecord:
    record = store.record(digest)
    return LineageRecord(**_named(digest, record), at=times.get(digest), made_from=_parents(store, record, times))


def _parents(store: Store, record: Record, times: Mapping[str, str]) -> tuple[Related, ...]:
    return tuple(_related(store, digest, role, times) for role, digest in sorted(record.parents.items()))


def _related(store: Store, digest: str, role: str, times: Mapping[str, str]) -> Related:
    return Related(**_named(digest, store.record(digest)), at=times.get(digest), role=role)


def _named(digest: str, record: Record) -> dict[str, Any]:
    return {"digest": digest, "kind": record.kind, "says": summary_line(record)}

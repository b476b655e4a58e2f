"""Lineage: the records that a record was made from (ancestors), and those that were made from it (descendants)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from tunesmith.core.digests import short
from tunesmith.core.errors import Refused
from tunesmith.core.view import Omitted, View
from tunesmith.records.body import bodies
from tunesmith.registry.risk import Approvals
from tunesmith.store.records import Record
from tunesmith.store.store import Store


def ancestors(store: Store, digests: Iterable[str]) -> dict[str, Record]:
    """Digest -> record, for the given records and all their ancestors, each verified against its digest.

    Needs no database. Raises Refused if one is missing or damaged.
    """
    found: dict[str, Record] = {}
    waiting = list(digests)
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found[digest] = store.record(digest)
            waiting += found[digest].parents.values()
    return found


def blobs_of(records: Iterable[Record]) -> set[str]:
    """The digests of every blob that the records name."""
    return {digest for record in records for digest in record.blobs.values()}


def summary_line(record: Record) -> str:
    """One line that distinguishes a record from others of its kind."""
    try:
        return bodies()[record.kind].of(record).line
    except Refused as error:
        return error.what


class Node(View):
    """A record in a lineage. role: its role as a parent of the record below it; says: summary_line of the record.

    parents or children: the records further up or down; the first node has both, and body and blobs as well. seen:
    the record also appears elsewhere in the tree, and its parents or children are listed only there. approvals: of the
    first node, if it is a version.
    """

    role: str
    kind: str
    digest: str
    short: str
    says: str
    seen: Omitted[bool] = None
    body: Omitted[dict[str, Any]] = None
    blobs: Omitted[dict[str, str]] = None
    approvals: Omitted[Approvals] = None
    parents: Omitted[tuple[Node, ...]] = None
    children: Omitted[tuple[Node, ...]] = None


def tree(store: Store, digest: str) -> Node:
    """A record with the records that it was made from (parents) and those made from it (children), nested."""
    record = store.record(digest)
    return _node(
        "",
        digest,
        record,
        body=record.body,
        blobs=dict(record.blobs),
        parents=_branch(store, digest, record, {digest}, "parents"),
        children=_branch(store, digest, record, {digest}, "children"),
    )


def _branch(
    store: Store, digest: str, record: Record, seen: set[str], side: Literal["parents", "children"]
) -> tuple[Node, ...]:
    """The records on one side of a record. seen: those that the tree lists already."""
    nodes = []
    links = sorted(record.parents.items())
    if side == "children":
        links = [(role, child) for role, _, child in store.children(digest)]
    for role, other in links:
        there, again = store.record(other), other in seen
        seen.add(other)
        below = () if again else _branch(store, other, there, seen, side)
        nodes.append(_node(role, other, there, seen=again, **{side: below}))
    return tuple(nodes)


def _node(role: str, digest: str, record: Record, **more: Any) -> Node:
    return Node(role=role, kind=record.kind, digest=digest, short=short(digest), says=summary_line(record), **more)

"""The graph of records: what a record came of, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tunesmith.core.digests import short
from tunesmith.store.records import Record
from tunesmith.store.store import Store

# One line that tells a record from its siblings, by kind.
_SAYS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "base": lambda body: str(body.get("spec", "")),
    "dataset": lambda body: ", ".join(f"{name} {count}" for name, count in body.get("splits", {}).items()),
    "documents": lambda body: f"{body.get('passages', '?')} passages of {len(body.get('files', []))} documents",
    "search": lambda body: f"{len(body.get('tries', []))} tries of {body.get('rows', '?')} validation rows",
    "candidate": lambda body: str(body.get("name", "")),
    "training": lambda body: f"{body.get('steps', '?')} steps, loss {body.get('final_loss', '?')}",
    "answers": lambda body: f"{body.get('suite', '?')}, {body.get('n', '?')} answers",
    "evaluation": lambda body: f"{body.get('n', '?')} examples, {', '.join(sorted(body.get('candidates', {})))}",
    "verdict": lambda body: f"{body.get('name', '?')}: {body.get('verdict', '?')}",
    "version": lambda body: f"{body.get('name', '?')}@v{body.get('number', '?')}",
    "approval": lambda body: f"{body.get('decision', '?')} by {body.get('approver', '?')}",
    "export": lambda body: _export(body),
}


def ancestors(store: Store, digests: Iterable[str]) -> dict[str, Record]:
    """The named records and everything they came of, each read and held against its name. Needs no database.

    Raises Refused where one is missing or damaged.
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
    """Digests of every blob that records name."""
    return {digest for record in records for digest in record.blobs.values()}


def tells(record: Record) -> str:
    """One line that tells a record from its siblings."""
    return str(_SAYS.get(record.kind, lambda _: "")(record.body))


def tree(store: Store, digest: str) -> dict[str, Any]:
    """A record with its ancestors under `parents` and its descendants under `children`, nested, for `show`.

    A record that several paths reach is spelled out once and marked `seen` elsewhere.
    """
    record = store.record(digest)
    node = _node("", digest, record)
    node["body"], node["blobs"] = record.body, dict(record.blobs)
    node["parents"] = _up(store, record, {digest})
    node["children"] = _down(store, digest, {digest})
    return node


def _up(store: Store, record: Record, seen: set[str]) -> list[dict[str, Any]]:
    nodes = []
    for role, digest in sorted(record.parents.items()):
        parent = store.record(digest)
        node = _node(role, digest, parent)
        node["seen"] = digest in seen
        seen.add(digest)
        node["parents"] = [] if node["seen"] else _up(store, parent, seen)
        nodes.append(node)
    return nodes


def _down(store: Store, digest: str, seen: set[str]) -> list[dict[str, Any]]:
    nodes = []
    for role, _, child in store.children(digest):
        node = _node(role, child, store.record(child))
        node["seen"] = child in seen
        seen.add(child)
        node["children"] = [] if node["seen"] else _down(store, child, seen)
        nodes.append(node)
    return nodes


def _node(role: str, digest: str, record: Record) -> dict[str, Any]:
    return {"role": role, "kind": record.kind, "digest": digest, "short": short(digest), "says": tells(record)}


def _export(body: Mapping[str, Any]) -> str:
    figures = body["equality"]
    export, served, count = figures["export"], figures["served"], figures["probes"]
    allowed, served_allowed = body["tolerance"]["export"]["max"], body["tolerance"]["served"]["max"]
    return (
        f"{body['form']} {body['dtype']}: {body['outcome']}, log-probabilities within {export['max_difference']} of "
        f"those trained ({allowed} allowed), {export['equal_answers']} of {count} greedy answers equal; "
        f"{figures['engine']} engine within {served['max_difference']} ({served_allowed}), "
        f"{served['equal_answers']} equal"
    )

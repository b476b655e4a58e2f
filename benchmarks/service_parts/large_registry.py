"""A registry of many versions: listing, searching and lineage, on SQLite and PostgreSQL.

The versions are fabricated from one that was registered and approved in the ordinary way: own candidate, evaluation,
verdict, version, approval, audit entries and rows, but none is signed by itself, since 10,000 signatures take an hour.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fabricate import Scene, build_scene
from tests.postgresql_server import moved_to_postgresql, postgresql_server

from engine_parts.report import Line
from service_parts.kept import Found
from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_of
from tunesmith.services import versions as services
from tunesmith.services.lineage import tree
from tunesmith.store import audit, database
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, AuditHeadRow, AuditRow, EdgeRow, RecordRow, VersionRow

VERSIONS, NAMES, TIMES = 10_000, 100, 40
MOST_MS = 50.0


def measure(versions: int = VERSIONS) -> Found:
    """Lines for both databases."""
    lines, figures = [], {}
    with tempfile.TemporaryDirectory() as folder, postgresql_server(Path(folder) / "sql") as url:
        began = time.perf_counter()
        scene = build_scene(Path(folder) / "store")
        fabricate_versions(scene, versions)
        print(f"  {versions} versions made in {time.perf_counter() - began:.0f} s", flush=True)
        for kind in ("SQLite", "PostgreSQL"):
            store = scene.store if kind == "SQLite" else moved_to_postgresql(scene.store, url)
            for what, milliseconds in _operations(store).items():
                figures[f"{what}, {kind}"] = milliseconds
                lines.append(_line(f"{versions:,} versions, {kind}: {what}", milliseconds))
            store.engine.dispose()
    return Found(lines, figures)


def fabricate_versions(scene: Scene, count: int) -> None:
    """Fill a registry up to a number of versions, spread over many names."""
    store, first = scene.store, scene.version(1)
    approval = store.record(next(child for _, kind, child in store.children(first.digest) if kind == "approval"))
    originals = {role: store.record(getattr(first, role)) for role in ("candidate", "evaluation", "verdict")}
    with database.writing(store.engine) as session:
        key = session.get(VersionRow, (first.name, first.number)).key  # type: ignore[union-attr]
        approved = session.query(AuditRow).filter_by(action="version.approve").one()
        log = _Log(session)
        for place in range(1, count):
            name, number = f"task-{place % NAMES:03}", place // NAMES + 1
            made = _records(store.record(first.digest), originals, approval, name, number)
            for record in made.values():
                _put(store, record)
                session.add(RecordRow(digest=record.digest, kind=record.kind, created_at=stamp()))
                session.add_all(EdgeRow(child=record.digest, role=r, parent=p) for r, p in record.parents.items())
            digest, signature = made["version"].digest, {"key": key, "digest": made["version"].digest}
            session.add(VersionRow(name=name, number=number, digest=digest, key=key))
            if number == 1:
                session.add(AliasRow(name=name, alias="champion", version=digest, revision=1))
            log.add("version.register", name, first.signer, {"signature": signature})
            detail = {
                **approved.detail,
                "signature": approved.detail["signature"] | {"digest": made["approval"].digest},
            }
            log.add("version.approve", digest, approved.actor, detail)
            if place % 500 == 0:
                session.flush()
                session.expunge_all()
        log.end()
    with database.reading(store.engine) as session:
        assert not audit.verify(session), "the fabricated audit log is not whole"


def _records(
    version: Record, originals: dict[str, Record], approval: Record, name: str, number: int
) -> dict[str, Record]:
    """The records of one more version: those of the first one with other digests."""
    candidate = _changed(originals["candidate"], {}, prompt=f"Answer as {name} {number}.")
    evaluation = _changed(originals["evaluation"], {}, candidates=_of(originals["evaluation"], candidate.digest))
    between = {"candidate": candidate.digest, "evaluation": evaluation.digest}
    verdict = _changed(originals["verdict"], between)
    own = [candidate.digest, evaluation.digest, verdict.digest]
    replaced = {record.digest for record in originals.values()}
    kept = [digest for digest in version.body["records"] if digest not in replaced]
    stated = {"name": name, "number": number, "records": sorted([*kept, *own])}
    made = _changed(version, {**between, "verdict": verdict.digest}, **stated)
    signed = _changed(approval, {"version": made.digest})
    return {
        "candidate": candidate,
        "evaluation": evaluation,
        "verdict": verdict,
        "version": made,
        "approval": signed,
    }


def _of(evaluation: Record, candidate: str) -> dict[str, Any]:
    return {name: {**stated, "candidate": candidate} for name, stated in evaluation.body["candidates"].items()}


def _changed(record: Record, parents: dict[str, str], **body: Any) -> Record:
    return Record(
        kind=record.kind, parents={**record.parents, **parents}, blobs=record.blobs, body={**record.body, **body}
    )


def _put(store: Store, record: Record) -> None:
    """Write a record's file without syncing it, which would take most of the time."""
    hexadecimal = record.digest.removeprefix("sha256:")
    path = store.blobs.path(f"records/{hexadecimal[:2]}/{hexadecimal}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record.encoded)


class _Log:
    """Adds entries to the audit log as `audit.append` does, but reads and moves its head once."""

    def __init__(self, session: Any) -> None:
        self._session, self._head = session, audit.newest(session)

    def add(self, action: str, subject: str, actor: str, detail: dict[str, Any]) -> None:
        fields = {"at": stamp(), "actor": actor, "action": action, "subject": subject, "detail": detail}
        fields |= {"seq": self._head.seq + 1, "previous": self._head.digest}
        self._session.add(AuditRow(**fields, digest=digest_of(fields)))
        self._head = audit.Head(seq=self._head.seq + 1, digest=digest_of(fields))

    def end(self) -> None:
        head = self._session.get(AuditHeadRow, 1)
        head.seq, head.digest = self._head.seq, self._head.digest


def _operations(store: Store) -> dict[str, dict[str, float]]:
    """What -> milliseconds, the median and the 95th percentile of many calls on different versions."""
    draw = random.Random(7)
    with database.reading(store.engine) as session:
        rows = [(row.name, row.number, row.digest) for row in session.query(VersionRow).limit(5_000)]

    def label() -> str:
        name, number, _ = draw.choice(rows)
        return f"{name}@v{number}"

    calls: dict[str, Callable[[], Any]] = {
        "list the newest 100": lambda: services.list_versions(store),
        "search by name": lambda: services.list_versions(store, name=draw.choice(rows)[0]),
        "search by a digest's start": lambda: tree(store, draw.choice(rows)[2][7:23]),
        "lineage": lambda: tree(store, label()),
    }
    return {what: _times(call) for what, call in calls.items()}


def _times(call: Callable[[], Any], times: int = TIMES) -> dict[str, float]:
    call()  # imports, caches of the operating system
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - began))
    taken.sort()
    return {"median": taken[len(taken) // 2], "p95": taken[math.ceil(0.95 * len(taken)) - 1]}


def _line(what: str, milliseconds: dict[str, float]) -> Line:
    return Line(
        what,
        f"{milliseconds['median']:.1f} ms, p95 {milliseconds['p95']:.1f} ms",
        shown="-",
        wanted=f"p95 < {MOST_MS:g} ms",
        reached=milliseconds["p95"] < MOST_MS,
    )

"""Erase the texts of rows: a person's, a source's, a licence's, those of one row.

A steward plans, and a second person confirms. An erasure is a recall first, so that nothing serves or builds on what
goes. `confirm` works out what is left of each blob and record, and signs a statement of what replaces what. From then
on the erasure is carried out, by whoever comes next if this process is killed: all other places first, the rows' own
blobs last, since they say which texts are looked for. Each step may be repeated.

A sentence that also stands in a row that stays is not looked for elsewhere: the plan names that row, and a person
decides about it. So what everybody writes, and labels and system prompts, stays where it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import JSON, Text, delete, func, inspect, select, update
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes, is_digest, short
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import View
from tunesmith.data.dataset import REMOVED, SPLITS, SUBJECTS
from tunesmith.data.documents import PASSAGES
from tunesmith.data.governance import erased as texts
from tunesmith.data.governance.erased import CUT, SHORTEST, Erased, Rewritten, Sentences
from tunesmith.data.governance.withdrawn import ROW_CAUSES, TracedRows, reaches
from tunesmith.data.review.queue import forget_cases, forget_items
from tunesmith.monitoring.recall import Cause, Reached, find_reached, recall
from tunesmith.records.dataset import DatasetBody, DocumentsBody
from tunesmith.registry import erasures
from tunesmith.registry.erasures import CONFIRM, ErasureStatement, Replaced, Signed
from tunesmith.registry.signing.attestations import seal
from tunesmith.rollout.controller import give_up
from tunesmith.store import database, tables
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.locks import LockHeld, held_locks
from tunesmith.store.people import identities
from tunesmith.store.people.trust import signature_entry
from tunesmith.store.records import Record
from tunesmith.store.store import Store, blob_key, record_key
from tunesmith.store.tables import ErasedRow, ErasureRow, FileRow, HeldRow, JobRow, RecallRow, ReviewItemRow, Table

Weights = Literal["keep", "erase"]
Kind = Literal["blob", "record"]
_ROWS = {f"{split}.jsonl" for split in SPLITS} | {REMOVED, SUBJECTS, PASSAGES}
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_SIGNED = ("version", "approval", "paper", "base")  # records that state no text, most under signatures
_LOG = logging.getLogger("tunesmith.erasure")
_LOCK = "erasure"
_HERE = "erased.json"  # the erasures after which this machine was cleaned
Key = tuple[str | int, ...]  # of a row of the database
# Tables that may repeat a text. Rows of the first are deleted, in those of the others the texts are cut.
_DELETED = (HeldRow, tables.DeliveryRow, ReviewItemRow)
_CUT = (JobRow, tables.JobEventRow, tables.JobCurveRow, tables.RolloutRow, tables.ReviewDecisionRow)
_TABLES: dict[str, type[Table]] = {each.__tablename__: each for each in (*_DELETED, *_CUT)}


class Place(View):
    """Where texts are: how many rows, records, files or entries, and the bytes of what is rewritten or deleted."""

    place: str
    count: int
    bytes: int


class Plan(View):
    """What an erasure will do. state: planned, running or done.

    rows: ids of what goes. others: rows that stay and hold a sentence of it: somebody has to decide about them. shared:
    sentences that are looked for nowhere, since they stand in those rows. trainings: names of those that learned from
    the rows; versions: of what was made from them. in_use: what has to end first. outside: files that the store does
    not hold and whose owners have to erase them too. kept_until: until when backups and logs of the database can bring
    the texts back.
    """

    number: int
    cause: str
    reason: str
    weights: Weights
    state: str
    planned_by: str
    confirmed_by: str
    at: str
    rows: tuple[str, ...]
    places: tuple[Place, ...]
    others: tuple[str, ...]
    shared: int
    trainings: tuple[str, ...]
    versions: tuple[str, ...]
    in_use: tuple[str, ...]
    outside: tuple[str, ...]
    kept_until: str


@dataclass
class _Found:
    """What an erasure reaches now. places: -> how many, how many bytes."""

    rows: set[str]
    shared: set[str]
    others: set[str]
    replaced: dict[str, Replaced] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    entries: dict[str, list[Key]] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    reached: tuple[Reached, ...] = ()
    outside: set[str] = field(default_factory=set)

    def of(self, kind: str) -> dict[str, str]:
        """Label -> digest of the records of a kind that are reached."""
        return {one.label: one.digest for one in self.reached if one.kind == kind}

    def add(self, place: str, size: int, count: int = 1) -> None:
        """Count a place."""
        before = self.places.get(place, (0, 0))
        self.places[place] = (before[0] + count, before[1] + size)

    def replace(self, kind: Kind, name: str, old: str, data: bytes | None, left: Rewritten) -> None:
        """Note what is left of a blob or record, once, unless it stays as it is. data: None of weights."""
        if (data is not None and not left.rows and not left.cut) or old in self.replaced:
            return
        new = digest_bytes(left.data)
        self.replaced[old] = Replaced(kind=kind, name=name, old=old, new=new, rows=left.rows, cut=left.cut)
        self.add(f"{name} of records" if kind == "blob" else f"records: {name}", len(data or b""))


def plan(
    store: Store, cause: Cause, *, reason: str, actor: str, weights: Weights = "keep", kept_until: str = ""
) -> Plan:
    """Write down everything that an erasure reaches. Changes nothing else.

    weights: whether the weights that learned the rows are deleted, too. kept_until: until when backups, logs and
    replicas of the database are kept, as somebody who runs them says. Raises UsageError for a cause that no row here
    has, and for one that has no rows.
    """
    identities.require(store, actor, "erase.plan")
    if not reason.strip():
        raise UsageError("an erasure needs a reason", where="reason")
    resume(store)
    found = _find(store, cause, weights)
    stated = {
        "weights": weights,
        "rows": sorted(found.rows),
        "places": [{"place": name, "count": n, "bytes": size} for name, (n, size) in sorted(found.places.items())],
        "others": sorted(found.others),
        "shared": len(found.shared),
        "trainings": sorted(found.of("training")),
        "versions": sorted(found.of("version")),
        "outside": sorted(found.outside),
        "kept_until": kept_until or "unknown",
    }
    detail: JsonObject = {"reason": reason, "weights": weights}
    with store.change(actor, "erase.plan", cause.label, detail) as session:
        identities.require(session, actor, "erase.plan")
        number = (session.scalar(select(func.max(ErasureRow.id))) or 0) + 1
        row = ErasureRow(id=number, cause=cause.label, reason=reason, planned_by=actor, at=stamp(), plan=stated)
        session.add(row)
        session.flush()
        detail |= {"erasure": number, "rows": len(found.rows)}
    return _shown(store, row)


def list_plans(store: Store) -> list[Plan]:
    """Every erasure, the newest first."""
    with store.reading() as session:
        rows = list(session.scalars(select(ErasureRow).order_by(ErasureRow.id.desc())))
    return [_shown(store, row) for row in rows]


def _row(store: Store, number: int) -> ErasureRow:
    with store.reading() as session:
        row = session.get(ErasureRow, number)
    if row is None:
        raise NotThere(f"there is no erasure {number}", fix=NextStep("list them", "erase list"))
    return row


def _shown(store: Store, row: ErasureRow) -> Plan:
    using = _using(store) if row.state != "done" else ()
    return Plan.of(row, number=row.id, in_use=tuple(using), **row.plan)


def confirm(store: Store, number: int, *, actor: str, key: ec.EllipticCurvePrivateKey) -> Plan:
    """Recall what a plan names, sign the statement of what goes, and erase it.

    Killed, the same call goes on, as does the next start of a server, a worker or a command that changes something.
    Raises Refused for the planner, while something uses the rows (the recall stands then), and where more is reached
    by now than the plan says.
    """
    identities.require(store, actor, CONFIRM)
    with store.lock(_LOCK, f"erasure {number}"):
        _resume(store)
        row = _row(store, number)
        if row.planned_by == actor:
            what = f"{actor} planned erasure {number} and cannot confirm it"
            raise Refused(what, fix=NextStep("have another steward or an admin confirm it", "erase confirm"))
        if row.state == "planned":
            _begin(store, row, actor, key)
        _resume(store)
    return _shown(store, _row(store, number))


def _begin(store: Store, row: ErasureRow, actor: str, key: ec.EllipticCurvePrivateKey) -> None:
    cause = Cause.labelled(row.cause)
    reason = _reason(row.id, row.reason)
    for rollout in recall(store, cause, reason=reason, actor=actor).rollouts:
        give_up(store, rollout, f"recalled: {reason}")
    if using := _using(store):
        what = f"{using[0]} may use what erasure {row.id} deletes; it is recalled, and nothing is deleted yet"
        raise Refused(what, fix="wait for it or stop it, then confirm again")
    found = _find(store, cause, row.plan["weights"])
    known = {*row.plan["rows"], *row.plan["versions"]}
    if new := sorted({*found.rows, *found.of("version")} - known):
        what = f"{len(new)} rows or versions are reached that plan {row.id} does not name, such as {new[0]}"
        raise Refused(what, fix=NextStep("plan it again", "erase plan"))
    statement = ErasureStatement(
        number=row.id,
        cause=row.cause,
        reason=row.reason,
        planned_by=row.planned_by,
        confirmed_by=actor,
        at=stamp(),
        plan=row.plan,
        rows=tuple(sorted(found.rows)),
        replaced=tuple(found.replaced.values()),
        deleted=tuple(found.deleted),
        entries={table: tuple(keys) for table, keys in found.entries.items()},
        versions=found.of("version") if row.plan["weights"] == "erase" else {},
        recalled=tuple(one.digest for one in found.reached),
    )
    store.blobs.put(statement.key, seal(erasures.statement_of(statement), key))


def _reason(number: int, reason: str) -> str:
    """Why the records that an erasure reaches are recalled."""
    return f"erasure {number}: {reason}"


def _know(store: Store, signed: Signed) -> None:
    """Write a signed erasure into the database, which may have been put back since it was signed."""
    statement = signed.statement
    detail: JsonObject = {
        "erasure": statement.number,
        "rows": len(statement.rows),
        "replaced": len(statement.replaced),
        "deleted": len(statement.deleted),
        "entries": sum(map(len, statement.entries.values())),
        "versions": sorted(statement.versions),
        **signature_entry(signed.fingerprint, signed.digest),
    }
    with store.change(statement.confirmed_by, CONFIRM, statement.cause, detail) as session:
        row = session.merge(ErasureRow(id=statement.number, state="running", statement=signed.digest))
        for name in ("cause", "reason", "planned_by", "confirmed_by", "at", "plan"):
            setattr(row, name, getattr(statement, name))
        reason = _reason(statement.number, statement.reason)
        for digest in statement.recalled:
            if session.get(RecallRow, (digest, statement.cause)) is None:
                session.add(RecallRow(digest=digest, cause=statement.cause, reason=reason, at=statement.at))
        for one in statement.replaced:
            session.merge(ErasedRow(old=one.old, new=one.new))
    identities.publish_trust(store)


def resume(store: Store) -> list[str]:
    """Go on with every erasure that is not done here, also where a backup brought back what was erased.

    Returns what was done, a line each. Raises Refused for a statement that no trusted key signed.
    """
    with contextlib.suppress(LockHeld), store.lock(_LOCK, "erasing"):  # who holds it does the same
        return _resume(store)
    return []


def _resume(store: Store) -> list[str]:
    read = erasures.read_erasures(store.blobs, identities.trusted_keys(store))
    for key, reason in read.problems.items():
        raise Refused(f"an erasure does not count: {reason}", where=store.blobs.where(key), fix="ask who signed it")
    here, done = _machine(store), []
    for signed in read.signed:
        statement = signed.statement
        with store.reading() as session:
            row = session.get(ErasureRow, statement.number)
        known = row is not None and row.statement == signed.digest
        back = any(store.blobs.exists(_key(one.kind, one.old)) for one in statement.replaced if one.rows)
        if not known:
            _know(store, signed)
        if back or not known or (row is not None and row.state != "done"):
            done.append(f"erasure {statement.number}, which {statement.confirmed_by} confirmed, is carried out")
            _LOG.warning(done[-1])
            _carry_out(store, statement)
        if signed.digest not in here:
            _clean_machine(store, statement)
            here.add(signed.digest)
            write_atomic(store.local(_HERE), json.dumps(sorted(here)).encode())
    return done


def _machine(store: Store) -> set[str]:
    """The erasures after which this machine's own folders were cleaned."""
    try:
        return set(parse_json(store.local(_HERE).read_bytes()))
    except FileNotFoundError:
        return set()


def _clean_machine(store: Store, statement: ErasureStatement) -> None:
    """Delete what this machine derived from the rows: work folders, caches, keys of withdrawn rows."""
    for folder in _work(store):
        shutil.rmtree(folder, ignore_errors=True)
    store.local("withdrawn.json").unlink(missing_ok=True)
    for one in statement.replaced:
        store.blobs.delete(_key(one.kind, one.old))  # and the copy in the cache of a bucket
    if statement.versions:
        shutil.rmtree(store.local("cache", "folders"), ignore_errors=True)


def _work(store: Store) -> list[Path]:
    """The folders of stages that did not end, and of caches of texts."""
    work = store.local("work")
    return [each for each in work.iterdir() if not each.name.startswith(SCRATCH)] if work.is_dir() else []


def _carry_out(store: Store, statement: ErasureStatement) -> None:
    ids = frozenset(statement.rows)
    rows = _Rows(store)
    rows.take(ids.__contains__)
    wanted = Sentences(rows.sentences - rows.staying()[0])
    entries = {table: set(keys) for table, keys in statement.entries.items()}
    cause = Cause.labelled(statement.cause)
    tenant = cause.value if cause.kind == "tenant" else ""
    for table, keys in _entries(store, wanted, ids, tenant).items():
        entries.setdefault(table, set()).update(keys)
    with store.writing() as session:
        for table, some in entries.items():
            _clean(session, _TABLES[table], some)
    for key in {*statement.deleted, *(key for key, _ in _objects(store, wanted, tenant))}:
        _delete_object(store, key)
    for label in statement.versions:
        store.drop_version(VersionRef.parse(label))
    # Rows last: they say which texts are looked for.
    for one in sorted(statement.replaced, key=lambda one: bool(one.rows)):
        _replace(store, one)
    database.scrub(store.engine, sorted(_TABLES))
    with store.change(statement.confirmed_by, "erase.done", statement.cause, {"erasure": statement.number}) as session:
        session.execute(update(ErasureRow).where(ErasureRow.id == statement.number).values(state="done"))


def _replace(store: Store, one: Replaced) -> None:
    """Write what is left of a blob or record, then delete the old one."""
    old, new = _key(one.kind, one.old), _key(one.kind, one.new)
    if not store.blobs.exists(old):
        return
    left = b""  # of weights
    if one.rows or one.cut:
        left = texts.rewritten(store.blobs.get(old), one.rows, one.cut, lines=one.kind == "blob")
    if digest_bytes(left) != one.new:
        what = f"{one.kind} {short(one.old)} is damaged: it does not give what the erasure left of it"
        raise Refused(what, where=store.blobs.where(old), fix="restore it from a backup")
    store.blobs.put(new, left)
    store.blobs.delete(old)


def _key(kind: str, digest: str) -> str:
    return record_key(digest) if kind == "record" else blob_key(digest)


def _current(store: Store, kind: str, digest: str) -> str:
    """The digest of a blob or record as it is now."""
    return digest if store.blobs.exists(_key(kind, digest)) else store.left_of(digest)


# What an erasure reaches


class _Rows:
    """The rows and passages of all dataset versions and documents, each file read once.

    taken: ids of those that go. sentences, turns: of their texts.
    """

    def __init__(self, store: Store) -> None:
        self.files: dict[str, tuple[str, list[tuple[str, JsonObject]]]] = {}  # blob -> its name, its lines
        for kind in ("dataset", "documents"):
            for digest in store.records_of(kind):
                for name, blob in store.record(digest).blobs.items():
                    blob = _current(store, "blob", blob)
                    if name in _ROWS and blob not in self.files:
                        self.files[blob] = (name, texts.named_lines(store.read_blob(blob)))
        self.taken, self.sentences, self.turns = set[str](), set[str](), set[tuple[str, ...]]()

    def take(self, goes: Callable[[str], bool], states: Callable[[JsonObject], bool] = lambda _line: False) -> None:
        """Take the lines whose name goes, and rows and passages by what else they state."""
        for name, lines in self.files.values():
            for row, line in lines:
                if goes(row) or (name in (PASSAGES, REMOVED) and states(line)):
                    self.taken.add(row)
                    turns = [str(turn["content"]) for turn in line.get("messages", ())]
                    for text in (*turns, *texts.strings(line.get("fields")), line.get("text", "")):
                        self.sentences.update(texts.sentences(text))
                    self.turns |= {folded} if (folded := texts.turns_of(line.get("messages", []))) else set()

    def staying(self) -> tuple[set[str], set[str]]:
        """The sentences that stand in rows that stay as well, and the ids of these rows. Rows that a build removed are
        taken where one stands in them: they are nobody's rows."""
        shared, others = set[str](), set[str]()
        looked = Sentences(self.sentences)
        for name, lines in self.files.values():
            for row, line in ((row, line) for row, line in lines if row not in self.taken):
                found = {one for text in texts.strings(line) for one in looked.within(text)}
                if found and name == REMOVED:
                    self.taken.add(row)
                elif found:
                    shared |= found
                    others.add(row)
        return shared, others

    def replaced(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """(name, blob, the names of the lines that go) of each file that holds some."""
        for blob, (name, lines) in self.files.items():
            if own := [row for row, _ in lines if row in self.taken]:
                yield name, blob, tuple(own)


def _find(store: Store, cause: Cause, weights: Weights) -> _Found:
    if cause.kind not in ROW_CAUSES:
        what = f"a recall of a {cause.kind} names no rows that could be erased"
        raise UsageError(what, fix=f"name one of {', '.join(ROW_CAUSES)}")
    with store.reading() as session:
        reached = find_reached(store, session, cause, "", done=False)[0].reached
    ids = TracedRows(store, store.records_of("dataset"), [cause.kind]).trace(cause.kind, cause.value).ids
    rows = _Rows(store)
    rows.take(ids.__contains__, lambda line: _states(cause, line))
    if not rows.taken:
        raise UsageError(f"no dataset version in this store holds a row of {cause.label} any more")
    shared, others = rows.staying()
    found = _Found(rows.taken, shared, others, reached=reached)
    wanted = rows.sentences - shared
    erased = Erased(rows.taken, wanted, rows.turns)
    for name, blob, own in rows.replaced():
        data = store.read_blob(blob)
        found.replace("blob", name, blob, data, Rewritten(texts.left_out(data, own), own, ()))
    for one in reached:
        _look_into(store, one, store.record(one.digest), erased, found, weights)
    looked = Sentences(wanted)
    tenant = cause.value if cause.kind == "tenant" else ""
    for table, keys in _entries(store, looked, rows.taken, tenant).items():
        found.entries[table] = keys
        found.add(f"rows of the table {table}", 0, len(keys))
    for key, size in _objects(store, looked, tenant):
        found.deleted.append(key)
        found.add("kept requests" if key.startswith("cases/") else "uploaded files", size)
    if not isinstance(store.blobs, LocalBlobs):
        found.outside.add(f"older versions of the objects in {store.blobs.where('')}, if the bucket keeps them")
    for folder in _work(store):
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        found.add("work folders of this machine: stages that did not end begin again", size)
    return found


def _states(cause: Cause, line: JsonObject) -> bool:
    """Whether a passage, or a row that a build removed, states what is erased."""
    if cause.kind == "tenant":
        return bool((line.get("labels") or {}).get("tenant") == cause.value)
    return cause.kind == "source" and reaches("source", cause.value, line["source"])


def _look_into(store: Store, one: Reached, record: Record, erased: Erased, found: _Found, weights: Weights) -> None:
    """What of a reached record has to be rewritten or deleted."""
    if one.kind == "dataset":
        found.outside.update(f"source {source.path}" for source in DatasetBody.of(record).sources)
    if one.kind == "documents":
        found.outside.update(f"document {file.path}" for file in DocumentsBody.of(record).files)
    if one.kind == "export":
        found.outside.add(f"an export, record {short(one.digest)}")
    for name, blob in record.blobs.items():
        blob = _current(store, "blob", blob)
        if name in _WEIGHTS and weights == "erase":
            found.replace("blob", name, blob, None, Rewritten(b"", (), ()))
        elif one.kind == "paper":  # one that quotes a row is emptied, and counts no more
            if erased.sentences.stand_in(store.read_blob(blob).decode("utf-8", "replace")):
                found.replace("blob", name, blob, None, Rewritten(b"", (), ()))
        elif name.endswith(".jsonl") and name not in _ROWS:
            found.replace("blob", name, blob, data := store.read_blob(blob), erased.cut(data, lines=True))
    if one.kind not in _SIGNED:
        now = _current(store, "record", one.digest)
        found.replace("record", one.kind, now, record.encoded, erased.cut(record.encoded, lines=False))


def _entries(store: Store, wanted: Sentences, ids: Collection[str], tenant: str) -> dict[str, list[Key]]:
    """Table -> keys of its rows that hold a sentence, or are about a row that goes. tenant: whose held answers go."""
    found: dict[str, list[Key]] = {}
    with store.reading() as session:
        for name, table in _TABLES.items():
            keys = inspect(table).primary_key
            columns = _texts(table)
            for row in session.scalars(select(table).execution_options(yield_per=500)):
                about = isinstance(row, ReviewItemRow) and row.kind == "row" and row.subject in ids
                about |= isinstance(row, HeldRow) and row.tenant == tenant != ""
                if about or wanted.stand_in([getattr(row, each) for each in columns]):
                    found.setdefault(name, []).append(tuple(getattr(row, key.name) for key in keys))
    return found


def _texts(table: type[Table]) -> list[str]:
    return [column.name for column in inspect(table).columns if isinstance(column.type, JSON | Text)]


def _clean(session: Session, table: type[Table], keys: Iterable[Key]) -> None:
    """Delete rows of the database, or cut every longer text in them."""
    for key in sorted(keys, key=str):
        row = session.get(table, tuple(key))
        if row is None:
            continue
        if isinstance(row, ReviewItemRow):
            forget_items(session, [row.id])
        elif table in _DELETED:
            session.delete(row)
        else:
            for column in _texts(table):
                setattr(row, column, _without_texts(getattr(row, column)))


def _without_texts(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) < SHORTEST or is_digest(value) else f"{CUT}]"
    if isinstance(value, list):
        return [_without_texts(each) for each in value]
    if isinstance(value, dict):
        return {_without_texts(key): _without_texts(each) for key, each in value.items()}
    return value


def _objects(store: Store, wanted: Sentences, tenant: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of kept requests and uploaded files that hold a sentence, or are a tenant's."""
    with store.reading() as session:
        theirs = set(session.scalars(select(FileRow.file).where(FileRow.tenant == tenant))) if tenant else ()
    for key in chain(store.blobs.keys("cases/"), store.blobs.keys("files/")):
        with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
            data = store.blobs.get(key)
            own = key.startswith("cases/") and tenant and parse_json(data).get("tenant") == tenant
            if own or _object_name(key) in theirs or wanted.stand_in(data.decode("utf-8", "replace")):
                yield key, len(data)


def _object_name(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def _delete_object(store: Store, key: str) -> None:
    name = _object_name(key)
    with store.writing() as session:
        if key.startswith("cases/"):
            forget_cases(session, [name])
        session.execute(delete(FileRow).where(FileRow.file == name))
    store.blobs.delete(key)


def _using(store: Store) -> list[str]:
    """Who may use the rows at this moment: running jobs, and processes that hold a lock."""
    with store.reading() as session:
        running = session.execute(select(JobRow.id, JobRow.kind).where(JobRow.state == "running").order_by(JobRow.id))
        jobs = [f"job {number} ({kind})" for number, kind in running]
    # A worker holds the lock of its webhooks all the time; what they send is among the deliveries.
    return jobs + [
        held for name, held in held_locks(store.engine) if name != _LOCK and not name.startswith("webhooks ")
    ]

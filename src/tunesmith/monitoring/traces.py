"""What holds the texts of rows that are to be erased: blobs, records, rows of the database, uploads, work folders."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from sqlalchemy import JSON, Text, inspect, select

from tunesmith.core.digests import digest_bytes, short
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.core.values import View
from tunesmith.data.dataset import REMOVED
from tunesmith.data.documents import PASSAGES
from tunesmith.data.governance import erased as texts
from tunesmith.data.governance.erased import Erased, Sentences
from tunesmith.data.governance.withdrawn import ROW_CAUSES, reaches
from tunesmith.monitoring.recall import Cause, Reached, reach
from tunesmith.records.dataset import DatasetBody, DocumentsBody
from tunesmith.records.version import VersionBody
from tunesmith.registry.erasures import ROW_FILES, UNCUT, WEIGHTS, Replaced
from tunesmith.store import tables
from tunesmith.store.locks import users_of
from tunesmith.store.store import Store, blob_key, record_key
from tunesmith.store.tables import FileRow, HeldRow, JobRow, ReviewItemRow, Table

Weights = Literal["keep", "erase"]
Kind = Literal["blob", "record"]
Names = tuple[str, ...]
Key = tuple[str | int, ...]  # of a row of the database
# Tables that may repeat a text. Rows of the first are deleted, in those of the others the texts are cut.
DELETED = (HeldRow, tables.DeliveryRow, ReviewItemRow)
_CUT = (JobRow, tables.JobEventRow, tables.JobCurveRow, tables.RolloutRow, tables.ReviewDecisionRow)
TABLES: dict[str, type[Table]] = {each.__tablename__: each for each in (*DELETED, *_CUT)}


class Place(View):
    """Where things are: how many rows, records, files or entries, and the bytes of those that are files."""

    place: str
    count: int
    bytes: int


def places_of(sized: Iterable[tuple[str, int]]) -> tuple[Place, ...]:
    """What lies in each place, the largest first. sized: the place of each thing, and its bytes."""
    sums: dict[str, list[int]] = defaultdict(list)
    for place, size in sized:
        sums[place].append(size)
    places = (Place(place=place, count=len(sizes), bytes=sum(sizes)) for place, sizes in sums.items())
    return tuple(sorted(places, key=lambda place: (-place.bytes, place.place)))


@dataclass
class Found:
    """What an erasure reaches now. sized: the places of what is rewritten or deleted. versions: label -> digest."""

    rows: set[str]
    shared: set[str]
    others: set[str]
    reached: Sequence[Reached]
    versions: dict[str, str]
    entries: dict[str, list[Key]]
    replaced: dict[str, Replaced] = field(default_factory=dict)
    sized: list[tuple[str, int]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    outside: set[str] = field(default_factory=set)

    def of(self, kind: str) -> list[str]:
        """The digests of the records of a kind that are reached."""
        return sorted(one.digest for one in self.reached if one.kind == kind)

    def replace(self, kind: Kind, name: str, old: str, data: bytes, rows: Names = (), cut: Names = ()) -> None:
        """Note what is left of a blob or record, once, unless it stays as it is. No data: it goes whole."""
        if old in self.replaced or (data and not rows and not cut):
            return
        new = digest_bytes(texts.rewritten(data, rows, cut, lines=kind == "blob") if data else b"")
        if old == new:  # it went whole before
            return
        self.replaced[old] = Replaced(kind=kind, name=name, old=old, new=new, rows=rows, cut=cut)
        self.sized.append((f"{name} of records" if kind == "blob" else f"records: {name}", len(data)))


class Rows:
    """The rows and passages of all dataset versions and documents, each file read once.

    taken: ids of those that go: of these ids, and passages and rows that a build removed by what they state. sentences,
    turns: of their texts.
    """

    def __init__(self, store: Store, ids: Collection[str], cause: Cause) -> None:
        self.files: dict[str, tuple[str, list[tuple[str, JsonObject]]]] = {}  # blob -> its name, its lines
        self.taken, self.sentences, self.turns = set[str](), set[str](), set[tuple[str, ...]]()
        for kind in ("dataset", "documents"):
            for digest in store.records_of(kind):
                for name, blob in store.record(digest).blobs.items():
                    blob = store.left_of(blob, blob_key)
                    if name in ROW_FILES and blob not in self.files:
                        self.files[blob] = (name, texts.named_lines(store.read_blob(blob)))
        for name, lines in self.files.values():
            for row, line in lines:
                if row in ids or (name in (PASSAGES, REMOVED) and _states(cause, line)):
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


def find(store: Store, cause: Cause, weights: Weights) -> Found:
    """What an erasure would reach now; no rows where others erased all of them. weights: what becomes of those that
    learned from the rows. Raises UsageError for a cause that names no rows, or none that this store ever had.
    """
    if cause.kind not in ROW_CAUSES:
        what = f"a recall of a {cause.kind} names no rows that could be erased"
        raise UsageError(what, fix=f"name one of {', '.join(ROW_CAUSES)}")
    with store.reading() as session:
        reached, ids, *_ = reach(store, session, cause)
    rows = Rows(store, ids, cause)
    shared, others = rows.staying()
    erased = Erased(rows.taken, rows.sentences - shared, rows.turns)
    versions = {VersionBody.read(store, one.digest).line: one.digest for one in reached if one.kind == "version"}
    entries = entries_with(store, erased.sentences, rows.taken, cause)
    found = Found(rows.taken, shared, others, reached, versions, entries)
    for blob, (name, lines) in rows.files.items():
        if own := tuple(row for row, _ in lines if row in rows.taken):
            found.replace("blob", name, blob, store.read_blob(blob), rows=own)
    for one in reached:
        _look_into(store, one, erased, found, weights)
    found.sized += [(f"rows of the table {table}", 0) for table, keys in entries.items() for _ in keys]
    for key, size in objects_with(store, erased.sentences, cause):
        found.deleted.append(key)
        found.sized.append(("kept requests" if key.startswith("cases/") else "uploaded files", size))
    work = "work folders of this machine: stages that did not end begin again"
    found.sized += [(work, size_of(folder)[0]) for folder in work_folders(store)]
    return found


def _states(cause: Cause, line: JsonObject) -> bool:
    """Whether a passage, or a row that a build removed, states what is erased."""
    if cause.kind == "tenant":
        return bool((line.get("labels") or {}).get("tenant") == cause.value)
    return cause.kind == "source" and reaches("source", cause.value, line["source"])


def _look_into(store: Store, one: Reached, erased: Erased, found: Found, weights: Weights) -> None:
    """What of a reached record has to be rewritten or deleted. Most hold nothing and are not read as records."""
    if one.kind == "dataset":
        sources = DatasetBody.read(store, one.digest).sources
        found.outside.update(f"source {source.path}" for source in sources)
    if one.kind == "documents":
        found.outside.update(f"document {file.path}" for file in DocumentsBody.read(store, one.digest).files)
    if one.kind == "export":
        found.outside.add(f"an export, record {short(one.digest)}")
    now, stated = store.record_bytes(one.digest)
    if digest_bytes(stated) != now:
        store.record(one.digest)  # which says what is wrong
    for name, blob in json.loads(stated)["blobs"].items():
        blob = store.left_of(blob, blob_key)
        if name in WEIGHTS and weights == "erase":
            found.replace("blob", name, blob, b"")
        elif one.kind == "paper":  # one that quotes a row is emptied, and counts no more
            if erased.sentences.stand_in(store.read_blob(blob).decode("utf-8", "replace")):
                found.replace("blob", name, blob, b"")
        elif name.endswith(".jsonl") and name not in ROW_FILES:
            found.replace("blob", name, blob, data := store.read_blob(blob), cut=erased.cut(data, lines=True))
    if one.kind not in UNCUT:
        found.replace("record", one.kind, now, stated, cut=erased.cut(stated, lines=False))


def entries_with(store: Store, wanted: Sentences, ids: Collection[str], cause: Cause) -> dict[str, list[Key]]:
    """Table -> keys of its rows that hold a sentence, are about a row that goes, or are a held answer of its tenant."""
    found: dict[str, list[Key]] = {}
    with store.reading() as session:
        for name, table in TABLES.items():
            keys = inspect(table).primary_key
            columns = text_columns(table)
            for row in session.scalars(select(table).order_by(*keys).execution_options(yield_per=500)):
                about = isinstance(row, ReviewItemRow) and row.kind == "row" and row.subject in ids
                about |= isinstance(row, HeldRow) and (cause.kind, cause.value) == ("tenant", row.tenant)
                if about or wanted.stand_in([getattr(row, each) for each in columns]):
                    found.setdefault(name, []).append(tuple(getattr(row, key.name) for key in keys))
    return found


def text_columns(table: type[Table]) -> list[str]:
    """The columns of a table that may hold a text."""
    return [column.name for column in inspect(table).columns if isinstance(column.type, JSON | Text)]


def objects_with(store: Store, wanted: Sentences, cause: Cause) -> Iterator[tuple[str, int]]:
    """(key, bytes) of kept requests and uploaded files that hold a sentence, or are of the tenant that goes."""
    tenant = cause.value if cause.kind == "tenant" else None
    with store.reading() as session:
        theirs = set(session.scalars(select(FileRow.file).where(FileRow.tenant == tenant)))
    for key in chain(store.blobs.keys("cases/"), store.blobs.keys("files/")):
        with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
            data = store.blobs.get(key)
            own = key.startswith("cases/") and tenant and parse_json(data).get("tenant") == tenant
            if own or object_name(key) in theirs or wanted.stand_in(data.decode("utf-8", "replace")):
                yield key, len(data)


def object_name(key: str) -> str:
    """The name of a kept request or an uploaded file."""
    return key.rpartition("/")[2].partition(".")[0]


def in_use(store: Store, candidates: Collection[str]) -> list[str]:
    """Who may use the rows at this moment: running jobs, processes that hold a lock, and servers that loaded what was
    made from them. candidates: their digests."""
    with store.reading() as session:
        running = session.execute(select(JobRow.id, JobRow.kind).where(JobRow.state == "running").order_by(JobRow.id))
        jobs = [f"job {number} ({kind})" for number, kind in running]
    return jobs + users_of(store.engine, candidates)


def work_folders(store: Store) -> list[Path]:
    """The folders of stages that did not end, and of caches of texts."""
    return [each for each in store.root.glob("work/*") if not each.name.startswith(SCRATCH)]


def size_of(folder: Path) -> tuple[int, float]:
    """The bytes below a path, and when something there last changed, in seconds since 1970."""
    size, changed = 0, 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            size, changed = size + status.st_size * path.is_file(), max(changed, status.st_mtime)
    return size, changed


def key_of(kind: str, digest: str) -> str:
    """Where a blob or record is kept."""
    return record_key(digest) if kind == "record" else blob_key(digest)

"""Copies a whole store: its database's rows and its objects, into another store or through one file.

The rows are read in one snapshot, before the objects are listed. Erasures alone remove records and blobs meanwhile, so
what a row names is among the objects. Only kept requests and uploaded files are deleted: a copy leaves out those that
go meanwhile. A target gets its objects first and its rows in one transaction at the end. So a copy that was stopped has
no rows, and the same command continues it.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select, text
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_file, digest_pieces, pieces_of
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress, Task
from tunesmith.core.system.files import require_new, room_for, sync_folder
from tunesmith.core.system.scratch import scratch_file
from tunesmith.store import database
from tunesmith.store.blobs import BlobStore, named_digest
from tunesmith.store.store import ERASURES, HOLDS, MARKER, PREFIXES, RELEASE, Store
from tunesmith.store.tables import HEAD_REVISION, HeldRow, LockRow, LoginLinkRow, SessionRow
from tunesmith.store.tables import Table as Tables

_ROWS, _MANIFEST, _OBJECTS = "database.jsonl", "manifest.json", "objects/"
_DELETED = ("cases/", "files/")  # what may go while a store is copied: kept requests, uploaded files
_FORMAT = 1
_TOGETHER = 500


@dataclass(frozen=True)
class Contents:
    """What is copied. pieces: an object's bytes by its key. rows: a file with the database's rows; None: none.

    store: the id of the store that they are of.
    """

    keys: Sequence[str]
    pieces: Callable[[str], Iterator[bytes]]
    rows: Path | None
    store: str


def keys_of(blobs: BlobStore) -> list[str]:
    """Every object of a store, a version's release after its other files."""
    keys = (key for prefix in PREFIXES for key in blobs.keys(prefix))
    return sorted(keys, key=lambda key: (key.endswith(f"/{RELEASE}"), key))


def export_rows(store: Store, path: Path) -> int:
    """Write the rows of one snapshot as JSON lines, [table, row]; returns how many.

    Locks, sessions and held answers are left out: a copy must not keep their texts for longer than their time.
    """
    count = 0
    with database.snapshot(store.engine) as connection, room_for(path), path.open("w", encoding="utf-8") as stream:
        for table in _tables():
            query = select(table).order_by(*table.primary_key)
            for row in connection.execution_options(yield_per=_TOGETHER).execute(query).mappings():
                stream.write(json.dumps([table.name, dict(row)]) + "\n")
                count += 1
    return count


def import_rows(session: Session, path: Path) -> int:
    """Add the rows that export_rows wrote; returns how many. Raises Refused where the database holds rows."""
    tables, connection = {table.name: table for table in _tables()}, session.connection()
    require_no_rows(connection)
    count = 0
    with path.open(encoding="utf-8") as stream:
        for name, rows in groupby((json.loads(line) for line in stream), key=lambda line: str(line[0])):
            while group := [row for _, (_, row) in zip(range(_TOGETHER), rows, strict=False)]:
                connection.execute(insert(tables[name]), group)
                count += len(group)
    if connection.dialect.name == "postgresql":
        for table in tables.values():
            if table.autoincrement_column is not None:
                _continue_numbers(connection, table)
    return count


def require_no_rows(connection: Connection) -> None:
    """Raise Refused where a table holds a row."""
    for table in _tables():
        if connection.execute(select(table).limit(1)).first() is not None:
            raise Refused(
                f"the database holds rows already (table {table.name})",
                where=connection.engine.url.render_as_string(hide_password=True),
                fix="name an empty database: TUNESMITH_DATABASE_URL",
            )


def put_objects(store: Store, contents: Contents, progress: Progress = SILENT) -> tuple[int, int]:
    """Write the objects into a store and read each one back; returns their number and bytes. Those that are there are
    kept. A kept request or an uploaded file that is deleted meanwhile is left out.

    Statements of erasures and holds that are there stay, and what they erased has to go again. So do files of the same
    store, whose database was lost. Raises Refused, before the first write, where there is any other object, and for an
    object whose bytes are not those that its key names.
    """
    count = total = 0
    erased = frozenset((*store.blobs.keys(ERASURES), *store.blobs.keys(HOLDS)))
    known = store.marker().store
    strange = {*keys_of(store.blobs), *[MARKER] * bool(known)} - set(contents.keys) - erased
    if strange and known != contents.store:
        where, fix = store.blobs.where(min(strange)), "name an empty place: TUNESMITH_BLOBS_URL, or another folder"
        raise Refused(f"the store holds {len(strange)} objects already", where=where, fix=fix)
    store.mark(store=contents.store)
    with store.scratch() as folder, progress.task("copying objects", len(contents.keys)) as task:
        file = folder / "object"
        # A copy that was stopped may have written what is gone by now.
        wanted = [key for key in contents.keys if key not in erased]
        for key, digest, size in _spooled(wanted, contents.pieces, file, task, gone=store.blobs.delete):
            count, total = count + 1, total + size
            if not store.blobs.exists(key) or digest_pieces(store.blobs.pieces(key)) != digest:
                if key.startswith("cases/"):
                    store.blobs.put(key, file.read_bytes(), private=True)
                else:
                    file.chmod(0o600 if key.startswith("files/") else 0o644)
                    store.blobs.put_file(key, file)
                if digest_pieces(store.blobs.pieces(key)) != digest:
                    raise Refused("the object was not copied whole", where=store.blobs.where(key), fix="delete it")
            file.unlink(missing_ok=True)
    return count, total


def write_archive(store: Store, path: Path, progress: Progress = SILENT) -> tuple[int, int, int]:
    """Write a store into a new file, which only this user can read; returns how many objects, their bytes, and rows.

    Raises UsageError where the file exists.

    A kept request or an uploaded file that is deleted meanwhile is left out.
    """
    require_new(path)
    if not path.parent.is_dir():
        raise UsageError("its folder does not exist", where=str(path), fix="name a file in a folder that exists")
    with store.scratch() as folder, room_for(path), scratch_file(path.parent, 0o600) as (scratch, stream):
        rows = export_rows(store, folder / _ROWS)
        keys, total = keys_of(store.blobs), 0
        members = {_ROWS: digest_file(folder / _ROWS)}
        with tarfile.open(fileobj=stream, mode="w") as archive, progress.task("backup", len(keys)) as task:
            archive.add(folder / _ROWS, _ROWS)
            for key, digest, size in _spooled(keys, store.blobs.pieces, folder / "object", task):
                archive.add(folder / "object", _OBJECTS + key)
                members[_OBJECTS + key], total = digest, total + size
            facts = {"format": _FORMAT, "revision": HEAD_REVISION, "made_at": stamp(), "members": members}
            facts["store"] = database.store_id(store.engine)
            (folder / _MANIFEST).write_text(json.dumps(facts))
            archive.add(folder / _MANIFEST, _MANIFEST)
        stream.flush()
        os.fsync(stream.fileno())
        os.replace(scratch, path)
    sync_folder(path.parent)
    return len(members) - 1, total, rows


@contextmanager
def open_archive(path: Path, scratch: Path) -> Iterator[Contents]:
    """The contents of a file of write_archive, every byte of which was compared with its digest.

    scratch: a folder for its rows. Raises Refused for a damaged file, and for one of another version.
    """

    def refusal(what: str) -> Refused:
        return Refused(f"this backup cannot be used: {what}", where=str(path), fix="take another backup")

    def read(name: str) -> Iterator[bytes]:
        stream = archive.extractfile(members[name])
        assert stream is not None  # a regular file
        yield from pieces_of(stream)

    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(path, "r:"))
            listed = archive.getmembers()
        except (OSError, tarfile.TarError) as error:
            raise refusal(f"it cannot be read: {error}") from error
        members = {member.name: member for member in listed}
        if len(members) != len(listed) or not all(member.isreg() for member in listed):
            raise refusal("it names a file twice, or holds links")
        try:
            facts: Any = json.loads(b"".join(read(_MANIFEST)))
            made_by, of = (facts["format"], facts["revision"]), str(facts.get("store", ""))
            stated = {str(name): str(digest) for name, digest in facts["members"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise refusal("it is no whole backup") from error
        if made_by != (_FORMAT, HEAD_REVISION):
            what = f"it was written by another version of Tunesmith (database revision {made_by[1]})"
            raise Refused(what, where=str(path), fix="restore it with that version, then update")
        if stated.keys() != members.keys() - {_MANIFEST} or _ROWS not in stated:
            raise refusal("files are missing or were added")
        for name, digest in stated.items():
            if digest_pieces(read(name)) != digest:
                raise refusal(f"{name} is damaged")
        keys = [name.removeprefix(_OBJECTS) for name in stated if name != _ROWS]
        if not all(map(_is_key, keys)):
            raise refusal("it holds a file that no store has")
        with (scratch / _ROWS).open("wb") as rows:
            rows.writelines(read(_ROWS))
        yield Contents(keys, lambda key: read(_OBJECTS + key), scratch / _ROWS, of)


_LEFT_OUT = {row.__tablename__ for row in (HeldRow, LockRow, LoginLinkRow, SessionRow)}


def _tables() -> list[Table]:
    return [table for table in Tables.metadata.sorted_tables if table.name not in _LEFT_OUT]


def _continue_numbers(connection: Connection, table: Table) -> None:
    """Let PostgreSQL number the next row after those that were copied with their numbers."""
    column = table.autoincrement_column
    assert column is not None
    sequence = connection.scalar(
        text("select pg_get_serial_sequence(:table, :column)"), {"table": table.name, "column": column.name}
    )
    newest = connection.scalar(select(column).order_by(column.desc()).limit(1))
    if sequence is not None and newest is not None:
        connection.execute(text("select setval(:sequence, :newest)"), {"sequence": sequence, "newest": newest})


def _spooled(
    keys: Iterable[str],
    pieces: Callable[[str], Iterator[bytes]],
    file: Path,
    task: Task,
    gone: Callable[[str], None] = lambda _key: None,
) -> Iterator[tuple[str, str, int]]:
    """(key, digest, size) of each object, whose bytes are in file until the next one. gone: called with the key of a
    kept request or an uploaded file that was deleted meanwhile. Raises Refused where an object's digest is not the one
    that its key names."""
    for key in keys:
        try:
            with file.open("wb") as stream:
                digest = digest_pieces(pieces(key), stream)
                size = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())
        except FileNotFoundError:
            if not key.startswith(_DELETED):
                raise
            gone(key)
        else:
            if named_digest(key) not in (None, digest):
                what = "the object's bytes do not have the digest that names it"
                raise Refused(what, where=key, fix="verify its version")
            yield key, digest, size
        task.advance()


def _is_key(key: str) -> bool:
    """Whether a key of a stranger's file stays within the store's folders."""
    return key.startswith(PREFIXES) and not {"", ".", ".."} & set(key.split("/")) and "\0" not in key

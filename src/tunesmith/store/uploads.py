"""Files that clients upload and jobs write for them: their bytes under `files/`, the rest in the database.

They are kept apart from the blobs, so that a deleted file is gone: no record shares its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.database import within
from tunesmith.store.locks import LockHeld, abandoned
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, FileRow

PURPOSE = "fine-tune"  # of what clients upload
_FOLDER = "files/"
_DELETED = "file.delete"  # in the audit log, with the number of the file
_LONGEST_NAME, _LONGEST_ENDING = 256, 16


class FileGone(Refused):
    """There is no such file, or not for this caller, or its bytes are missing or damaged."""


def put(
    store: Store,
    source: Path,
    *,
    name: str,
    purpose: str,
    actor: str,
    scope: Scope,
    file: str | None = None,
    digest: str | None = None,
) -> FileRow:
    """Keep a file, which is used up. source: on the store's disk (`Store.scratch`).

    digest: of its bytes, where the caller knows it. file: its id; by default a new one. An id that exists already gives
    the file that is there. Raises Refused where the actor may not do this.
    """
    require(store, actor, "file.change", scope=scope)
    file, name = file or f"file-{secrets.token_hex(12)}", _cut(name)  # nobody can guess it
    if (known := find(store, file, scope)) is not None:
        return known
    remove_leftovers(store)
    facts = {"file": file, "size": source.stat().st_size, "digest": digest or digest_file(source)}
    source.chmod(0o600)
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    key = _key(file, name)
    detail: JsonObject = {**facts, **scope.fields(), "purpose": purpose}
    with store.lock(key, "keeping an uploaded file"):  # its row tells of bytes that a killed process leaves
        try:
            store.blobs.put_file(key, source)
            with store.change(actor, "file.add", file, detail) as session:
                require(session, actor, "file.change", scope=scope)
                row = FileRow(
                    **facts, **scope.fields(), created_by=actor, name=name, purpose=purpose,
                    created=time.time(),
                )  # fmt: skip
                session.add(row)
                session.flush()
                return row
        except BaseException:
            with contextlib.suppress(Exception):
                _drop_unless_kept(store, key)
            raise


def remove_leftovers(store: Store) -> None:
    """Remove the bytes of uploads that were killed before the database knew their file."""
    for key in abandoned(store.engine, _FOLDER):
        with contextlib.suppress(LockHeld), store.lock(key, "removing what a killed upload left"):
            _drop_unless_kept(store, key)


def _drop_unless_kept(store: Store, key: str) -> None:
    """Delete a file's bytes, unless the database knows the file: an error may have come after the commit."""
    file = key.removeprefix(_FOLDER).split(".")[0]
    with store.reading() as session:
        known = session.scalars(select(FileRow.file).where(FileRow.file == file)).first()
    if known is None:
        store.blobs.delete(key)


def find(store: Store, file: str, scope: Scope) -> FileRow | None:
    """A file by its id; None where there is none that the scope covers."""
    with store.reading() as session:
        return _row(session, file, scope)


def list_files(
    store: Store, scope: Scope, *, purpose: str | None = None, after: str | None = None, most: int, oldest_first: bool
) -> list[FileRow]:
    """The files that a scope covers. after: only those behind this one in the same order, which may be deleted by now.
    Raises FileGone for an `after` that never was a file of the scope."""
    query = select(FileRow).where(*within(FileRow, scope))
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    with store.reading() as session:
        if after is not None:
            place = _place(session, after, scope)
            query = query.where(FileRow.number > place if oldest_first else FileRow.number < place)
        ordered = query.order_by(FileRow.number if oldest_first else FileRow.number.desc()).limit(most)
        return list(session.scalars(ordered))


def delete(store: Store, file: str, *, actor: str, scope: Scope) -> None:
    """Delete a file and its bytes. Killed in between, it can be deleted again. Raises FileGone, and Refused where the
    actor may not do this."""
    detail: JsonObject = {}
    with store.change(actor, _DELETED, file, detail) as session:
        require(session, actor, "file.change", scope=scope)
        row = _row(session, file, scope)
        if row is None:
            raise _gone(file)
        detail |= {"number": row.number, "tenant": row.tenant, "region": row.region}
        store.blobs.delete(_key(file, row.name))
        session.delete(row)


def _place(session: Session, file: str, scope: Scope) -> int:
    """The number of a file, of a deleted one by the audit log: who lists files page by page may delete what is listed.
    Raises FileGone for one that never was a file of the scope."""
    if (row := _row(session, file, scope)) is not None:
        return row.number
    query = select(AuditRow.detail).where(AuditRow.action == _DELETED, AuditRow.subject == file)
    for detail in session.scalars(query):
        if "number" in detail and scope.covers(Scope(detail["tenant"], detail["region"])):
            return int(detail["number"])
    raise _gone(file)


def pieces(store: Store, stored: FileRow) -> Iterator[bytes]:
    """A file's bytes. Raises FileGone where they are missing, and at their end where they are not those that came."""
    hasher = hashlib.sha256()
    try:
        for piece in store.blobs.pieces(_key(stored.file, stored.name)):
            hasher.update(piece)
            yield piece
    except FileNotFoundError:
        raise FileGone("the file's bytes are missing", where=stored.file, fix="upload it again") from None
    if f"sha256:{hasher.hexdigest()}" != stored.digest:
        raise FileGone("the file's bytes are damaged", where=stored.file, fix="upload it again")


@contextlib.contextmanager
def local_file(store: Store, stored: FileRow) -> Iterator[Path]:
    """A local file with a file's bytes, for reading. Raises FileGone where they are missing or not those that came.

    Of a bucket it is a temporary copy, which ends with the context: no other copy stays on this machine's disk.
    """
    key = _key(stored.file, stored.name)
    if isinstance(store.blobs, LocalBlobs):
        for _ in pieces(store, stored):
            pass
        yield store.blobs.path(key)
        return
    with store.scratch() as folder:
        copy = folder / Path(key).name
        with copy.open("wb") as stream:
            stream.writelines(pieces(store, stored))
        yield copy


def without_bytes(session: Session, keys: Collection[str]) -> list[str]:
    """The ids of files whose bytes are not under one of these keys."""
    rows = session.execute(select(FileRow.file, FileRow.name).order_by(FileRow.number))
    return [file for file, name in rows if _key(file, name) not in keys]


def _row(session: Session, file: str, scope: Scope) -> FileRow | None:
    row = session.scalars(select(FileRow).where(FileRow.file == file)).first()
    return row if row is not None and scope.covers(row.scope) else None


def _gone(file: str) -> FileGone:
    return FileGone("there is no such file", where=file[:80], fix="upload it again")


def _cut(name: str) -> str:
    """A name that the database takes, with its ending: by it the bytes are found."""
    if len(name) <= _LONGEST_NAME:
        return name
    return name[: _LONGEST_NAME - _LONGEST_ENDING] + Path(name).suffix[:_LONGEST_ENDING]


def _key(file: str, name: str) -> str:
    """Where a file's bytes are. Its name's ending is kept, since it says what the file holds."""
    return f"{_FOLDER}{file}{Path(name).suffix.lower()}"

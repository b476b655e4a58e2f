"""The store: blobs and records on disk under their digests, and the database beside them.

Layout under the root: `blobs/ab/<hex>`, `records/ab/<hex>.json`, `tunesmith.db`, `audit-head.json`; other folders
(`versions/`, `keys/`, `trust/`, `work/`) belong to the floors above. Everything but `work/` and `keys/` may be copied
to another path and verified there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes, digest_file, is_digest, short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.files import sync_folder, write_atomic
from tunesmith.store import audit, database
from tunesmith.store.records import Record, decode
from tunesmith.store.tables import EdgeRow, MemoRow, RecordRow


class Store:
    """Everything one installation remembers. Cheap to make; the database opens on first use."""

    def __init__(self, root: Path, url: str | None = None) -> None:
        self.root = root
        self._url = url or os.environ.get("TUNESMITH_DATABASE_URL") or f"sqlite:///{root.absolute() / 'tunesmith.db'}"

    @cached_property
    def engine(self) -> Engine:
        """The database, migrated."""
        self.root.mkdir(parents=True, exist_ok=True)
        return database.connect(self._url)

    # Blobs

    def blob_path(self, digest: str) -> Path:
        """Where the blob lies. Raises UsageError for what is not a digest, Refused where the file is missing."""
        path = self.root / "blobs" / _place(digest)
        if not path.is_file():
            raise Refused(f"blob {short(digest)} is missing from the store", where=str(path), fix="restore the file")
        return path

    def put_bytes(self, data: bytes) -> str:
        """Keep bytes; returns their digest."""
        digest = digest_bytes(data)
        path = self.root / "blobs" / _place(digest)
        if not path.exists():
            write_atomic(path, data, mode=0o444)
        return digest

    def put_file(self, source: Path) -> str:
        """Copy a file in; returns the digest of the bytes that were copied, even if the source changes meanwhile."""
        folder = self.root / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as target, source.open("rb") as stream:
                shutil.copyfileobj(stream, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            digest = digest_file(Path(name))
            path = folder / _place(digest)
            path.parent.mkdir(exist_ok=True)
            os.chmod(name, 0o444)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
        return digest

    def read_blob(self, digest: str) -> bytes:
        """The blob's bytes, held against its name. Raises Refused where they differ."""
        path = self.blob_path(digest)
        data = path.read_bytes()
        if digest_bytes(data) != digest:
            raise Refused(
                f"blob {short(digest)} does not hold the bytes its name promises",
                where=str(path),
                fix="restore the file from a backup",
            )
        return data

    # Records

    def record_path(self, digest: str) -> Path:
        """Where the record lies (whether or not it is there)."""
        return self.root / "records" / f"{_place(digest)}.json"

    def put_record(self, record: Record, session: Session | None = None) -> str:
        """Keep a record and index it; returns its digest. Its parents and blobs must be there already.

        session: index it inside the caller's write transaction, with what else happens there.
        """
        for parent in record.parents.values():
            if not self.record_path(parent).is_file():
                raise Refused(f"parent record {short(parent)} is not in the store", where=f"{record.kind} record")
        for blob in record.blobs.values():
            self.blob_path(blob)
        write_atomic(self.record_path(record.digest), record.encoded, mode=0o444)
        if session is not None:
            _index(session, record)
        else:
            with database.writing(self.engine) as own:
                _index(own, record)
        return record.digest

    def record(self, digest: str, kind: str | None = None) -> Record:
        """Read a record, held against its name and, where given, its kind."""
        path = self.record_path(digest)
        if not path.is_file():
            raise Refused(f"record {short(digest)} is not in the store", where=str(path), fix="restore the file")
        record = decode(path.read_bytes(), digest, str(path))
        if kind is not None and record.kind != kind:
            raise UsageError(f"record {short(digest)} is a {record.kind}, not a {kind}")
        return record

    def find_record(self, prefix: str) -> str:
        """The one record whose hex digest starts with prefix (`sha256:` may stand before it)."""
        prefix = prefix.removeprefix("sha256:").lower()
        if len(prefix) < 4 or any(letter not in "0123456789abcdef" for letter in prefix):
            raise UsageError(f"{prefix!r} is not the start of a digest", fix="give at least 4 hex digits")
        found = [path.stem for path in (self.root / "records" / prefix[:2]).glob(f"{prefix}*.json")]
        if len(found) != 1:
            raise UsageError(f"{len(found)} records start with {prefix}", fix="give more digits" if found else None)
        return "sha256:" + found[0]

    def children(self, digest: str) -> list[tuple[str, str, str]]:
        """(role, kind, digest) of every record that names this one as a parent."""
        with database.reading(self.engine) as session:
            rows = session.execute(
                select(EdgeRow.role, RecordRow.kind, EdgeRow.child)
                .join(RecordRow, RecordRow.digest == EdgeRow.child)
                .where(EdgeRow.parent == digest)
                .order_by(EdgeRow.role, EdgeRow.child)
            )
            return [(role, kind, child) for role, kind, child in rows]

    def records_of(self, kind: str) -> list[str]:
        """Digests of all records of a kind, oldest first."""
        with database.reading(self.engine) as session:
            query = select(RecordRow.digest).where(RecordRow.kind == kind)
            return list(session.scalars(query.order_by(RecordRow.created_at, RecordRow.digest)))

    # What a stage gave before

    def recall_memo(self, key: str) -> str | None:
        """The record that was kept for a stage's key, if its file is still there."""
        with database.reading(self.engine) as session:
            digest = session.scalar(select(MemoRow.digest).where(MemoRow.key == key))
        return digest if digest is not None and self.record_path(digest).is_file() else None

    def keep_memo(self, key: str, digest: str) -> None:
        """Remember which record a stage gave for a key."""
        with database.writing(self.engine) as session:
            session.merge(MemoRow(key=key, digest=digest))

    # Changes

    @contextlib.contextmanager
    def change(self, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> Iterator[Session]:
        """One transaction that changes state and writes its audit entry: both happen or neither.

        actor: a user's name. action: `noun.verb`. subject: a digest or name. detail: JSON. Values put into detail
        inside the block are recorded too.
        """
        with database.writing(self.engine) as session:
            yield session
            head = audit.append(session, actor=actor, action=action, subject=subject, detail=detail)
        audit.write_head(self.root, head)

    def reindex(self) -> int:
        """Rebuild the index of records from the files; returns how many there are."""
        paths = sorted((self.root / "records").glob("??/*.json"))
        with database.writing(self.engine) as session:
            for path in paths:
                _index(session, decode(path.read_bytes(), "sha256:" + path.stem, str(path)))
        return len(paths)


def _index(session: Session, record: Record) -> None:
    if session.get(RecordRow, record.digest) is not None:
        return
    session.add(RecordRow(digest=record.digest, kind=record.kind, created_at=stamp()))
    session.add_all(EdgeRow(child=record.digest, role=role, parent=parent) for role, parent in record.parents.items())


def _place(digest: str) -> str:
    if not is_digest(digest):
        raise UsageError(f"{digest[:80]!r} is not a digest", fix="a digest is sha256: and 64 hex digits")
    hexadecimal = digest.removeprefix("sha256:")
    return f"{hexadecimal[:2]}/{hexadecimal}"

"""The store: blobs, records and version folders under keys, and the database.

Keys: `blobs/ab/<hex>`, `records/ab/<hex>.json`, `versions/NAME/vN/<file>`, `trust/<file>`, `cases/<request>.json`,
`files/<file id>.jsonl`, `erasures/<number>.json`, `store.json`. They are in a BlobStore, by default the folder
`root`. The database is `root/tunesmith.db` by default. What belongs to this machine only (work folders, private keys,
where bases were found, the cache of a bucket) is in folders that `local` names.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from pathlib import Path

from sqlalchemy import Engine, make_url, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes, digest_file, is_digest, short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import Fields
from tunesmith.core.system.files import copy_durably, room_for
from tunesmith.core.system.scratch import remove_leftovers, scratch_folder
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import Frozen
from tunesmith.store import audit, database, locks
from tunesmith.store.blobs import BlobStore, named_digest
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.records import Record, decode
from tunesmith.store.tables import AuditRow, EdgeRow, ErasedRow, MemoRow, RecordRow

# The file that makes a version's folder complete: it is written last.
RELEASE = "release.json"
# What every key begins with.
PREFIXES = ("blobs/", "records/", "versions/", "trust/", "cases/", "files/", "erasures/", "holds/")
# Of the signed statements of erasures.
ERASURES, HOLDS = "erasures/", "holds/"
# The action that deletes records, and for how long files may go after its entry in the log.
PRUNE, _LATELY = "store.prune", timedelta(days=1)
# The database's file, where it is SQLite.
DATABASE = "tunesmith.db"
# The object that says whose files these are.
MARKER = "store.json"


class Marker(Frozen):
    """store: the id that the database holds too. filling: `restore` or `migrate` until it ends. backup: the file of the
    newest backup, or of the restore."""

    store: str = ""
    filling: str = ""
    backup: str = ""


class Store:
    """Everything that one installation keeps. Cheap to create; the database opens on first use.

    root: a local folder. url: the database's SQLAlchemy URL; by default $TUNESMITH_DATABASE_URL, else SQLite in root.
    blobs: by default the bucket of $TUNESMITH_BLOBS_URL, else the files in root. erased: digests of what erasures
    rewrote -> of what they left, where no database says it.
    """

    def __init__(
        self,
        root: Path,
        url: str | None = None,
        blobs: BlobStore | None = None,
        erased: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.blobs = blobs or _blobs(root)
        self._erased = erased
        self.url = url or os.environ.get("TUNESMITH_DATABASE_URL") or f"sqlite:///{root.absolute() / DATABASE}"

    @cached_property
    def engine(self) -> Engine:
        """The database, migrated. Raises Refused where it is not that of the files, or a copy of them has not ended."""
        self._require_new(only_filled=True)
        engine = self._connect(self._require_new)
        held, known = database.store_id(engine), self.marker().store
        if not held:
            raise self._lost()
        if known not in ("", held):
            fix = "name the database and the files of one store: TUNESMITH_DATABASE_URL, TUNESMITH_BLOBS_URL"
            raise Refused("the database is of another store than the files", where=self.blobs.where(MARKER), fix=fix)
        if not known:
            with contextlib.suppress(TunesmithError, OSError):  # whoever may only read writes none
                self.mark(store=held)
        return engine

    def engine_to_fill(self) -> Engine:
        """The database for a copy to fill, without an id where it is new. `engine` is the same from here on."""
        self.engine = self._connect(None)
        return self.engine

    def _connect(self, new: Callable[[], None] | None) -> Engine:
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in (self.local("work"), Path(tempfile.gettempdir())):
            remove_leftovers(folder)
        return database.connect(self.url, new)

    def marker(self) -> Marker:
        """What the files say of the store; nothing where they are of none, or of an older version."""
        try:
            return Marker.model_validate_json(self.blobs.get(MARKER))
        except FileNotFoundError:
            return Marker()
        except ValueError as error:
            raise Refused("this file was changed", where=self.blobs.where(MARKER), fix="delete it") from error

    def mark(self, **changes: str) -> None:
        """Change fields of the marker."""
        self.blobs.put(MARKER, self.marker().model_copy(update=changes).model_dump_json().encode())

    def _require_new(self, *, only_filled: bool = False) -> None:
        """Raise Refused where a restore or a migration has not ended, or files say that a database was here."""
        marker = self.marker()
        if marker.filling:
            again = "run the same command again to finish it"
            fix = NextStep(again, "restore", file=marker.backup) if marker.filling == "restore" else again
            raise Refused(f"a {marker.filling} is under way here", where=self.blobs.where(MARKER), fix=fix)
        if not only_filled and (marker.store or any(next(self.blobs.keys(each), None) for each in PREFIXES)):
            raise self._lost()

    def _lost(self) -> Refused:
        where = make_url(self.url).render_as_string(hide_password=True)
        fix = "name the database of these files (TUNESMITH_DATABASE_URL), or put the last backup back"
        step = NextStep(fix, "restore", file=self.marker().backup or ...)
        return Refused("the database is missing or empty, but the store's files are here", where=where, fix=step)

    def reading(self) -> AbstractContextManager[Session]:
        """A read-only session."""
        return database.reading(self.engine)

    def writing(self) -> AbstractContextManager[Session]:
        """One write transaction; writers take turns. Commits at the end, rolls back on any exception."""
        return database.writing(self.engine)

    @contextlib.contextmanager
    def fenced(self, check: Callable[[Session], None]) -> Iterator[None]:
        """Call check first in every write transaction of this object meanwhile; what it raises ends the transaction."""
        before = self.engine
        self.engine = database.fenced(before, check)
        try:
            yield
        finally:
            self.engine = before

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the store's disk, so that a file can be renamed from it into the store."""
        work, _ = self.local("work"), self.engine
        work.mkdir(parents=True, exist_ok=True)
        with room_for(work), scratch_folder(work) as folder:
            yield folder

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds a store's records itself."""
        return (folder / "records").is_dir()

    @property
    def is_made(self) -> bool:
        """Whether there is something to look at: the local folder, or a bucket that others may have filled."""
        return self.root.is_dir() or not isinstance(self.blobs, LocalBlobs)

    def local(self, *parts: str) -> Path:
        """A path for what belongs to this machine only: `work`, `keys`, `bases`. Work folders may be deleted."""
        return self.root.joinpath(*parts)

    def lock(self, name: str, purpose: str) -> AbstractContextManager[None]:
        """Hold a lock between processes. Raises TunesmithError at once where another holds it."""
        return locks.lock(self.engine, name, purpose)

    # Blobs

    def left_of(self, digest: str, key_of: Callable[[str], str]) -> str:
        """The digest of what there is now of a blob or record: its own, or of what erasures left of it.

        key_of: blob_key or record_key. An erasure that was signed and not carried out yet has left nothing so far, so
        this is the first of old -> new -> ... that the store holds; where it holds none, the last.
        """
        while not self.blobs.exists(key_of(digest)):
            erased = self._erased if self._erased is not None else self._known_erased(digest)
            if digest not in erased:
                break
            digest = erased[digest]
        return digest

    def _known_erased(self, digest: str) -> Mapping[str, str]:
        with self.reading() as session:
            new = session.scalar(select(ErasedRow.new).where(ErasedRow.old == digest))
        return {digest: new} if new else {}

    def blob_path(self, digest: str) -> Path:
        """A local file with the blob's bytes. Raises Refused where it is missing, UsageError for no digest."""
        return self.blobs.path(self._blob(digest))

    def blob_where(self, digest: str) -> str:
        """Where a blob is kept, for messages."""
        return self.blobs.where(blob_key(digest))

    def blob_pieces(self, digest: str) -> Iterator[bytes]:
        """The blob's bytes as the store itself keeps them, unchecked. Raises Refused where it is missing."""
        return self.blobs.pieces(self._blob(digest))

    def _blob(self, digest: str) -> str:
        """The key of a blob, or of what erasures left of it. Raises Refused where it is missing."""
        key = blob_key(self.left_of(digest, blob_key))
        if not self.blobs.exists(key):
            what = f"blob {short(digest)} is missing from the store"
            raise Refused(what, where=self.blobs.where(key), fix="restore the file")
        return key

    def put_bytes(self, data: bytes) -> str:
        """Keep bytes; returns their digest."""
        digest = digest_bytes(data)
        key = blob_key(digest)
        if not self.blobs.exists(key):
            _ = self.engine  # a new store begins with its database
            self.blobs.put(key, data)
        return digest

    def put_file(self, source: Path) -> str:
        """Copy a file in; returns the digest of the bytes that were copied, even if the source changes meanwhile."""
        with self.scratch() as folder:
            copy = folder / "blob"
            copy_durably(source, copy)
            digest = digest_file(copy)
            self.blobs.put_file(blob_key(digest), copy)
        return digest

    def read_blob(self, digest: str) -> bytes:
        """The blob's bytes, or what erasures left of them, compared with the digest. Raises Refused if they differ."""
        key = self._blob(digest)
        try:
            data = self.blobs.get(key)
        except FileNotFoundError:  # an erasure has just rewritten it
            data = self.blobs.get(key := self._blob(digest))
        if digest_bytes(data) != named_digest(key):
            raise Refused(
                f"the bytes of blob {short(digest)} do not have that digest",
                where=self.blob_where(digest),
                fix="restore the file from a backup",
            )
        return data

    # Records

    def record_where(self, digest: str) -> str:
        """Where a record is kept, for messages, whether or not it exists."""
        return self.blobs.where(record_key(digest))

    def has_record(self, digest: str) -> bool:
        """Whether the store holds a record."""
        return self.blobs.exists(record_key(self.left_of(digest, record_key)))

    def put_record(self, record: Record, session: Session | None = None) -> str:
        """Keep a record and index it; returns its digest. Its parents and blobs must be in the store already.

        session: index it inside the caller's write transaction, with what else happens there.
        """
        self.write_record(record)
        with self.writing() if session is None else contextlib.nullcontext(session) as own:
            self.index_record(record, own)
        return record.digest

    def write_record(self, record: Record) -> None:
        """Keep a record's bytes, without its place in the index. Its parents and blobs must be in the store already."""
        for parent in record.parents.values():
            if not self.has_record(parent):
                raise Refused(f"parent record {short(parent)} is not in the store", where=f"{record.kind} record")
        for blob in record.blobs.values():
            self._blob(blob)
        _ = self.engine
        self.blobs.put(record_key(record.digest), record.encoded)

    def index_record(self, record: Record, session: Session) -> None:
        """Index a record whose bytes are kept, inside the caller's write transaction.

        Raises Refused where its parents or files were pruned since they were found there. Whether files are there is
        asked only if somebody pruned lately: a bucket takes long to say so, and other writers wait meanwhile.
        """
        if session.get(RecordRow, record.digest) is not None:
            return
        parents = set(record.parents.values())
        indexed = session.scalars(select(RecordRow.digest).where(RecordRow.digest.in_(parents)))
        pruned = select(AuditRow.seq).where(AuditRow.action == PRUNE, AuditRow.at > stamp(-_LATELY))
        check = session.scalar(pruned.limit(1)) is not None
        if parents.difference(indexed) or (check and not self.has_record(record.digest)):
            what = f"this {record.kind} record, or one that it was made from, was pruned meanwhile"
            raise Refused(what, where=self.record_where(record.digest), fix="run the same command again")
        for blob in record.blobs.values() if check else ():
            self._blob(blob)
        session.add(RecordRow(digest=record.digest, kind=record.kind, created_at=stamp()))
        edges = record.parents.items()
        session.add_all(EdgeRow(child=record.digest, role=role, parent=parent) for role, parent in edges)

    def record(self, digest: str, kind: str | None = None, *, cached: bool = True) -> Record:
        """Read a record, compared with its digest and, where given, its kind.

        cached: a local copy of it will do.
        """
        kept, data = self.record_bytes(digest, cached=cached)
        record = decode(data, kept, self.record_where(digest))
        if kept != digest:
            vars(record)["digest"] = digest  # its name stays, for all that name it
        if kind is not None and record.kind != kind:
            raise UsageError(f"record {short(digest)} is a {record.kind}, not a {kind}")
        return record

    def record_bytes(self, digest: str, *, cached: bool = True) -> tuple[str, bytes]:
        """(digest, bytes) of a record, or of what erasures left of it, not compared. Raises Refused where it is
        missing."""
        read = self.blobs.get if cached else lambda key: b"".join(self.blobs.pieces(key))
        with contextlib.suppress(FileNotFoundError):
            return digest, read(record_key(digest))
        kept = self.left_of(digest, record_key)
        with contextlib.suppress(FileNotFoundError):
            return kept, read(record_key(kept))
        what, fix = f"record {short(digest)} is not in the store", "restore the file, unless the log says it was pruned"
        raise Refused(what, where=self.record_where(digest), fix=fix)

    def find_record(self, prefix: str) -> str:
        """The one record whose hex digest starts with prefix, with or without `sha256:`."""
        prefix = prefix.removeprefix("sha256:").lower()
        if len(prefix) < 4 or any(letter not in "0123456789abcdef" for letter in prefix):
            raise UsageError(f"{prefix!r} is not the start of a digest", fix="give at least 4 hex digits")
        named = ("sha256:" + Path(key).stem for key in self.blobs.keys(f"records/{prefix[:2]}/"))
        digests = [digest for digest in named if digest[7:].startswith(prefix)]
        if len(digests) != 1:
            raise UsageError(f"{len(digests)} records start with {prefix}", fix="give more digits" if digests else None)
        return digests[0]

    def children(self, digest: str) -> list[tuple[str, str, str]]:
        """(role, kind, digest) of every record that names this one as a parent."""
        with self.reading() as session:
            rows = session.execute(
                select(EdgeRow.role, RecordRow.kind, EdgeRow.child)
                .join(RecordRow, RecordRow.digest == EdgeRow.child)
                .where(EdgeRow.parent == digest)
                .order_by(EdgeRow.role, EdgeRow.child)
            )
            return [(role, kind, child) for role, kind, child in rows]

    def times_of(self, digests: Iterable[str]) -> dict[str, str]:
        """When each record was made, by its digest; without those that the database does not have."""
        query = select(RecordRow.digest, RecordRow.created_at).where(RecordRow.digest.in_(digests))
        with self.reading() as session:
            return {row.digest: row.created_at for row in session.execute(query)}

    def records_of(self, kind: str) -> list[str]:
        """Digests of all records of a kind, oldest first."""
        query = select(RecordRow.digest).where(RecordRow.kind == kind)
        with self.reading() as session:
            return list(session.scalars(query.order_by(RecordRow.created_at, RecordRow.digest)))

    # Version folders

    def version_folder(self, ref: VersionRef) -> Path:
        """A local folder with a version's files, for reading."""
        return self.blobs.folder(_version_key(ref))

    def read_release(self, ref: VersionRef) -> bytes:
        """The bytes of a version's release. Raises FileNotFoundError."""
        return self.blobs.get(_version_key(ref) + RELEASE)

    def put_version(self, ref: VersionRef, folder: Path) -> None:
        """Move the files of a finished folder in. A folder that a stopped process left incomplete is replaced."""
        self.drop_version(ref)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == RELEASE):  # the release last
            self.blobs.put_file(_version_key(ref) + path.name, path)

    def drop_version(self, ref: VersionRef) -> None:
        """Remove a version's files, its release first, so that no incomplete folder looks complete."""
        keys = list(self.blobs.keys(_version_key(ref)))
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{RELEASE}")):
            self.blobs.delete(key)

    def version_folders(self, name: str = "") -> list[VersionRef]:
        """The versions whose folder is complete, registered or not: of one name, or of all."""
        prefix = f"versions/{name}/" if name else "versions/"
        refs = []
        for key in self.blobs.keys(prefix):
            parts = key.split("/")
            if len(parts) == 4 and parts[3] == RELEASE:
                with contextlib.suppress(UsageError):  # a folder that the store did not make
                    refs.append(VersionRef.parse(f"{parts[1]}@{parts[2]}"))
        return refs

    # Memos: what a stage gave for the same inputs

    def recall_memo(self, key: str) -> str | None:
        """The record that was kept for a stage's key, if its file is still there."""
        with self.reading() as session:
            digest = session.scalar(select(MemoRow.digest).where(MemoRow.key == key))
        return digest if digest is not None and self.has_record(digest) else None

    def keep_memo(self, key: str, digest: str) -> None:
        """Remember which record a stage gave for a key."""
        with self.writing() as session:
            session.merge(MemoRow(key=key, digest=digest))

    # Changes

    @contextlib.contextmanager
    def change(self, actor: str, action: str, subject: str, detail: Fields) -> Iterator[Session]:
        """One transaction that changes state and writes its audit entry: both happen or neither.

        actor: a user's name. action: `noun.verb`. subject: a digest or name. detail: JSON. Values put into detail
        inside the block are recorded too.
        """
        with self.writing() as session:
            yield session
            audit.append(session, actor=actor, action=action, subject=subject, detail=detail)


def session_of(where: Store | Session) -> AbstractContextManager[Session]:
    """The caller's session, or one that reads a store."""
    return contextlib.nullcontext(where) if isinstance(where, Session) else where.reading()


def _blobs(root: Path) -> BlobStore:
    """Where $TUNESMITH_BLOBS_URL says, else the files in root."""
    url = os.environ.get("TUNESMITH_BLOBS_URL")
    if not url:
        return LocalBlobs(root)
    from tunesmith.store.blobs.s3 import S3Blobs

    given = os.environ.get("TUNESMITH_BLOBS_CACHE_GB", "20")
    if not given.isdecimal() or int(given) == 0:
        raise UsageError(f"{given!r} is not a number of gigabytes", where="TUNESMITH_BLOBS_CACHE_GB", fix="write 20")
    return S3Blobs(url, root / "cache", int(given) * 10**9)


def blob_key(digest: str) -> str:
    """Where a blob is kept."""
    return f"blobs/{_hex(digest)[:2]}/{_hex(digest)}"


def record_key(digest: str) -> str:
    """Where a record is kept."""
    return f"records/{_hex(digest)[:2]}/{_hex(digest)}.json"


def _version_key(ref: VersionRef) -> str:
    return f"versions/{ref.name}/v{ref.number}/"


def _hex(digest: str) -> str:
    if not is_digest(digest):
        raise UsageError(f"{digest[:80]!r} is not a digest", fix="a digest is sha256: and 64 hex digits")
    return digest.removeprefix("sha256:")

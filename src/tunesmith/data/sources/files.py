"""Source files: which ones a project names, opened so that nothing else can stand in their place, and their rows."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.settings import Source
from tunesmith.data.sources import remote
from tunesmith.data.sources.compression import endings, require_content, unpacked
from tunesmith.data.sources.row_readers import READERS, WHOLE, Part, parquet_parts
from tunesmith.data.sources.saved_datasets import dataset_files

_PIECE = 1 << 20


_LOCAL = ("file", "local")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read. number counts from 1: the line in JSONL, the record elsewhere."""

    source: str
    number: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """For error messages."""
        return f"{self.source}, row {self.number}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file and the settings it stands under.

    name: its path from the project or its URL, as records keep it. path: where it lies; None for one that is fetched.
    """

    name: str
    path: Path | None
    source: Source

    def digest(self) -> str:
        """The digest of the file's bytes now."""
        with open_source(self) as opened:
            return opened.digest


def find_files(sources: Sequence[Source], root: Path) -> list[SourceFile]:
    """The files that the sources name, in the order of their names.

    Raises UsageError for a pattern without files, a file named twice, and what is no regular file.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        for file in _files_of(source, root):
            if file.name in found:
                raise UsageError(
                    "two sources name the same file", where=file.name, fix="let their patterns not overlap"
                )
            found[file.name] = file
    return [found[name] for name in sorted(found)]


def _files_of(source: Source, root: Path) -> Iterator[SourceFile]:
    protocol, pattern = remote.protocol_of(source.path), source.path
    if protocol in _LOCAL:
        pattern = pattern.split("://", 1)[1]
    elif protocol is not None:
        yield from (SourceFile(url, None, source) for url in remote.find_remote(pattern))
        return
    matches = _matches(pattern, root)
    if not matches:
        _require_looked_into(pattern, root, source.path)
        raise UsageError("no file fits this source", where=source.path, fix=f"paths start at {root.absolute()}")
    for match in matches:
        name = Path(os.path.relpath(root / match, root)).as_posix()
        mode = os.lstat(root / match).st_mode
        inside = dataset_files(root / match, name) if stat.S_ISDIR(mode) else None
        if inside is None:
            _require_regular(mode, name)
            yield SourceFile(name, root / match, source)
        for each in inside or ():
            _require_regular(os.lstat(root / match / each).st_mode, f"{name}/{each}")
            yield SourceFile(f"{name}/{each}", root / match / each, source)


def _matches(pattern: str, root: Path) -> list[str]:
    if os.path.lexists(root / pattern):  # a name may hold brackets and stars and be no pattern
        return [pattern]
    return sorted(glob.glob(pattern, root_dir=root, recursive=True))


def _require_looked_into(pattern: str, root: Path, name: str) -> None:
    """Raises UsageError where a folder on the pattern's plain beginning may not be looked into."""
    plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    last, *above = (root / plain).parents
    for folder in [*reversed(above), last]:
        needed = os.X_OK | (os.R_OK if folder == last else 0)
        if folder.is_dir() and not os.access(folder, needed, effective_ids=True):
            raise UsageError(
                f"the folder {folder.name} cannot be looked into: Permission denied",
                where=name,
                fix="let the user that runs this read the folder",
            )


class OpenSource:
    """A source file held open: its rows, and the digest of the bytes they were read from (packed, if they are).

    digested: False leaves the digest empty, for a part of a file whose digest was taken before.
    """

    def __init__(self, file: SourceFile, stream: BinaryIO, *, digested: bool = True) -> None:
        self.file, self._stream = file, stream
        self.bytes = os.fstat(stream.fileno()).st_size
        if self.bytes == 0:
            raise UsageError("the file is empty", where=file.name, fix="give a file with rows, or leave it out")
        self._kind, self._packed = endings(file.name)
        require_content(stream, file.name)
        self.digest = _digest(stream) if digested else ""

    def position(self) -> int:
        """Bytes read so far, for progress."""
        return self._stream.tell()

    def rows(self, part: Part = WHOLE) -> Iterator[Row]:
        """The rows in order. Raises UsageError at the first that cannot be read, or if the file changes meanwhile."""
        count = 0
        for row in self.read(part):
            count += 1
            yield row
        if count == 0:
            raise UsageError("the file holds no rows", where=self.file.name)
        self.require_unchanged()

    def read(self, part: Part) -> Iterator[Row]:
        """The rows of a part of the file, which may be none."""
        self._require_rows()
        self._stream.seek(0)
        name = self.file.name
        stream = self._stream if self._packed is None else unpacked(self._stream, name, self._packed)
        for number, fields in READERS[self._kind](stream, name, part):
            yield Row(name, number, fields)

    def parts(self, size: int) -> list[Part]:
        """The file in parts that can be read apart, of about size bytes where its type lets it; else in one."""
        self._require_rows()
        if self._packed is None and self._kind in (".jsonl", ".ndjson"):
            return _line_parts(self._stream, size)
        if self._kind == ".parquet":
            return parquet_parts(self._stream, self.file.name) or [WHOLE]
        return [WHOLE]

    def _require_rows(self) -> None:
        if self._kind not in READERS:
            kind = self._kind or "a file without an ending"
            raise UsageError(f"rows are not read from {kind}", where=self.file.name, fix=", ".join(sorted(READERS)))

    def require_unchanged(self) -> None:
        """Raise TunesmithError where the file is not what it was when it was opened."""
        if _digest(self._stream) != self.digest:
            raise TunesmithError("the file changed while it was read", where=self.file.name, fix="run again")


@contextlib.contextmanager
def open_source(file: SourceFile, *, digested: bool = True) -> Iterator[OpenSource]:
    """Open a regular file. A folder, link, FIFO, socket or device in its place is a UsageError, never waited on.

    One that is elsewhere is fetched first, into the folder for temporary files.
    """
    with _stream_of(file) as stream:
        yield OpenSource(file, stream, digested=digested)


@contextlib.contextmanager
def fetched(file: SourceFile, folder: Path) -> Iterator[SourceFile]:
    """The file with a path: its own, or that of a copy in folder which is there for as long as the context."""
    if file.path is not None:
        yield file
        return
    with _copy(file.name, folder) as stream:
        yield SourceFile(file.name, Path(stream.name), file.source)


@contextlib.contextmanager
def _stream_of(file: SourceFile) -> Iterator[BinaryIO]:
    if file.path is None:
        with _copy(file.name, None) as stream:
            yield stream
        return
    try:
        handle = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot be opened: {error.strerror}", where=file.name) from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, handle)
        _require_regular(os.fstat(handle).st_mode, file.name)
        undo.pop_all()
    with os.fdopen(handle, "rb") as stream:
        yield stream


@contextlib.contextmanager
def _copy(url: str, folder: Path | None) -> Iterator[Any]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="fetched-") as stream:
            remote.fetch(url, stream)  # type: ignore[arg-type]
            yield stream
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise TunesmithError("the disk is full", where=url, fix="make room, or set TMPDIR to another disk") from error


def _require_regular(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise UsageError(f"{kind} stands in place of a file", where=name, fix="name a regular file, or a pattern of files")


def _digest(stream: BinaryIO) -> str:
    stream.seek(0)
    return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _line_parts(stream: BinaryIO, size: int) -> list[Part]:
    """Parts of whole lines, of at least size bytes each but the last, with the numbers of their first lines."""
    stream.seek(0)
    starts = [(0, 1)]  # (offset, number of the line there)
    offset = lines = 0
    while piece := stream.read(_PIECE):
        while (wanted := starts[-1][0] + size - offset) <= len(piece):  # where in this piece the next part may begin
            cut = piece.find(b"\n", max(0, wanted - 1)) + 1
            if not cut:
                break
            starts.append((offset + cut, 1 + lines + piece.count(b"\n", 0, cut)))
        lines += piece.count(b"\n")
        offset += len(piece)
    if len(starts) > 1 and starts[-1][0] >= offset:
        starts.pop()
    stops = [start for start, _ in starts[1:]]
    parts = [Part(start, stop, line) for (start, line), stop in zip(starts, stops, strict=False)]
    return [*parts, Part(*starts[-1][:1], None, starts[-1][1])]

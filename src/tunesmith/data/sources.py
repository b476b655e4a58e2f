"""Reading rows out of files: JSONL, JSON, CSV and Parquet, each error with file, row and key."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.data.settings import Source

# A longer line is no row of text but a file of another kind, or an attempt to fill the memory.
LONGEST_ROW = 64 << 20
# A JSON array is parsed whole.
LARGEST_JSON = 1 << 30


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
    """A file and the settings it stands under. name is its path from the project, as records keep it."""

    name: str
    path: Path
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
        matches = _matches(source.path, root)
        if not matches:
            raise UsageError("no file fits this source", where=source.path, fix=f"paths start at {root.absolute()}")
        for match in matches:
            name = Path(os.path.relpath(root / match, root)).as_posix()
            if name in found:
                raise UsageError("two sources name the same file", where=name, fix="let their patterns not overlap")
            _require_regular(os.lstat(root / match).st_mode, name)
            found[name] = SourceFile(name, root / match, source)
    return [found[name] for name in sorted(found)]


def _matches(pattern: str, root: Path) -> list[str]:
    if os.path.lexists(root / pattern):  # a name may hold brackets and stars and be no pattern
        return [pattern]
    return sorted(glob.glob(pattern, root_dir=root, recursive=True))


class OpenSource:
    """A source file held open: its rows, and the digest of the bytes they were read from."""

    def __init__(self, file: SourceFile, stream: BinaryIO) -> None:
        self.file, self._stream = file, stream
        self.bytes = os.fstat(stream.fileno()).st_size
        if self.bytes == 0:
            raise UsageError("the file is empty", where=file.name, fix="give a file with rows, or leave it out")
        self.digest = _digest(stream)

    def position(self) -> int:
        """Bytes read so far, for progress."""
        return self._stream.tell()

    def rows(self) -> Iterator[Row]:
        """The rows in order. Raises UsageError at the first that cannot be read, or if the file changes meanwhile."""
        self._stream.seek(0)
        count = 0
        for number, fields in _reader(self.file)(self._stream, self.file.name):
            count += 1
            yield Row(self.file.name, number, fields)
        if count == 0:
            raise UsageError("the file holds no rows", where=self.file.name)
        self._stream.seek(0)
        if _digest(self._stream) != self.digest:
            raise TunesmithError("the file changed while it was read", where=self.file.name, fix="run again")


@contextlib.contextmanager
def open_source(file: SourceFile) -> Iterator[OpenSource]:
    """Open a regular file. A folder, link, FIFO, socket or device in its place is a UsageError, never waited on."""
    try:
        handle = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot be opened: {error.strerror}", where=file.name) from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, handle)
        _require_regular(os.fstat(handle).st_mode, file.name)
        undo.pop_all()
    with os.fdopen(handle, "rb") as stream:
        yield OpenSource(file, stream)


def _require_regular(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise UsageError(f"{kind} stands in place of a file", where=name, fix="name a regular file, or a pattern of files")


def _digest(stream: BinaryIO) -> str:
    return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


Reader = Callable[[BinaryIO, str], Iterator[tuple[int, Mapping[str, Any]]]]


def _reader(file: SourceFile) -> Reader:
    ending = file.path.suffix.lower()
    if ending not in READERS:
        known = ", ".join(sorted(READERS))
        raise UsageError(f"rows are not read from {ending or 'a file without an ending'}", where=file.name, fix=known)
    return READERS[ending]


def _read_jsonl(stream: BinaryIO, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > LONGEST_ROW:
            raise UsageError(f"the line is longer than {LONGEST_ROW >> 20} MiB", where=where, fix="one row a line")
        text = _decode(line, where, first=number == 1).strip()
        if text:
            yield number, _as_fields(_parse(text, where), where)


def _read_json(stream: BinaryIO, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise UsageError("a JSON array is read whole, and this one is too large", where=name, fix="make it JSONL")
    rows = _parse(_decode(data, name, first=True), name)
    if not isinstance(rows, list):
        raise UsageError("the JSON is not a list of rows", where=name, fix="write [row, row, ...], or use .jsonl")
    for number, row in enumerate(rows, start=1):
        yield number, _as_fields(row, f"{name}, row {number}")


def _read_csv(stream: BinaryIO, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(LONGEST_ROW)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        table = csv.DictReader(text, strict=True)
        header = table.fieldnames or []
        if "" in header or len(set(header)) != len(header):
            raise UsageError(f"the header has empty or repeated names: {header}", where=name)
        for number, row in enumerate(table, start=1):
            if None in row or None in row.values():
                raise UsageError(f"not {len(header)} fields, as the header has", where=f"{name}, line {table.line_num}")
            yield number, row
    except csv.Error as error:
        raise UsageError(f"broken CSV: {error}", where=f"{name}, line {table.line_num}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason}", where=name, fix="convert the file to UTF-8") from error
    finally:
        text.detach()


def _read_parquet(stream: BinaryIO, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(arrow.PythonFile(stream, mode="r")).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"broken Parquet: {error}", where=f"{name}, after row {number}") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every key of a struct to every row; a null there means that the row has no such key."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(data: bytes, where: str, *, first: bool) -> str:
    """UTF-8, with the byte order mark that some editors put at the start of a file left out."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 at byte {error.start + 1}: {error.reason}", where=where, fix="convert the file to UTF-8"
        ) from error


def _parse(text: str, where: str) -> Any:
    """Strict JSON: no repeated keys, no NaN, no infinities."""
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"broken JSON: {error.msg}", where=f"{where}, {place}", fix="correct the row") from None
    except RecursionError:
        raise UsageError("the JSON is nested too deep", where=where) from None
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=where, fix="correct the row") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return fields


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _as_fields(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"a row is an object, and this is a {type(row).__name__}", where=where)
    return row

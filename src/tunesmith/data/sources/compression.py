"""Compressed files, and files that are not what their names say.

gzip, bzip2 and xz are read by Python's own modules, Zstandard by Arrow's codec. What unpacks to far more than it was is
stopped while it is read, so a small file cannot fill the memory or keep a build busy for days.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Text packs 3 to 30 times smaller; runs of one letter a thousand times. Little output is let through at any ratio.
HIGHEST_RATIO = 200
LITTLE = 64 << 20

NAMES: Final = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_ARCHIVES: Final = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
_MAGIC: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"PAR1", "Parquet"),
    (b"ARROW1\0\0", "Arrow"),
    (b"\xff\xff\xff\xff", "Arrow"),
    (b"PK\3\4", "a zip archive"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
)
_TAR_MARK: Final = (257, b"ustar")
_LOOKED_AT: Final = 512
# Which contents only these endings may have.
_BINARY: Final = {".parquet": "Parquet", ".arrow": "Arrow"}


def endings(name: str) -> tuple[str, str | None]:
    """(the type's ending, the compression's or None) of a file's name: `a.jsonl.gz` is (".jsonl", ".gz").

    Raises UsageError for archives of several files and for types that are compressed inside.
    """
    path = PurePosixPath(name)
    last = path.suffix.lower()
    if last in _ARCHIVES:
        raise UsageError(f"{last} may hold several files", where=name, fix="unpack it and name the files in it")
    if last not in NAMES:
        return last, None
    inner = PurePosixPath(path.stem).suffix.lower()
    if inner in _ARCHIVES:
        raise UsageError(f"{inner} may hold several files", where=name, fix="unpack it and name the files in it")
    if inner in _BINARY:
        raise UsageError(
            f"{_BINARY[inner]} is compressed inside", where=name, fix=f"unpack it: it is not read from {last}"
        )
    return inner, last


def require_content(stream: BinaryIO, name: str) -> None:
    """Raise UsageError where the first bytes are not what the name says. stream is left at its beginning."""
    kind, packed = endings(name)
    stream.seek(0)
    found = content_of(stream.read(_LOOKED_AT))
    stream.seek(0)
    if packed is not None:
        if found != NAMES[packed]:
            raise UsageError(
                f"the name says {NAMES[packed]}, the content is {found or 'not'}",
                where=name,
                fix="name it for what it is",
            )
        with unpacked(stream, name, packed) as inside:
            found = content_of(inside.read(_LOOKED_AT))
        stream.seek(0)
    if found is not None and found != _BINARY.get(kind):
        raise UsageError(
            f"the name says {kind.removeprefix('.') or 'nothing'}, the content is {found}",
            where=name,
            fix="name it for what it is, or unpack it",
        )


def content_of(first: bytes) -> str | None:
    """What a file's first bytes tell; None for text and for what is not known."""
    start, mark = _TAR_MARK
    if first[start : start + len(mark)] == mark:
        return "a tar archive"
    found = next((name for magic, name in _MAGIC if first.startswith(magic)), None)
    # These three begin with letters, which a table may too.
    if found in ("bzip2", "Parquet", "a PDF document") and first.isascii() and b"\0" not in first:
        return None
    return found


def unpacked(stream: BinaryIO, name: str, packed: str) -> BinaryIO:
    """The unpacked bytes of stream, read as they are asked for. packed: an ending out of NAMES.

    Reading raises UsageError for a damaged or cut off file and for one that unpacks to HIGHEST_RATIO times its size.
    """
    return io.BufferedReader(_Unpacked(stream, name, packed), 1 << 16)


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: BinaryIO, name: str, packed: str) -> None:
        self._stream, self._name, self._packed = stream, name, packed
        self._inner: Any = _opened(stream, packed)
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer).cast("B")
        try:
            data = self._inner.read(len(room))
        except EOFError:
            raise self._broken("is cut off") from None
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise self._broken("is cut off" if "runcated" in str(error) else f"is damaged: {error}") from error
        room[: len(data)] = data
        self._total += len(data)
        if self._total > LITTLE and self._total > HIGHEST_RATIO * max(1, self._stream.tell()):
            raise UsageError(
                f"the file unpacks to over {HIGHEST_RATIO} times its size, as no text does",
                where=f"{self._name}, after {self._total} bytes",
                fix="unpack it and look what it holds",
            )
        return len(data)

    def _broken(self, how: str) -> UsageError:
        where = f"{self._name}, after {self._total} bytes"
        return UsageError(f"the {NAMES[self._packed]} file {how}", where=where, fix="copy or pack it again")


def _opened(stream: BinaryIO, packed: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if packed == ".bz2":
        return bz2.BZ2File(stream)
    if packed == ".xz":
        return lzma.LZMAFile(stream)
    import pyarrow as arrow

    return arrow.CompressedInputStream(arrow.PythonFile(_Lent(stream), mode="r"), "zstd")


class _Lent(io.RawIOBase):
    """A stream that stays open when its borrower closes it, as Arrow does."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer).cast("B")
        data = self._stream.read(len(room))
        room[: len(data)] = data
        return len(data)

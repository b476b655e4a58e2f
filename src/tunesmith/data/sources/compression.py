"""Compressed source files, and files whose content is not what their name says.

Python's modules read gzip, bzip2 and xz; Arrow's codec reads Zstandard. A file that unpacks to far more than its size
is refused during reading. Otherwise a small file could fill the memory or keep a build busy for days.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.data.sources.file_types import BINARY

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Text compresses 3 to 30 times; a run of one letter compresses 1000 times. Up to LITTLE bytes any ratio is accepted.
HIGHEST_RATIO = 200
LITTLE = 64 << 20


class Compression(NamedTuple):
    """magic: the first bytes of every such file. open: a packed stream -> one of the unpacked bytes."""

    name: str
    magic: bytes
    open: Callable[[BinaryIO], Any]


def _open_zstandard(stream: BinaryIO) -> Any:
    import pyarrow as arrow

    kept_open = SimpleNamespace(read=stream.read, closed=False, close=lambda: None)  # when Arrow closes it
    return arrow.CompressedInputStream(arrow.PythonFile(kept_open, mode="r"), "zstd")


COMPRESSIONS: Final = {
    ".gz": Compression("gzip", b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    ".bz2": Compression("bzip2", b"BZh", bz2.BZ2File),
    ".xz": Compression("xz", b"\xfd7zXZ\0", lzma.LZMAFile),
    ".zst": Compression("Zstandard", b"\x28\xb5\x2f\xfd", _open_zstandard),
}
_ARCHIVES: Final = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
# Contents that are recognised in order to refuse them.
_UNREADABLE: Final = ((b"PK\3\4", "a zip archive"), (b"SQLite format 3\0", "an SQLite database"))
_CONTENTS: Final = (
    *((one.magic, one.name) for one in COMPRESSIONS.values()),
    *((magic, one.name) for one in BINARY.values() for magic in one.magics),
    *_UNREADABLE,
)
_TAR_MARK: Final = (257, b"ustar")
_EXAMINED: Final = 512  # bytes


def suffixes_of(name: str) -> tuple[str, str | None]:
    """(the type's suffix, the compression's or None) of a file name: `a.jsonl.gz` gives (".jsonl", ".gz").

    Raises UsageError for archives and for compressed files of a type that is compressed inside.
    """
    path = PurePosixPath(name)
    last = path.suffix.lower()
    inner = PurePosixPath(path.stem).suffix.lower() if last in COMPRESSIONS else last
    if inner in _ARCHIVES:
        raise UsageError(f"{inner} may hold several files", where=name, fix="unpack it and name the files in it")
    if last not in COMPRESSIONS:
        return last, None
    if inner in BINARY:
        raise UsageError(
            f"{BINARY[inner].name} is compressed inside and is not read from {last}", where=name, fix="unpack it"
        )
    return inner, last


def require_content(stream: BinaryIO, name: str) -> None:
    """Raise UsageError where the first bytes contradict the file's name. Leaves the stream at its beginning."""
    kind, packed = suffixes_of(name)
    stream.seek(0)
    content = content_of(stream.read(_EXAMINED))
    stream.seek(0)
    if packed is not None:
        if content != COMPRESSIONS[packed].name:
            raise UsageError(
                f"the name says {COMPRESSIONS[packed].name}, but the content is {content or 'something else'}",
                where=name,
                fix="rename the file after its content",
            )
        with unpacked(stream, name, packed) as inside:
            content = content_of(inside.read(_EXAMINED))
        stream.seek(0)
    if content is not None and (kind not in BINARY or content != BINARY[kind].name):
        raise UsageError(
            f"the name says {kind.removeprefix('.') or 'nothing'}, but the content is {content}",
            where=name,
            fix="rename the file after its content, or unpack it",
        )


def content_of(first: bytes) -> str | None:
    """What a file's first bytes show it to be; None for text and for unknown contents."""
    if first.isascii() and b"\0" not in first:
        return None  # text, even where it begins like a magic number
    start, mark = _TAR_MARK
    if first[start : start + len(mark)] == mark:
        return "a tar archive"
    return next((name for magic, name in _CONTENTS if first.startswith(magic)), None)


def unpacked(stream: BinaryIO, name: str, packed: str) -> BinaryIO:
    """A stream of the unpacked bytes. packed: a key of COMPRESSIONS.

    Reading raises UsageError for a damaged or truncated file, and for one that unpacks to over HIGHEST_RATIO times its
    size.
    """
    return io.BufferedReader(_Unpacked(stream, name, packed), 1 << 16)


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: BinaryIO, name: str, packed: str) -> None:
        self._stream, self._name, self._compression = stream, name, COMPRESSIONS[packed]
        self._inner = self._compression.open(stream)
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer).cast("B")
        try:
            data = self._inner.read(len(room))
        except EOFError:
            raise self._broken("is truncated") from None
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise self._broken("is truncated" if "runcated" in str(error) else f"is damaged: {error}") from error
        room[: len(data)] = data
        self._total += len(data)
        if self._total > LITTLE and self._total > HIGHEST_RATIO * max(1, self._stream.tell()):
            raise UsageError(
                f"the file unpacks to over {HIGHEST_RATIO} times its size, which text never does",
                where=f"{self._name}, after {self._total} bytes",
                fix="unpack it and check its content",
            )
        return len(data)

    def _broken(self, how: str) -> UsageError:
        where = f"{self._name}, after {self._total} bytes"
        return UsageError(f"the {self._compression.name} file {how}", where=where, fix="copy or compress it again")

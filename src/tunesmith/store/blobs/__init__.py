"""Where blobs, records and version folders are kept: the interface, a local folder (local), a bucket (s3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

# Keys that name their content: their objects are written once, and may be cached for ever.
_NAMED = re.compile(r"(?:blobs/[0-9a-f]{2}/([0-9a-f]{64})|records/[0-9a-f]{2}/([0-9a-f]{64})\.json)")


def named_digest(key: str) -> str | None:
    """The digest of the content that a key names; None for a key whose object may change."""
    match = _NAMED.fullmatch(key)
    return f"sha256:{match[1] or match[2]}" if match else None


class BlobStore(Protocol):
    """Objects under keys such as `blobs/ab/HEX` or `versions/NAME/v1/release.json`.

    An object is written whole or not at all, and a write that returned survives a power cut. Nothing else is promised:
    no rename, no link and no lock, so that a store of objects over a network can implement it.
    """

    def put(self, key: str, data: bytes, *, private: bool = False) -> None:
        """Write an object, in place of one that is there. private: only this user may read it."""

    def put_file(self, key: str, source: Path) -> None:
        """Write an object from a local file without reading it into memory. The file is used up."""

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises FileNotFoundError."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """An object's bytes as they are kept, never from a cache; not all in memory. Raises FileNotFoundError."""

    def path(self, key: str) -> Path:
        """A local file with an object's bytes, for reading. It need not exist where the object does not."""

    def folder(self, prefix: str) -> Path:
        """A local folder with the objects under a prefix, for reading."""

    def exists(self, key: str) -> bool:
        """Whether there is an object under a key."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that begin with a prefix, which ends in `/`, in alphabetical order. What is being written has none."""

    def entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """(key, bytes, when it was written in seconds since 1970) of the objects that `keys` lists."""

    def delete(self, key: str) -> None:
        """Remove an object. One that is not there is no error."""

    def erase(self, key: str) -> str:
        """Remove an object with its older versions. Returns until when one is locked, "" where none is."""

    def where(self, key: str) -> str:
        """Where an object is, for messages."""

"""Canonical JSON (RFC 8785), and SHA-256 names. A digest is written `sha256:` and 64 hex digits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import rfc8785

from tunesmith.core.errors import UsageError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises UsageError for NaN, infinities and lone surrogates."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise UsageError(f"not representable as canonical JSON: {error}") from error


def canonical_lines(values: Iterable[Any]) -> bytes:
    """The canonical form of each JSON value on a line of its own."""
    return b"".join(canonical(value) + b"\n" for value in values)


def digest_bytes(data: bytes) -> str:
    """The digest of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """The digest of a JSON value's canonical form."""
    return digest_bytes(canonical(value))


def digest_pieces(pieces: Iterable[bytes | memoryview], into: IO[bytes] | None = None) -> str:
    """The digest of bytes that come in pieces. into: where they are written, too."""
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
        if into is not None:
            into.write(piece)
    return "sha256:" + hasher.hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as stream:
        return digest_pieces(pieces_of(stream))


def pieces_of(stream: IO[bytes]) -> Iterator[bytes]:
    """The rest of a stream in pieces of 1 MiB, so that a file never has to fit in memory."""
    while piece := stream.read(1 << 20):
        yield piece


def is_digest(text: str) -> bool:
    """Whether text is a complete digest."""
    return _DIGEST.fullmatch(text) is not None


def short(digest: str, length: int = 12) -> str:
    """The first hex digits, of which people read 12."""
    return digest.removeprefix("sha256:")[:length]

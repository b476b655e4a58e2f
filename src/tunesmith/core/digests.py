"""Canonical JSON (RFC 8785) and SHA-256 names. A digest is written `sha256:` and 64 hex digits."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import rfc8785

from tunesmith.core.errors import UsageError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK = 1 << 20


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises UsageError for NaN, infinities and lone surrogates."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise UsageError(f"not representable as canonical JSON: {error}") from error


def digest_bytes(data: bytes) -> str:
    """The digest of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """The digest of a JSON value's canonical form."""
    return digest_bytes(canonical(value))


def digest_file(path: Path) -> str:
    """The digest of a file's content, read in 1 MiB pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            hasher.update(piece)
    return "sha256:" + hasher.hexdigest()


def is_digest(text: str) -> bool:
    """Whether text is a complete digest."""
    return _DIGEST.fullmatch(text) is not None


def short(digest: str) -> str:
    """The 12 hex digits that people read."""
    return digest.removeprefix("sha256:")[:12]

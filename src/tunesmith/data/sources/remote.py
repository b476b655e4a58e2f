"""Remote source files, read through fsspec.

A file is downloaded whole before it is read: the digest is then that of the bytes that are read, and Parquet needs its
end first. Each protocol needs its library: s3fs for s3://, gcsfs for gs://.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

from tunesmith.core.errors import TunesmithError, UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)(?:::.*)?://", re.IGNORECASE)
_SECRET = re.compile(r"://[^/]*@|[?&](?:sig|x-amz-signature|x-goog-signature|token|key)=", re.IGNORECASE)
_PIECE = 1 << 20
_STATES = ("ETag", "Content-MD5", "Digest", "Last-Modified")  # headers that name a state of a file
_NO_STATES = ("name", "size", "type")  # what fsspec tells of every file


def protocol_of(path: str) -> str | None:
    """The protocol of a URL in lower case; None for a path."""
    match = _URL.match(path)
    return match[1].lower() if match else None


def find_remote(url: str) -> list[str]:
    """The URLs of the files that a URL or a pattern names. Raises UsageError where there are none, and for folders."""
    system, path = _system(url)
    files: dict[str, Any] = {}
    with _reading(url), contextlib.suppress(FileNotFoundError):
        names = sorted(system.glob(path)) if any(mark in path for mark in "*?[") else [path]
        files = {name: system.info(name) for name in names}
    if not files:
        raise UsageError("no file matches this source", where=url, fix="check the URL")
    for name, facts in files.items():
        if facts.get("type") == "directory":
            raise UsageError(
                "this is a folder, not a file",
                where=str(system.unstrip_protocol(name)),
                fix="name a file, or a pattern of files",
            )
    return [str(system.unstrip_protocol(name)) for name in files]


def fetch(url: str, target: BinaryIO) -> None:
    """Copy a file into target. Raises UsageError where it is missing, TunesmithError where it cannot be read.

    Large files take several requests, and the file may change between them: its state before and after is compared.
    """
    system, path = _system(url)
    with _reading(url):
        before = _mark(system, path)
        with system.open(path, "rb") as stream:
            shutil.copyfileobj(stream, target, _PIECE)
        target.flush()
        same = _mark(system, path) == before
    if not same:
        raise TunesmithError("the file changed while it was fetched", where=url, fix="run again")


def state_of(url: str) -> str:
    """What tells one state of a file from another, asked for without its bytes; "" where its server states no such
    thing. Raises UsageError where the file is missing, TunesmithError where its server cannot be asked."""
    system, path = _system(url)
    with _reading(url):
        system.invalidate_cache(path)
        facts = system.info(path)
    of_http = protocol_of(url) in ("http", "https")
    stated = {key: facts[key] for key in sorted(facts) if (key in _STATES if of_http else key not in _NO_STATES)}
    return str({"size": facts.get("size"), **stated}) if stated else ""


def _mark(system: Any, path: str) -> str:
    """What tells one state of a file from another, such as its ETag; never from a cache."""
    system.invalidate_cache(path)
    return str(system.ukey(path))


def _system(url: str) -> tuple[Any, str]:
    if "::" in url:
        raise UsageError("chained URLs are not supported", where=url, fix="name the file itself")
    if _SECRET.search(url):
        raise UsageError(
            "the URL contains a credential, which the record would keep",
            where=url.split("://", 1)[0] + "://...",
            fix="give it by the environment variables or files of the protocol's library",
        )
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        extra = "s3" if protocol_of(url) == "s3" else "remote"
        raise UsageError(
            f"{protocol_of(url)}:// needs a library that is not installed ({error.name or error})",
            where=url,
            fix=f'pip install "tunesmith[{extra}]", or the library that fsspec names for this protocol',
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the URL cannot be parsed: {error}", where=url, fix="use a protocol that fsspec knows"
        ) from error
    return system, path


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """Makes the errors of a protocol's library our own, but for a full disk here."""
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError("the file does not exist", where=url, fix="check the URL") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fix = "check network, URL and access rights"
        raise TunesmithError(f"cannot be fetched: {said}", where=url, fix=fix) from error

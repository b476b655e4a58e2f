"""Files elsewhere, by fsspec: named by URL, fetched whole before they are read, their digest recorded.

A file is fetched so that the bytes that are digested are the bytes that are read, and because Parquet is read from its
end. Which protocols there are depends on what is installed beside fsspec: s3fs for s3://, gcsfs for gs://.
"""

from __future__ import annotations

import errno
import re
import shutil
from typing import Any, BinaryIO

from tunesmith.core.errors import TunesmithError, UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)(?:::.*)?://", re.IGNORECASE)
_SECRET = re.compile(r"://[^/]*@|[?&](?:sig|x-amz-signature|x-goog-signature|token|key)=", re.IGNORECASE)
_PIECE = 1 << 20


def protocol_of(path: str) -> str | None:
    """The protocol of a URL, in small letters; None for a path."""
    found = _URL.match(path)
    return found[1].lower() if found else None


def find_remote(url: str) -> list[str]:
    """The URLs of the files that a URL names; it may hold a pattern. Raises UsageError for none, and for folders."""
    system, path = _system(url)
    try:
        names = sorted(system.glob(path)) if any(mark in path for mark in "*?[") else [path]
        found = {name: system.info(name) for name in names}
    except FileNotFoundError:
        found = {}
    except TunesmithError:
        raise
    except Exception as error:
        raise _failed(url, error) from error
    if not found:
        raise UsageError("no file fits this source", where=url, fix="look whether the URL is right")
    for name, facts in found.items():
        if facts.get("type") == "directory":
            raise UsageError(
                "a folder stands in place of a file",
                where=str(system.unstrip_protocol(name)),
                fix="name a file, or a pattern of files",
            )
    return [str(system.unstrip_protocol(name)) for name in found]


def fetch(url: str, target: BinaryIO) -> None:
    """Copy a file into target. Raises UsageError where it is not there, TunesmithError where it cannot be had.

    Large files come in several requests, each of which may meet another file: it is looked at before and after.
    """
    system, path = _system(url)
    try:
        before = _mark(system, path)
        with system.open(path, "rb") as stream:
            shutil.copyfileobj(stream, target, _PIECE)
        target.flush()
        same = _mark(system, path) == before
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        if not isinstance(error, FileNotFoundError):
            raise _failed(url, error) from error
        raise UsageError("the file is not there", where=url, fix="look whether the URL is right") from error
    except Exception as error:
        raise _failed(url, error) from error
    if not same:
        raise TunesmithError("the file changed while it was fetched", where=url, fix="run again")


def _mark(system: Any, path: str) -> str:
    """What tells one state of a file from another, such as its ETag; asked for afresh."""
    system.invalidate_cache(path)
    return str(system.ukey(path))


def _system(url: str) -> tuple[Any, str]:
    if "::" in url:
        raise UsageError("chained URLs are not followed", where=url, fix="name the file itself")
    if _SECRET.search(url):
        raise UsageError(
            "the URL holds a credential, which the record would keep",
            where=url.split("://", 1)[0] + "://...",
            fix="give it to the protocol's library by its environment variables or files",
        )
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        extra = "s3" if protocol_of(url) == "s3" else "remote"
        raise UsageError(
            f"{protocol_of(url)}:// needs a library that is not installed ({error.name or error})",
            where=url,
            fix=f'pip install "tunesmith[{extra}]", or what fsspec names for this protocol',
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the URL is not understood: {error}", where=url, fix="use a protocol that fsspec knows"
        ) from error
    return system, path


def _failed(url: str, error: Exception) -> TunesmithError:
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return TunesmithError(f"cannot be fetched: {said}", where=url, fix="look at the network, the name and your rights")

"""Files that survive a crash whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.system.scratch import scratch_file

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What SQLite, Rust's and C++'s libraries say: "database or disk is full", "os error 28".
_FULL_WORDS: Final = ("disk is full", "No space left on device", "os error 28", "Disk quota exceeded", "File too large")


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write data to a new file, sync it and rename it over path: after a crash there is the old file or the new one.

    mode: the umask is taken from it. Raises TunesmithError on a full disk.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_file(path.parent, mode) as (scratch, stream):
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(scratch, path)
        sync_folder(path.parent)


def require_new(path: Path) -> None:
    """Raise UsageError where there is anything at a path, be it a link: what is written there must be new."""
    if os.path.lexists(path):
        what = "this is a link, which is not followed" if path.is_symlink() else "this exists already"
        raise UsageError(what, where=str(path), fix="name what does not exist yet")


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename inside it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and sync them to the disk. Raises TunesmithError on a full disk."""
    with room_for(target), source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise TunesmithError where a write to path, or below it, fails because the disk is full."""
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_full(path) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a write that found no room. Libraries hide the error's number."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if any(words in str(cause) for words in _FULL_WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def cache_folder() -> Path:
    """The folder of bases and downloads, which all projects share."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def disk_full(path: Path | None = None) -> TunesmithError:
    """The error for a write to path, or below it, that found no room. It says how much was free.

    path: by default, of the places that a command writes to, the fullest.
    """
    if path is None:
        places = (place for place in (Path(), Path(tempfile.gettempdir()), cache_folder()) if place.exists())
        path = min(places, key=lambda place: shutil.disk_usage(place).free)
    there = next((each for each in (path.absolute(), *path.absolute().parents) if each.exists()), Path())
    use = shutil.disk_usage(there)
    temporary = there.is_relative_to(tempfile.gettempdir())
    free, total = use.free / 1e6, use.total / 1e6
    return TunesmithError(
        f"the disk is full, or a quota is used up: {free:,.1f} of {total:,.1f} MB are free",
        where=str(path),
        fix=f"free space there{' or set TMPDIR to another disk' if temporary else ''}, then run the same command again",
    )

"""Temporary folders and files that do not outlive their process for long.

A process that is killed cannot remove its temporary folders, which may hold weights or rows. So each is locked (flock)
by the process that made it. The system drops the lock when that process ends, however it ends, and whoever makes the
next one beside it can tell leftovers from what is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# How their names begin. Whatever is called so and not locked is removed.
SCRATCH = ".scratch-tunesmith-"


@contextlib.contextmanager
def scratch_folder(within: Path | None = None) -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end.

    within: by default the folder for temporary files.
    """
    within = Path(tempfile.gettempdir()) if within is None else within
    remove_leftovers(within)
    while True:
        folder = within / f"{SCRATCH}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # not locked yet, so another process took it for a leftover
            continue
        if _lock(handle):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # before the lock goes
        os.close(handle)


@contextlib.contextmanager
def scratch_file(within: Path, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file, open for writing, removed at the end unless it was renamed. The umask is taken from mode."""
    remove_leftovers(within)
    while True:
        path = within / f"{SCRATCH}{secrets.token_hex(8)}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        if _lock(handle):
            break
        os.close(handle)
    with os.fdopen(handle, "wb") as stream:
        try:
            yield path, stream
        finally:
            path.unlink(missing_ok=True)


def remove_leftovers(within: Path) -> None:
    """Remove what this user's ended processes left of such folders and files."""
    for path in within.glob(f"{SCRATCH}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            status = os.fstat(handle)
            if status.st_uid == os.getuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if stat.S_ISDIR(status.st_mode) else path.unlink()
        except OSError:
            pass  # its process lives, or another one removes it
        finally:
            os.close(handle)


def remove_leftovers_below(root: Path) -> None:
    """Remove what ended processes left in a folder and in all below it."""
    for within, folders, files in os.walk(root):  # unlike rglob, this bears folders that go meanwhile
        if any(name.startswith(SCRATCH) for name in (*folders, *files)):
            remove_leftovers(Path(within))


def _lock(handle: int) -> bool:
    """Lock what this process has just made. False where another process took it for a leftover and removes it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nobody can lock it, and nobody removes it
        return True
    return os.fstat(handle).st_nlink > 0

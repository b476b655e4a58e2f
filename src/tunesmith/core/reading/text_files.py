"""Reads the small text files that a user names: settings, schemas, prompts."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from tunesmith.core.errors import UsageError

LARGEST_TEXT: Final = 4 << 20
LARGEST_DATA: Final = 256 << 20  # a file of data that is read whole


def inside(root: Path, file: str | Path, what: str, where: str) -> Path:
    """The path of a file in a project's folder, links followed. what: the file in words.

    Raises UsageError, with where, for one outside.
    """
    try:
        path = (root / file).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a name that no file can have
        pass
    raise UsageError(f"{what} lies outside the project", where=where, fix="copy it into the project")


def read_text_file(path: Path, what: str, largest: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, without a byte order mark. what: the file in words, for messages.

    Raises UsageError, with the path, for a file that is missing, is not a regular file (without waiting for a FIFO or a
    device), is larger than `largest` bytes, is not UTF-8 or holds NUL characters.
    """
    where = str(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"{what} is not a regular file", where=where, fix="name a file")
            data = stream.read(largest + 1)
    except FileNotFoundError:
        raise UsageError(f"{what} does not exist", where=where, fix="correct the path, or write the file") from None
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}", where=where) from error
    if len(data) > largest:
        raise UsageError(f"{what} is larger than {largest >> 20} MiB", where=where, fix="name the right file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what_fails = f"{what} is not UTF-8: {error.reason}"
        raise UsageError(what_fails, where=f"{where}, line {line}", fix="convert the file to UTF-8") from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise UsageError(f"{what} holds a NUL character", where=f"{where}, line {line}", fix="remove it")
    return text

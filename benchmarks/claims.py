"""Lets several runs of a benchmark share its measurements: each is made by one of them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(folder: Path, key: str) -> Iterator[bool]:
    """Whether no other process has claimed a key; it is this one's until the end of the block, or of the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key.removeprefix('sha256:')[:16]}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True

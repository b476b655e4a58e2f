"""Waiting for a condition, and for the end of a process."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Ends a test that would hang. A busy machine with few cores takes ten times longer than an idle one.
SECONDS = 600.0
Found = TypeVar("Found")


def until(found: Callable[[], Found], seconds: float = SECONDS) -> Found:
    """Call it until it returns something true, and return that. Raises AssertionError after many seconds.

    The longer it takes, the more seldom it is called: many calls ask a database or a server, which keeps a core busy.
    """
    begin = time.monotonic()
    while not (now := found()):
        waited = time.monotonic() - begin
        assert waited < seconds, f"it did not happen within {seconds:g} s"
        time.sleep(min(0.1, 0.01 + waited / 30))
    return now


def gone(process: int) -> bool:
    """Whether a process has ended, and all of its threads.

    A killed process is a zombie once its first thread has ended. Its files, and so its locks, stay open until the last
    thread has ended, which takes a moment where all cores are busy.
    """
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(os.listdir(f"/proc/{process}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True

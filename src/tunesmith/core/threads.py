"""How many threads or processes the user lets a command compute with."""

from __future__ import annotations

import os

from tunesmith.core.errors import UsageError


def wanted_threads() -> int | None:
    """$TUNESMITH_THREADS; None where it is not set or 0. Raises UsageError for what is no such number."""
    told = os.environ.get("TUNESMITH_THREADS") or "0"
    if not told.isdecimal():
        raise UsageError(
            f"{told!r} is no number of threads", where="TUNESMITH_THREADS", fix="set a whole number, or none"
        )
    return int(told) or None

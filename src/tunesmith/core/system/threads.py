"""The number of threads or processes that a command may use."""

from __future__ import annotations

import os

from tunesmith.core.errors import UsageError


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process's number among those of one training on this machine, as torchrun and Ray Train state it; 0 for a
    process that trains alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def wanted_threads() -> int | None:
    """The value of $TUNESMITH_THREADS; None if it is unset or 0. Raises UsageError if it is not a whole number."""
    told = os.environ.get("TUNESMITH_THREADS") or "0"
    if not told.isdecimal():
        raise UsageError(
            f"{told!r} is not a number of threads", where="TUNESMITH_THREADS", fix="set a whole number, or unset it"
        )
    return int(told) or None

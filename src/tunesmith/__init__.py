"""Tunesmith: governed fine-tuning, from raw rows to a measured, signed, approved model behaviour in service."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import Project

__all__ = ["Project"]


def _let_waiting_threads_sleep() -> None:
    """Set $GOMP_SPINCOUNT, unless the user has set it or $OMP_WAIT_POLICY: how often an OpenMP thread looks for work
    before it sleeps. By default it looks for milliseconds and keeps other processes from computing meanwhile.

    libgomp reads it once, when torch or scikit-learn is imported. In the command line and with `python -m tunesmith`
    this comes before, and the processes that they start inherit it. It does nothing in a program that imports torch
    before tunesmith, which must set it itself, and where torch has another OpenMP library (macOS, Windows).
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


_let_waiting_threads_sleep()


def __getattr__(name: str) -> Any:
    """Import `tunesmith.Project` only on first use, so that `import tunesmith` is fast."""
    if name == "Project":
        from tunesmith.api import Project

        return Project
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

"""Tunesmith: governed fine-tuning, from raw rows to a measured, signed, approved model behaviour in service."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import Project

__all__ = ["Project"]

# How often an OpenMP thread looks for work before it sleeps; libgomp reads it when torch is imported. By default a
# thread looks for milliseconds, and where other processes want the cores too, it keeps others from computing.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"


def __getattr__(name: str) -> Any:
    """Import `tunesmith.Project` only on first use, so that `import tunesmith` is fast."""
    if name == "Project":
        from tunesmith.api import Project

        return Project
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

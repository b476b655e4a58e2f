"""Tunesmith: governed fine-tuning, from raw rows to a measured, signed, approved model behaviour in service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import Project

__all__ = ["Project"]


def __getattr__(name: str) -> Any:
    """Import `tunesmith.Project` only on first use, so that `import tunesmith` is fast."""
    if name == "Project":
        from tunesmith.api import Project

        return Project
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")

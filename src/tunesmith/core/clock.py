"""The current time."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def stamp() -> str:
    """The current UTC time as ISO 8601 with microseconds and a trailing Z."""
    return now().isoformat(timespec="microseconds").replace("+00:00", "Z")

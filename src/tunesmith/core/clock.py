"""The current time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def stamp(after: timedelta = timedelta()) -> str:
    """The current UTC time, or a time after it, as ISO 8601 with microseconds and a trailing Z."""
    return (now() + after).isoformat(timespec="microseconds").replace("+00:00", "Z")


def day(at: float) -> str:
    """The day, in UTC, of a time in seconds since 1970, as 2031-05-06."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()

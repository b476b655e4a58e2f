"""The current time, and times as text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def stamp(after: timedelta = timedelta()) -> str:
    """The current UTC time, or a time after it, as `iso` writes it."""
    return iso(now() + after)


def iso(at: datetime) -> str:
    """A UTC time as ISO 8601 with microseconds and a trailing Z: such texts compare as their times do."""
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def second(at: float) -> str:
    """The second, in UTC, of a time in seconds since 1970, as 2031-05-06T07:08:09Z."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def day(at: float) -> str:
    """The day, in UTC, of a time in seconds since 1970, as 2031-05-06."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()

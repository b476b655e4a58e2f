"""Which split a row goes to where it is not its group's hash that decides: by time, or in like shares of each kind."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from tunesmith.core.errors import UsageError
from tunesmith.data.settings import Split

OLDER: Final = "older row of a group that is held out"
MOST_STRATA = 1000
_MILLISECONDS = 10**11  # seconds up to the year 5138; what is larger was counted in milliseconds


def time_of(value: Any, where: str) -> str:
    """A row's time as text that sorts by time, in UTC to the microsecond: 2024-05-01T12:00:00.000000Z.

    value: ISO 8601, without a zone in UTC; a number of seconds or milliseconds since 1970, as text too; or what Parquet
    holds. Raises UsageError for anything else.
    """
    try:
        found = _time(value)
    except (ValueError, OverflowError, OSError):
        found = None
    if found is None:
        raise UsageError(
            f"{str(value)[:60]!r} is no time",
            where=where,
            fix="write it as 2024-05-01T12:00:00Z, or in seconds since 1970",
        )
    return found.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def _time(value: Any) -> datetime | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not text.replace(".", "", 1).lstrip("-").isdecimal() or len(text) == 8:  # 20240501 is a date
            value = datetime.fromisoformat(text)
        else:
            value = float(text)
    if isinstance(value, int | float):
        value = datetime.fromtimestamp(value / 1000 if abs(value) >= _MILLISECONDS else value, UTC)
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    return None


def cuts(times: Mapping[str, int], split: Split) -> tuple[dict[str, str], int]:
    """From when on a row is of the test and of validation, and how many rows that is beyond their shares.

    times: time -> rows. Rows of one time stay together, so a split may get more than its share; one whose share is 0
    has no cut, and neither has one for which no time is left.
    """
    total = sum(times.values())
    shares = {"test": split.test, "validation": split.test + split.validation}
    wanted = {name: math.ceil(round(share * total, 6)) for name, share in shares.items()}
    if not split.validation:
        del wanted["validation"]
    found: dict[str, str] = {}
    taken, beyond = 0, 0
    newest = iter(sorted(times, reverse=True))
    for name, many in wanted.items():
        while taken < many and (time := next(newest, None)) is not None:
            taken += times[time]
            found[name] = time
        beyond = max(0, taken - many)
    return found, beyond


def split_by_time(time: str, found: Mapping[str, str]) -> str:
    """The split of a row of that time, with what cuts found."""
    return next((name for name in ("test", "validation") if name in found and time >= found[name]), "train")


def stratified(counts: Iterable[tuple[str, str, int]], split: Split, held: Container[str] = ()) -> dict[str, str]:
    """Group -> split, so that each split has like shares of the rows of every kind. counts: (group, kind, rows).

    Whole groups, the largest first, each to the split whose shares it brings nearest to what is wanted, in the sense of
    chi-squared: the greedy way of Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data" (ECML
    2011) and of scikit-learn's StratifiedGroupKFold. Groups of one size go in the order of their hash with the seed:
    the order of the rows changes nothing. held: groups that are test whatever they hold.

    Raises UsageError where there are so many kinds that none is a kind.
    """
    groups: defaultdict[str, dict[str, int]] = defaultdict(dict)
    totals: Counter[str] = Counter()
    for group, kind, rows in counts:
        groups[group][kind] = rows
        totals[kind] += rows
    if len(totals) > min(MOST_STRATA, max(2, sum(totals.values()) // 2)):
        raise UsageError(
            f"{split.stratify} has {len(totals)} values in {sum(totals.values())} rows, which are no kinds of rows",
            where="data.split.stratify",
            fix="name a key with fewer values",
        )
    shares = {"train": 1 - split.validation - split.test, "validation": split.validation, "test": split.test}
    shares = {name: share for name, share in shares.items() if share > 0}
    filled: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def cost(name: str, rows: Mapping[str, int]) -> float:
        wanted = {kind: shares[name] * totals[kind] for kind in rows}
        return sum(n * (2 * (filled[name][kind] - wanted[kind]) + n) / wanted[kind] for kind, n in rows.items())

    def order(group: str) -> tuple[bool, int, bytes]:
        mark = hashlib.sha256(f"{split.seed}\0{group}".encode()).digest()
        return group not in held, -sum(groups[group].values()), mark

    placed: dict[str, str] = {}
    for group in sorted(groups, key=order):
        costs = {name: cost(name, groups[group]) for name in shares}
        placed[group] = "test" if group in held else min(shares, key=costs.__getitem__)
        filled[placed[group]].update(groups[group])
    return placed

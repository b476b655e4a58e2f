"""Assigns rows to splits: by a hash of their group, by time, or in equal shares of each stratum."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from datetime import UTC, date, datetime
from typing import Any, Final

from tunesmith.core.errors import UsageError
from tunesmith.data.settings import Split

OLDER: Final = "older row of a group that is held out"  # why a row is removed
MOST_STRATA = 1000
_MILLISECONDS = 10**11  # larger numbers are milliseconds; as seconds they would be after the year 5138


def split_of(group: str, split: Split, held: Container[str] = ()) -> str:
    """The split of a group by its hash with the seed, a number in [0, 1): test first, then validation, then train.

    Only the group and the settings decide, so added rows do not move earlier ones. held: groups that are always test.
    """
    if group in held:
        return "test"
    number = int.from_bytes(hashlib.sha256(f"{split.seed}\0{group}".encode()).digest()[:8], "big") / 2**64
    if number < split.test:
        return "test"
    return "validation" if number < split.test + split.validation else "train"


def time_of(value: Any, where: str) -> str:
    """A row's time in UTC, as text that sorts by time: 2024-05-01T12:00:00.000000Z.

    value: ISO 8601 (UTC where it names no zone), seconds or milliseconds since 1970 as a number or text, or a datetime
    or date as Parquet holds it. Eight digits are a date, as text or number: 20240501. Raises UsageError for anything
    else.
    """
    try:
        moment = _time(value)
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None:
        raise UsageError(
            f"{str(value)[:60]!r} is not a time",
            where=where,
            fix="write it as 2024-05-01T12:00:00Z, or in seconds since 1970",
        )
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def _time(value: Any) -> datetime | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float) and 10**7 <= value < 10**8 and value == int(value):
        value = str(int(value))
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
    return datetime(value.year, value.month, value.day, tzinfo=UTC) if isinstance(value, date) else None


def cuts(times: Mapping[str, int], split: Split) -> tuple[dict[str, str], int]:
    """(split -> the earliest time of its rows, number of rows beyond the shares) for the test and validation splits.

    times: time -> rows. Rows of one time are in one split, so a split may get more than its share. A split without a
    share, or for which no row is left, has no entry.
    """
    total = sum(times.values())
    shares = {"test": split.test, "validation": split.test + split.validation}
    wanted = {name: math.ceil(round(share * total, 6)) for name, share in shares.items()}
    if not split.validation:
        del wanted["validation"]
    starts: dict[str, str] = {}
    taken, beyond = 0, 0
    newest = iter(sorted(times, reverse=True))
    for name, many in wanted.items():
        while taken < many and (time := next(newest, None)) is not None:
            taken += times[time]
            starts[name] = time
        beyond = max(0, taken - many)
    return starts, beyond


def split_by_time(time: str, starts: Mapping[str, str]) -> str:
    """The split of a row of that time. starts: what `cuts` returned."""
    return next((name for name in ("test", "validation") if name in starts and time >= starts[name]), "train")


def stratified(counts: Iterable[tuple[str, str, int]], split: Split, held: Container[str]) -> dict[str, str]:
    """Group -> split, such that each split has about the same share of every stratum. counts: (group, stratum, rows).

    The greedy method of Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data" (ECML 2011) and of
    scikit-learn's StratifiedGroupKFold: the largest group comes first, and each goes to the split that its rows bring
    closest to the wanted shares, by chi-squared. Groups of one size are ordered by their hash with the seed, so the
    order of the rows does not matter. held: groups that are assigned to test.

    Raises UsageError for too many strata.
    """
    groups: defaultdict[str, dict[str, int]] = defaultdict(dict)
    totals: Counter[str] = Counter()
    for group, kind, rows in counts:
        groups[group][kind] = rows
        totals[kind] += rows
    if len(totals) > min(MOST_STRATA, max(2, sum(totals.values()) // 2)):
        raise UsageError(
            f"{split.stratify} has {len(totals)} values in {sum(totals.values())} rows, too many to stratify by",
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

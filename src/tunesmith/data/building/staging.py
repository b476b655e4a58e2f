"""The rows of a build on disk: what outgrows the memory is sorted, compared and written out from here.

A database of SQLite in the build's work folder, thrown away afterwards. Memory holds, for each row, no more than what
nearness asks for.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunesmith.core.digests import canonical
from tunesmith.core.errors import TunesmithError
from tunesmith.data.building.account import EXACT, Kept
from tunesmith.data.dataset import SPLITS, Example, encode_examples, encode_removed
from tunesmith.data.settings import Split
from tunesmith.data.splitting.duplicates import answer_key, request_key
from tunesmith.data.splitting.leakage import ComparedRow, split_of

StagedRow = tuple[str, str, int, int, str, bytes, bytes, str, bytes, str, str, str, str, bytes]
Line = tuple[bytes, str]
_NO_LABELS: Mapping[str, str] = MappingProxyType({})
_COLUMNS = "id, tie, row, changed, source, key, request, wording, answer, grp, split, licence, labels, line"
_INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)"
_TABLES = f"""
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
    CREATE TABLE rows ({_COLUMNS}, gone);
    CREATE TABLE removed (line, reason);
"""


def staged_row(one: Kept, split: Split) -> StagedRow:
    """A kept row as it lies in the database.

    tie: orders rows of one id; key: what repeats of a row share; request: what rows with one request share.
    """
    example = one.example
    asked, answer = _mark(request_key(example.request)), _mark(answer_key(example.answer))
    tie = example.model_dump_json(include={"licence", "group", "subject", "tenant", "region", "labels"})
    return (
        example.id, tie, one.row, one.changed, example.source, asked + answer, asked, example.wording, answer,
        example.group, split_of(example.group, split), example.licence,
        json.dumps(example.labels) if example.labels else "", encode_examples([example]),
    )  # fmt: skip


def removed_line(entry: Mapping[str, Any]) -> Line:
    """An entry of what was removed, as it is written, and its reason."""
    return encode_removed([entry]), entry["reason"]


def _mark(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _with_group(line: bytes, group: str) -> bytes:
    return canonical({**json.loads(line), "group": group}) + b"\n"


class StagingDatabase:
    """Rows on their way to a dataset. `with StagingDatabase(folder) as spill` makes the file and takes it away."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "rows.db"

    def __enter__(self) -> StagingDatabase:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._base = sqlite3.connect(self._path, isolation_level=None)
        self._base.create_function("label", 2, lambda labels, key: json.loads(labels)[key], deterministic=True)
        self._base.executescript(_TABLES + "BEGIN;")
        return self

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)
        if isinstance(error, sqlite3.OperationalError) and any(said in str(error) for said in ("full", "disk I/O")):
            raise TunesmithError(
                f"the disk is full, or fails ({error})",
                where=str(self._path),
                fix="make room: a build takes about three times its rows",
            ) from error

    def add(self, kept: Sequence[StagedRow], removed: Sequence[Line]) -> None:
        """Take rows in, in any order."""
        self._base.executemany(_INSERT, kept)
        self._base.executemany("INSERT INTO removed VALUES (?, ?)", removed)

    def drop_repeats(self, held_out: Collection[str]) -> None:
        """Keep one row of each request and answer. Which one does not depend on the order in which they came.

        held_out: sources whose rows stand for their repeats in others: a copy is no reason to train on one of them.
        """
        marks = ", ".join("?" * len(held_out))
        order = f"key, source NOT IN ({marks}), id, tie, row"
        query = f"SELECT rowid, key, source, row, id FROM rows ORDER BY {order}"  # noqa: S608
        found = self._base.execute(query, sorted(held_out))
        self._drop(
            (place, source, row, name, EXACT)
            for _, same in itertools.groupby(found, key=lambda one: one[1])
            for place, _, source, row, name in itertools.islice(same, 1, None)
        )
        self._base.execute("CREATE INDEX by_id ON rows (id)")

    def hold(self, sources: Collection[str]) -> list[str]:
        """Hold out the groups of these sources' rows, whatever else they hold; returns the groups.

        Rows that went as repeats of one another count too, as far as their group is their own.
        """
        marks = ", ".join("?" * len(sources))
        query = f"SELECT DISTINCT grp FROM rows WHERE grp != '' AND source IN ({marks}) ORDER BY grp"  # noqa: S608
        held = [group for (group,) in self._base.execute(query, sorted(sources))]
        self._base.executemany("UPDATE rows SET split = 'test' WHERE grp = ?", ((group,) for group in held))
        return held

    def drop(self, gone: Mapping[str, str]) -> None:
        """Let rows go: id -> reason."""
        query = "SELECT rowid, source, row, id FROM rows WHERE id = ? AND gone IS NULL"
        found = ((self._base.execute(query, (name,)).fetchone(), gone[name]) for name in sorted(gone))
        self._drop((place, source, row, name, reason) for (place, source, row, name), reason in found)

    def _drop(self, rows: Iterable[tuple[int, str, int, str, str]]) -> None:
        for some in batches(rows):
            entries = [
                removed_line({"id": name, "source": source, "row": row, "reason": reason})
                for _, source, row, name, reason in some
            ]
            self._base.executemany("INSERT INTO removed VALUES (?, ?)", entries)
            self._base.executemany("UPDATE rows SET gone = ? WHERE rowid = ?", [(one[4], one[0]) for one in some])

    def conflicts(self, shown: int) -> dict[str, Any]:
        """Requests with more than one answer: how many, their rows, and the ids of the first few."""
        found = self._base.execute("SELECT request, id FROM rows WHERE gone IS NULL ORDER BY request, id")
        requests = rows = 0

        def several() -> Iterator[list[str]]:
            nonlocal requests, rows
            for _, same in itertools.groupby(found, key=lambda one: one[0]):
                ids = [name for _, name in same]
                if len(ids) > 1:
                    requests, rows = requests + 1, rows + len(ids)
                    yield ids

        first = heapq.nsmallest(shown, several())
        return {"requests": requests, "rows": rows, "examples": first}

    def traces(self) -> dict[str, list[ComparedRow]]:
        """What nearness is judged by, of every row that is left, by split and in the order of the ids."""
        splits: dict[str, list[ComparedRow]] = {name: [] for name in SPLITS}
        query = "SELECT split, id, grp, wording, answer, labels FROM rows WHERE gone IS NULL ORDER BY id"
        for split, name, group, wording, answer, labels in self._base.execute(query):
            said = json.loads(labels) if labels else _NO_LABELS
            splits[split].append(ComparedRow(name, group, wording, answer.hex(), said))
        return splits

    def regroup(self, groups: Iterable[tuple[str, str]], split: Split) -> None:
        """Give rows the groups, (id, group), that could not be told before all of them were there."""
        query = "SELECT rowid, line FROM rows WHERE id = ? AND gone IS NULL"
        found = ((*self._base.execute(query, (name,)).fetchone(), group) for name, group in groups)
        for some in batches(found):
            self._base.executemany(
                "UPDATE rows SET grp = ?, split = ?, line = ? WHERE rowid = ?",
                [(group, split_of(group, split), _with_group(line, group), place) for place, line, group in some],
            )

    def times(self, key: str) -> dict[str, int]:
        """Time -> rows that are left and have it. key: of the labels."""
        query = "SELECT label(labels, ?), COUNT(*) FROM rows WHERE gone IS NULL GROUP BY 1"
        return dict(self._base.execute(query, (key,)))

    def kinds(self, key: str, *, by: str = "grp") -> list[tuple[str, str, int]]:
        """(group, kind, rows) of the rows that are left; or by split. key: of the labels."""
        query = f"SELECT {by}, label(labels, ?), COUNT(*) FROM rows WHERE gone IS NULL GROUP BY 1, 2 ORDER BY 1, 2"  # noqa: S608
        return list(self._base.execute(query, (key,)))

    def place_groups(self, places: Mapping[str, str]) -> None:
        """Put groups into splits: group -> split."""
        self._base.execute("CREATE INDEX by_group ON rows (grp)")
        pairs = ((split, group) for group, split in places.items())
        self._base.executemany("UPDATE rows SET split = ? WHERE grp = ?", pairs)

    def place_times(self, key: str, places: Callable[[str], str], reason: str) -> None:
        """Put rows into splits by their time; of a group that is then in several the rows of earlier splits go."""
        self._base.create_function("place", 1, places, deterministic=True)
        self._base.execute("UPDATE rows SET split = place(label(labels, ?)) WHERE gone IS NULL", (key,))
        found = self._base.execute(
            "SELECT rowid, source, row, id, grp, split FROM rows WHERE gone IS NULL AND grp IN "
            "(SELECT grp FROM rows WHERE gone IS NULL GROUP BY grp HAVING COUNT(DISTINCT split) > 1) ORDER BY grp"
        ).fetchall()
        last: dict[str, int] = {}
        for *_, group, split in found:
            last[group] = max(last.get(group, 0), SPLITS.index(split))
        self._drop(
            (place, source, row, name, reason)
            for place, source, row, name, group, split in found
            if SPLITS.index(split) < last[group]
        )

    def span(self, key: str) -> dict[str, list[str]]:
        """Split -> the earliest and the latest time of its rows that are left. key: of the labels."""
        query = (
            "SELECT split, MIN(label(labels, ?1)), MAX(label(labels, ?1)) FROM rows WHERE gone IS NULL GROUP BY split"
        )
        found = {split: [first, last] for split, first, last in self._base.execute(query, (key,))}
        return {name: found[name] for name in SPLITS if name in found}

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows and groups of each split, rows of each licence, as of the rows that are left."""
        query = "SELECT split, COUNT(*), COUNT(DISTINCT grp) FROM rows WHERE gone IS NULL GROUP BY split"
        found = {split: (rows, groups) for split, rows, groups in self._base.execute(query)}
        licences = self._base.execute("SELECT licence, COUNT(*) FROM rows WHERE gone IS NULL GROUP BY licence")
        return {
            "splits": {name: found.get(name, (0, 0))[0] for name in SPLITS},
            "groups": {name: found.get(name, (0, 0))[1] for name in SPLITS},
            "licences": dict(sorted(licences)),
        }

    def changed(self) -> int:
        """Rows that are left and are not as they were read."""
        return int(self._base.execute("SELECT COUNT(*) FROM rows WHERE gone IS NULL AND changed").fetchone()[0])

    def reasons(self) -> dict[str, int]:
        """Reason -> number of rows that were removed for it."""
        return dict(sorted(self._base.execute("SELECT reason, COUNT(*) FROM removed GROUP BY reason")))

    def lines(self, split: str) -> Iterator[bytes]:
        """The split's rows as they are sealed: canonical JSON in the order of the ids."""
        query = "SELECT line FROM rows WHERE split = ? AND gone IS NULL ORDER BY id"
        return (line for (line,) in self._base.execute(query, (split,)))

    def sample(self, count: int) -> list[Example]:
        """Rows that are left, at most count. Those of the smallest ids: ids are digests, so the choice is no one's."""
        query = "SELECT line FROM rows WHERE gone IS NULL ORDER BY id LIMIT ?"
        return [Example.model_validate_json(line) for (line,) in self._base.execute(query, (count,))]

    def ids(self) -> Iterator[str]:
        """The ids of the rows that are left."""
        return (name for (name,) in self._base.execute("SELECT id FROM rows WHERE gone IS NULL"))

    def licences(self) -> list[tuple[str, str]]:
        """The pairs of a source and a licence that the rows that are left have."""
        return list(self._base.execute("SELECT DISTINCT source, licence FROM rows WHERE gone IS NULL"))

    def examples(self, split: str) -> Iterator[Example]:
        """The split's examples, read one by one."""
        return (Example.model_validate_json(line) for line in self.lines(split))

    def removed_lines(self) -> Iterator[bytes]:
        """What was removed, in an order that does not depend on how the rows came."""
        return (line for (line,) in self._base.execute("SELECT line FROM removed ORDER BY line"))


def batches(rows: Iterable[Any], size: int = 10_000) -> Iterator[list[Any]]:
    """Some rows at a time."""
    left = iter(rows)
    while some := list(itertools.islice(left, size)):
        yield some

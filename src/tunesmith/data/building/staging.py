"""The staging database of a build: sorts, compares and writes out rows that may not fit into memory.

It is an SQLite file in the build's work folder, deleted afterwards. Memory holds only what comparing requests needs.
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
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.building.account import EXACT, WITHDRAWN, Kept
from tunesmith.data.dataset import SPLITS, Example, encode_examples
from tunesmith.data.duplicates import answer_key, request_key
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.settings import Split
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.leakage import ComparedRow
from tunesmith.records.dataset import Conflicts

StagedRow = tuple[str, str, int, int, str, str | None, bytes, bytes, str, str, bytes, str, str, str, str, bytes]
RemovedLine = tuple[bytes, str]
_NO_LABELS: Mapping[str, str] = MappingProxyType({})
_COLUMNS = (
    "id, tie, row, changed, source, subject, key, request, wording, earlier, answer, grp, split, licence, labels, line"
)
_INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)"
_TABLES = f"""
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
    CREATE TABLE rows ({_COLUMNS}, gone);
    CREATE TABLE removed (line, reason);
    CREATE TABLE subjects (id, subject);
"""


def staged_row(one: Kept, split: Split) -> StagedRow:
    """A kept row as the database stores it.

    tie: orders rows of one id. key: equal for exact duplicates. request: equal for rows with the same request.
    earlier: as JSON, "" where only the last answer is learned.
    """
    example = one.example
    asked, answer = _digest(request_key(example.request)), _digest(answer_key(example.answer))
    tie = example.model_dump_json(include={"licence", "group", "subject", "tenant", "region", "labels"})
    return (
        example.id, tie, one.row, one.changed, example.source, example.subject, asked + answer, asked,
        example.wording, json.dumps(example.earlier) if example.earlier else "", answer,
        example.group, split_of(example.group, split), example.licence,
        json.dumps(example.labels) if example.labels else "", encode_examples([example]),
    )  # fmt: skip


def removed_line(name: str | None, source: str, row: int, reason: str) -> RemovedLine:
    """(the line of a removed row as it is written, its reason). name: its id, where it was computed already."""
    return canonical({"id": name, "source": source, "row": row, "reason": reason}) + b"\n", reason


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _with_group(line: bytes, group: str) -> bytes:
    return canonical({**parse_json(line), "group": group}) + b"\n"


class StagingDatabase:
    """Rows that become a dataset. A context manager: the file exists within `with StagingDatabase(folder)`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "rows.db"

    def __enter__(self) -> StagingDatabase:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._path, isolation_level=None)
        self._database.create_function("label", 2, lambda labels, key: parse_json(labels)[key], deterministic=True)
        try:
            self._database.executescript(_TABLES + "BEGIN;")
        except sqlite3.OperationalError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)
        if isinstance(error, sqlite3.OperationalError) and any(said in str(error) for said in ("full", "disk I/O")):
            raise TunesmithError(
                f"the disk is full or failing ({error})",
                where=str(self._path),
                fix="free space: a build needs about three times the size of its rows",
            ) from error

    def add(self, kept: Sequence[StagedRow], removed: Sequence[RemovedLine]) -> None:
        """Add rows, in any order."""
        self._database.executemany(_INSERT, kept)
        self._database.executemany("INSERT INTO removed VALUES (?, ?)", removed)

    def drop_copies(self, contents: Collection[str]) -> None:
        """Remove the rows with the content keys of recalled ones, whatever they state about themselves."""
        if not contents:
            return
        found = self._database.execute("SELECT rowid, source, row, id, line FROM rows")
        copies = [
            (place, source, row, name, WITHDRAWN)
            for place, source, row, name, line in found
            if content_key(Example.model_validate_json(line)) in contents
        ]
        self._drop(copies)

    def drop_repeats(self, held_out: Collection[str]) -> None:
        """Keep one of the rows with equal request and answer; the order in which rows were added does not matter.

        held_out: sources whose rows are kept rather than their copies in other sources, so that none is trained on.
        After that, a row that states a subject is kept rather than one that states none, and the other subjects of its
        copies are noted, so that a recall of any of them finds the row.
        """
        marks = ", ".join("?" * len(held_out))
        order = f"key, source NOT IN ({marks}), subject IS NULL, id, tie, row"
        query = f"SELECT rowid, key, source, row, id, subject FROM rows WHERE gone IS NULL ORDER BY {order}"  # noqa: S608
        found = self._database.execute(query, sorted(held_out))
        subjects: set[tuple[str, str]] = set()

        def repeats() -> Iterator[tuple[int, str, int, str, str]]:
            last: bytes | None = None
            kept: str = ""
            stated: str | None = None
            for place, key, source, row, name, subject in found:
                if key != last:
                    last, kept, stated = key, name, subject
                    continue
                if subject not in (None, stated):
                    subjects.add((kept, subject))
                yield place, source, row, name, EXACT

        self._drop(repeats())
        self._database.executemany("INSERT INTO subjects VALUES (?, ?)", subjects)
        self._database.execute("CREATE INDEX by_id ON rows (id)")

    def hold_out(self, sources: Collection[str]) -> list[str]:
        """Assign the groups of these sources' rows to the test split; returns the groups.

        Rows that were removed as duplicates count too.
        """
        marks = ", ".join("?" * len(sources))
        query = f"SELECT DISTINCT grp FROM rows WHERE grp != '' AND source IN ({marks}) ORDER BY grp"  # noqa: S608
        held = [group for (group,) in self._database.execute(query, sorted(sources))]
        self._database.executemany("UPDATE rows SET split = 'test' WHERE grp = ?", ((group,) for group in held))
        return held

    def drop(self, gone: Mapping[str, str]) -> None:
        """Remove rows: id -> reason.

        Their subjects are noted at the remaining rows of the same content, so that a recall finds those.
        """
        query = "SELECT rowid, source, row, id FROM rows WHERE id = ? AND gone IS NULL"
        found = ((self._database.execute(query, (name,)).fetchone(), gone[name]) for name in sorted(gone))
        self._drop((place, source, row, name, reason) for (place, source, row, name), reason in found)
        stated = (
            "SELECT line, subject FROM rows WHERE id = ? AND subject IS NOT NULL UNION "
            "SELECT line, subjects.subject FROM rows JOIN subjects USING (id) WHERE id = ?"
        )
        of: dict[str, set[str]] = {}
        for name in gone:
            for line, subject in self._database.execute(stated, (name, name)):
                of.setdefault(content_key(Example.model_validate_json(line)), set()).add(subject)
        if not of:
            return
        remaining = self._database.execute("SELECT id, subject, line FROM rows WHERE gone IS NULL")
        same = ((name, own, of.get(content_key(Example.model_validate_json(line)))) for name, own, line in remaining)
        noted = [(name, subject) for name, own, subjects in same for subject in (subjects or set()) - {own}]
        self._database.executemany("INSERT INTO subjects VALUES (?, ?)", noted)

    def _drop(self, rows: Iterable[tuple[int, str, int, str, str]]) -> None:
        for some in batches(rows):
            entries = [removed_line(name, source, row, reason) for _, source, row, name, reason in some]
            self._database.executemany("INSERT INTO removed VALUES (?, ?)", entries)
            self._database.executemany("UPDATE rows SET gone = ? WHERE rowid = ?", [(one[4], one[0]) for one in some])

    def conflicts(self, shown: int) -> Conflicts:
        """Requests with more than one answer. shown: how many of them are named."""
        found = self._database.execute("SELECT request, id FROM rows WHERE gone IS NULL ORDER BY request, id")
        requests = rows = 0

        def several() -> Iterator[tuple[str, ...]]:
            nonlocal requests, rows
            for _, same in itertools.groupby(found, key=lambda one: one[0]):
                ids = tuple(name for _, name in same)
                if len(ids) > 1:
                    requests, rows = requests + 1, rows + len(ids)
                    yield ids

        first = heapq.nsmallest(shown, several())
        return Conflicts(requests=requests, rows=rows, examples=tuple(first))

    def compared_rows(self) -> dict[str, list[ComparedRow]]:
        """The remaining rows as comparisons need them: split -> rows, sorted by id."""
        splits: dict[str, list[ComparedRow]] = {name: [] for name in SPLITS}
        query = "SELECT split, id, grp, wording, answer, labels, earlier FROM rows WHERE gone IS NULL ORDER BY id"
        for split, name, group, wording, answer, labels, earlier in self._database.execute(query):
            said = parse_json(labels) if labels else _NO_LABELS
            begun = tuple(parse_json(earlier)) if earlier else ()
            splits[split].append(ComparedRow(name, group, wording, answer.hex(), said, begun))
        return splits

    def regroup(self, groups: Iterable[tuple[str, str]], split: Split) -> None:
        """Set the groups of rows, (id, group), that depend on all rows."""
        query = "SELECT rowid, line FROM rows WHERE id = ? AND gone IS NULL"
        found = ((*self._database.execute(query, (name,)).fetchone(), group) for name, group in groups)
        for some in batches(found):
            self._database.executemany(
                "UPDATE rows SET grp = ?, split = ?, line = ? WHERE rowid = ?",
                [(group, split_of(group, split), _with_group(line, group), place) for place, line, group in some],
            )

    def times(self, key: str) -> dict[str, int]:
        """Time -> remaining rows of that time. key: the label with the time."""
        query = "SELECT label(labels, ?), COUNT(*) FROM rows WHERE gone IS NULL GROUP BY 1"
        return dict(self._database.execute(query, (key,)))

    def kinds(self, key: str, *, by: str = "grp") -> list[tuple[str, str, int]]:
        """(group or split, stratum, remaining rows). key: the label with the stratum."""
        query = f"SELECT {by}, label(labels, ?), COUNT(*) FROM rows WHERE gone IS NULL GROUP BY 1, 2 ORDER BY 1, 2"  # noqa: S608
        return list(self._database.execute(query, (key,)))

    def place_groups(self, places: Mapping[str, str]) -> None:
        """Assign groups to splits: group -> split."""
        self._database.execute("CREATE INDEX by_group ON rows (grp)")
        pairs = ((split, group) for group, split in places.items())
        self._database.executemany("UPDATE rows SET split = ? WHERE grp = ?", pairs)

    def place_times(self, key: str, places: Callable[[str], str], reason: str) -> None:
        """Assign rows to splits by their time. Of a group in several splits, only the rows in the latest are kept."""
        self._database.create_function("place", 1, places, deterministic=True)
        self._database.execute("UPDATE rows SET split = place(label(labels, ?)) WHERE gone IS NULL", (key,))
        found = self._database.execute(
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

    def span(self, key: str) -> dict[str, tuple[str, str]]:
        """Split -> the earliest and latest time of its remaining rows. key: the label with the time."""
        query = (
            "SELECT split, MIN(label(labels, ?1)), MAX(label(labels, ?1)) FROM rows WHERE gone IS NULL GROUP BY split"
        )
        found = {split: (first, last) for split, first, last in self._database.execute(query, (key,))}
        return {name: found[name] for name in SPLITS if name in found}

    def counts(self) -> dict[str, dict[str, int]]:
        """Remaining rows and groups of each split, and remaining rows of each licence."""
        query = "SELECT split, COUNT(*), COUNT(DISTINCT grp) FROM rows WHERE gone IS NULL GROUP BY split"
        found = {split: (rows, groups) for split, rows, groups in self._database.execute(query)}
        licences = self._database.execute("SELECT licence, COUNT(*) FROM rows WHERE gone IS NULL GROUP BY licence")
        return {
            "splits": {name: found.get(name, (0, 0))[0] for name in SPLITS},
            "groups": {name: found.get(name, (0, 0))[1] for name in SPLITS},
            "licences": dict(sorted(licences)),
        }

    def changed(self) -> int:
        """The number of remaining rows that differ from what was read."""
        return int(self._database.execute("SELECT COUNT(*) FROM rows WHERE gone IS NULL AND changed").fetchone()[0])

    def reasons(self) -> dict[str, int]:
        """Reason -> removed rows."""
        return dict(sorted(self._database.execute("SELECT reason, COUNT(*) FROM removed GROUP BY reason")))

    def removed_for(self, beginning: str) -> list[tuple[str, str]]:
        """(place, reason) of the rows whose reason begins like this, in the order of the files."""
        query = "SELECT line FROM removed WHERE substr(reason, 1, ?) = ?"
        lines = [parse_json(line) for (line,) in self._database.execute(query, (len(beginning), beginning))]
        found = sorted((line["source"], line["row"], line["reason"]) for line in lines)
        return [(f"{source}, row {row}", reason) for source, row, reason in found]

    def lines(self, split: str) -> Iterator[bytes]:
        """The split's rows as canonical JSON lines, sorted by id."""
        query = "SELECT line FROM rows WHERE split = ? AND gone IS NULL ORDER BY id"
        return (line for (line,) in self._database.execute(query, (split,)))

    def sample(self, count: int) -> list[Example]:
        """At most count remaining rows, those with the smallest ids; ids are digests, so nobody chooses them."""
        query = "SELECT line FROM rows WHERE gone IS NULL ORDER BY id LIMIT ?"
        return [Example.model_validate_json(line) for (line,) in self._database.execute(query, (count,))]

    def ids(self) -> Iterator[str]:
        """The ids of the remaining rows."""
        return (name for (name,) in self._database.execute("SELECT id FROM rows WHERE gone IS NULL"))

    def licences(self) -> list[tuple[str, str]]:
        """The distinct (source, licence) pairs of the remaining rows."""
        return list(self._database.execute("SELECT DISTINCT source, licence FROM rows WHERE gone IS NULL"))

    def subject_lines(self) -> Iterator[bytes]:
        """Further subjects of the remaining rows, which their copies stated, as sorted JSON lines."""
        query = (
            "SELECT DISTINCT id, subject FROM subjects WHERE id IN (SELECT id FROM rows WHERE gone IS NULL) "
            "ORDER BY id, subject"
        )
        return (canonical({"id": name, "subject": said}) + b"\n" for name, said in self._database.execute(query))

    def removed_lines(self) -> Iterator[bytes]:
        """The lines of removed rows, sorted."""
        return (line for (line,) in self._database.execute("SELECT line FROM removed ORDER BY line"))


def batches(rows: Iterable[Any], size: int = 10_000) -> Iterator[list[Any]]:
    """Lists of at most `size` rows."""
    left = iter(rows)
    while some := list(itertools.islice(left, size)):
        yield some

"""The staging database of a build: sorts, compares and writes out rows that may not fit into memory.

It is an SQLite file in the build's work folder, deleted afterwards. Memory holds only what comparing requests needs.
"""

from __future__ import annotations

# ruff: noqa: S608 - queries are made of constants only
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tunesmith.core.digests import canonical_lines
from tunesmith.core.errors import TunesmithError
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.dataset import SPLITS, Example, encode_examples
from tunesmith.data.duplicates import answer_key, request_key
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.settings import Split
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.leakage import ComparedRow
from tunesmith.records.dataset import Conflicts

StagedRow = tuple[str, str, int, int, str, str | None, bytes, bytes, str, str, bytes, str, str, str, str, bytes]
RemovedLine = tuple[str | None, str, int, str]  # id, where it was computed already, source, row and reason
_NO_LABELS: Mapping[str, str] = {}
_COLUMNS = (
    "id, tie, row, changed, source, subject, key, request, wording, earlier, answer, grp, split, licence, labels, line"
)
_INSERT = f"INSERT INTO rows VALUES ({'?, ' * 16}NULL)"
# gone: why a row was removed after it had passed the checks of a row. removed: rows that did not pass these.
_TABLES = f"""
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
    CREATE TABLE rows ({_COLUMNS}, gone);
    CREATE TABLE removed (id, source, row, reason);
    CREATE TABLE subjects (id, subject);
    CREATE VIEW remaining AS SELECT * FROM rows WHERE gone IS NULL;
    CREATE VIEW left_out AS SELECT * FROM removed
        UNION ALL SELECT id, source, row, gone AS reason FROM rows WHERE gone IS NOT NULL;
"""


def staged_row(example: Example, row: int, changed: bool, split: Split) -> StagedRow:
    """An example as the database stores it. row: its number in the file; changed: it differs from what was read.

    tie: orders rows of one id. key: equal for exact duplicates. request: equal for rows with the same request.
    earlier: as JSON, "" where only the last answer is learned.
    """
    asked, answer = _digest(request_key(example.request)), _digest(answer_key(example.answer))
    tie = example.model_dump_json(include={"licence", "group", "subject", "tenant", "region", "labels"})
    return (
        example.id, tie, row, changed, example.source, example.subject, asked + answer, asked,
        example.wording, json.dumps(example.earlier) if example.earlier else "", answer,
        example.group, split_of(example.group, split), example.licence,
        json.dumps(example.labels) if example.labels else "", encode_examples([example]),
    )  # fmt: skip


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


_FUNCTIONS: Mapping[str, Callable[..., str | bytes | int]] = {
    "label": lambda labels, key: parse_json(labels)[key],
    "content": lambda line: content_key(Example.model_validate_json(line)),
    "rank": SPLITS.index,
    "with_group": lambda line, group: canonical_lines([{**parse_json(line), "group": group}]),
    "removed_line": lambda *row: canonical_lines([dict(zip(("id", "source", "row", "reason"), row, strict=True))]),
}


@contextmanager
def staging_database(folder: Path) -> Iterator[StagingDatabase]:
    """A database in a file of this folder, which exists meanwhile. Raises TunesmithError where the disk is full."""
    path = folder / "rows.db"
    path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            for name, function in _FUNCTIONS.items():
                database.create_function(name, -1, function, deterministic=True)
            database.executescript(_TABLES + "BEGIN;")
            yield StagingDatabase(database)
    except sqlite3.OperationalError as error:
        if not any(said in str(error) for said in ("full", "disk I/O")):
            raise
        raise TunesmithError(
            f"the disk is full or failing ({error})",
            where=str(path),
            fix="free space: a build needs about three times the size of its rows",
        ) from error
    finally:
        path.unlink(missing_ok=True)


class StagingDatabase:
    """Rows that become a dataset."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def add(self, kept: Sequence[StagedRow], removed: Sequence[RemovedLine]) -> None:
        """Add rows, in any order."""
        self._database.executemany(_INSERT, kept)
        self._database.executemany("INSERT INTO removed VALUES (?, ?, ?, ?)", removed)

    def drop_copies(self, contents: Collection[str]) -> None:
        """Remove the rows with the content keys of recalled ones, whatever they state about themselves."""
        if contents:
            these = "UPDATE rows SET gone = ? WHERE content(line) IN (SELECT value FROM json_each(?))"
            self._database.execute(these, (WITHDRAWN, json.dumps(list(contents))))

    def drop_repeats(self, held_out: Collection[str]) -> None:
        """Keep one of the rows with equal request and answer; the order in which rows were added does not matter.

        held_out: sources whose rows are kept rather than their copies in other sources, so that none is trained on.
        After that, a row that states a subject is kept rather than one that states none, and the other subjects of its
        copies are noted, so that a recall of any of them finds the row.
        """
        order = "source NOT IN (SELECT value FROM json_each(?)), subject IS NULL, id, tie, row"
        ranked = f"SELECT rowid AS place, ROW_NUMBER() OVER (PARTITION BY key ORDER BY {order}) AS copy FROM rows"
        self._drop(f"SELECT place FROM ({ranked} WHERE gone IS NULL) WHERE copy > 1", EXACT, json.dumps([*held_out]))
        self._database.execute(
            "INSERT INTO subjects SELECT kept.id, copy.subject FROM rows AS copy JOIN remaining AS kept USING (key) "
            "WHERE copy.gone = ? AND copy.subject IS NOT NULL AND copy.subject IS NOT kept.subject",
            (EXACT,),
        )
        self._database.execute("CREATE INDEX by_id ON rows (id)")

    def hold_out(self, sources: Collection[str]) -> list[str]:
        """Assign the groups of these sources' rows to the test split; returns the groups.

        Rows that were removed as duplicates count too.
        """
        groups = "SELECT DISTINCT grp FROM rows WHERE grp != '' AND source IN (SELECT value FROM json_each(?))"
        held = [group for (group,) in self._database.execute(f"{groups} ORDER BY grp", (json.dumps(list(sources)),))]
        if held:
            self.place_groups(dict.fromkeys(held, "test"))
        return held

    def drop(self, gone: Mapping[str, str]) -> None:
        """Remove rows: id -> reason.

        Their subjects are noted at the remaining rows of the same content, so that a recall finds those.
        """
        reasons = ((reason, name) for name, reason in gone.items())
        self._database.executemany("UPDATE rows SET gone = ? WHERE id = ? AND gone IS NULL", reasons)
        stated = (
            "SELECT content(line), subject FROM rows WHERE id = ?1 AND subject IS NOT NULL UNION "
            "SELECT content(line), subjects.subject FROM rows JOIN subjects USING (id) WHERE id = ?1"
        )
        of: dict[str, set[str]] = {}
        for name in gone:
            for content, subject in self._database.execute(stated, (name,)):
                of.setdefault(content, set()).add(subject)
        if of:
            others = self._database.execute("SELECT id, subject, content(line) FROM remaining")
            noted = [(name, one) for name, own, content in others for one in of.get(content, set()) - {own}]
            self._database.executemany("INSERT INTO subjects VALUES (?, ?)", noted)

    def conflicts(self, shown: int) -> Conflicts:
        """Requests with more than one answer. shown: how many of them are named."""
        query = "SELECT json_group_array(id) FROM remaining GROUP BY request HAVING COUNT(*) > 1 ORDER BY MIN(id)"
        requests = rows = 0
        examples: list[tuple[str, ...]] = []
        for (listed,) in self._database.execute(query):
            ids = tuple(sorted(parse_json(listed)))
            requests, rows = requests + 1, rows + len(ids)
            examples += [ids] if requests <= shown else []
        return Conflicts(requests=requests, rows=rows, examples=tuple(examples))

    def compared_rows(self) -> dict[str, list[ComparedRow]]:
        """The remaining rows as comparisons need them: split -> rows, sorted by id."""
        splits: dict[str, list[ComparedRow]] = {name: [] for name in SPLITS}
        query = "SELECT split, id, grp, wording, answer, labels, earlier FROM remaining ORDER BY id"
        for split, name, group, wording, answer, labels, earlier in self._database.execute(query):
            said = parse_json(labels) if labels else _NO_LABELS
            begun = tuple(parse_json(earlier)) if earlier else ()
            splits[split].append(ComparedRow(name, group, wording, answer.hex(), said, begun))
        return splits

    def regroup(self, groups: Iterable[tuple[str, str]], split: Split) -> None:
        """Set the groups of rows, (id, group), that depend on all rows."""
        self._database.executemany(
            "UPDATE rows SET grp = ?1, split = ?2, line = with_group(line, ?1) WHERE id = ?3 AND gone IS NULL",
            ((group, split_of(group, split), name) for name, group in groups),
        )

    def times(self, key: str) -> dict[str, int]:
        """Time -> remaining rows of that time. key: the label with the time."""
        return dict(self._database.execute("SELECT label(labels, ?), COUNT(*) FROM remaining GROUP BY 1", (key,)))

    def kinds(self, key: str, *, by: str = "grp") -> list[tuple[str, str, int]]:
        """(group or split, stratum, remaining rows). key: the label with the stratum."""
        query = f"SELECT {by}, label(labels, ?), COUNT(*) FROM remaining GROUP BY 1, 2 ORDER BY 1, 2"
        return list(self._database.execute(query, (key,)))

    def place_groups(self, places: Mapping[str, str]) -> None:
        """Assign groups to splits: group -> split."""
        self._database.execute("CREATE INDEX IF NOT EXISTS by_group ON rows (grp)")
        pairs = ((split, group) for group, split in places.items())
        self._database.executemany("UPDATE rows SET split = ? WHERE grp = ?", pairs)

    def place_times(self, key: str, places: Callable[[str], str], reason: str) -> None:
        """Assign rows to splits by their time. Of a group in several splits, only the rows in the latest are kept."""
        self._database.create_function("place", 1, places, deterministic=True)
        self._database.execute("UPDATE rows SET split = place(label(labels, ?)) WHERE gone IS NULL", (key,))
        ranked = (
            "SELECT rowid AS place, rank(split) AS own, MAX(rank(split)) OVER (PARTITION BY grp) AS latest FROM rows"
        )
        self._drop(f"SELECT place FROM ({ranked} WHERE gone IS NULL) WHERE own < latest", reason)

    def _drop(self, places: str, reason: str, *given: str) -> None:
        """Remove the rows whose rowids a query names."""
        self._database.execute(f"UPDATE rows SET gone = ? WHERE rowid IN ({places})", (reason, *given))

    def span(self, key: str) -> dict[str, tuple[str, str]]:
        """Split -> the earliest and latest time of its remaining rows. key: the label with the time."""
        query = "SELECT split, MIN(label(labels, ?1)), MAX(label(labels, ?1)) FROM remaining GROUP BY split"
        spans = {split: (first, last) for split, first, last in self._database.execute(query, (key,))}
        return {name: spans[name] for name in SPLITS if name in spans}

    def changed(self) -> int:
        """The number of remaining rows that differ from what was read."""
        return int(self._database.execute("SELECT COUNT(*) FROM remaining WHERE changed").fetchone()[0])

    def reasons(self) -> dict[str, int]:
        """Reason -> removed rows."""
        return dict(self._database.execute("SELECT reason, COUNT(*) FROM left_out GROUP BY reason ORDER BY reason"))

    def removed_for(self, beginning: str) -> list[tuple[str, str]]:
        """(place, reason) of the rows whose reason begins like this, in the order of the files."""
        query = "SELECT source, row, reason FROM left_out WHERE substr(reason, 1, length(?1)) = ?1 ORDER BY 1, 2, 3"
        return [(f"{source}, row {row}", reason) for source, row, reason in self._database.execute(query, (beginning,))]

    def lines(self, split: str) -> Iterator[bytes]:
        """The split's rows as canonical JSON lines, sorted by id."""
        return self._column("SELECT line FROM remaining WHERE split = ? ORDER BY id", split)

    def sample(self, count: int) -> list[Example]:
        """At most count remaining rows, those with the smallest ids; ids are digests, so nobody chooses them."""
        lines = self._column("SELECT line FROM remaining ORDER BY id LIMIT ?", count)
        return [Example.model_validate_json(line) for line in lines]

    def ids(self) -> Iterator[str]:
        """The ids of the remaining rows."""
        return self._column("SELECT id FROM remaining")

    def licences(self) -> list[tuple[str, str, int]]:
        """(source, licence, remaining rows)."""
        return list(self._database.execute("SELECT source, licence, COUNT(*) FROM remaining GROUP BY 1, 2"))

    def subject_lines(self) -> Iterator[bytes]:
        """Further subjects of the remaining rows, which their copies stated, as sorted JSON lines."""
        query = "SELECT DISTINCT id, subject FROM subjects WHERE id IN (SELECT id FROM remaining) ORDER BY id, subject"
        return (canonical_lines([{"id": name, "subject": said}]) for name, said in self._database.execute(query))

    def removed_lines(self) -> Iterator[bytes]:
        """The lines of removed rows, sorted."""
        return self._column("SELECT removed_line(id, source, row, reason) FROM left_out ORDER BY 1")

    def _column(self, query: str, *given: object) -> Iterator[Any]:
        return (value for (value,) in self._database.execute(query, given))


EXACT: Final = "exact duplicate"
PRIVATE: Final = "personal data or a secret"
OVERLONG: Final = "overlong"
OFF_SCHEMA: Final = "answer not valid under the schema"
WITHDRAWN: Final = "withdrawn by a recall"
OUTSIDE_WORDING: Final = "same wording as a row of an outside test set"
HAS_CONTROL: Final = "holds the control token"  # the token follows
ALTERED: Final = "answer changed by the base's chat template, such as by white space at its ends"
SPOILT: Final = "after pseudonymisation"  # follows the reason
EDITED: Final = "in a row that was edited in a review"  # follows the reason
SPOILT_CALL: Final = "tool call not valid JSON after pseudonymisation"


@dataclass
class Account:
    """Counts of some rows. read: source file -> kept and removed ones. ignored: key that no format reads -> rows that
    have it.

    privacy: entity -> values found. fields: (turn's role, entity) -> findings. originals: example id -> pseudonym ->
    original. longest: the most tokens of a row. reviewed: id of a reviewed row -> rows that its decision applied to.
    withdrawn: content keys of recalled rows whose copies are recalled too. edits: id of an edited row -> content keys
    before and after. respelled: rows read whose JSON answers were written as constrained decoding writes them.
    """

    read: Counter[str] = field(default_factory=Counter)
    privacy: Counter[str] = field(default_factory=Counter)
    fields: Counter[tuple[str, str]] = field(default_factory=Counter)
    originals: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    reviewed: Counter[str] = field(default_factory=Counter)
    withdrawn: set[str] = field(default_factory=set)
    edits: dict[str, set[str]] = field(default_factory=dict)
    respelled: int = 0

    def merge(self, other: Account) -> None:
        """Add another account's counts; `longest` becomes the larger one."""
        self.respelled += other.respelled
        self.longest = max(self.longest, other.longest)
        for name in ("read", "privacy", "fields", "originals", "ignored", "reviewed", "withdrawn"):
            getattr(self, name).update(getattr(other, name))
        for row, contents in other.edits.items():
            self.edits.setdefault(row, set()).update(contents)

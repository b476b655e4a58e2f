"""Reads and writes the files of JSON lines that evidence is kept in, and refuses lines that are not valid evidence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.store.records import Record
from tunesmith.store.store import Store


def encode_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Canonical JSON, one row a line."""
    return b"".join(canonical(dict(row)) + b"\n" for row in rows)


@dataclass(frozen=True, slots=True)
class LineFile:
    """A kind of file of JSON lines. name: the blob's name in a record.

    what, verb: what a line holds, and how it was made, for messages. unique: keys whose texts together occur once.
    texts: further keys that hold text. values: keys that the caller checks; None allows any further keys. optional:
    keys that a line may lack.
    """

    name: str
    what: str
    verb: str
    unique: tuple[str, ...]
    texts: tuple[str, ...] = ()
    values: tuple[str, ...] | None = ()
    optional: frozenset[str] = frozenset()

    def read(self, store: Store, record: Record, where: str = "") -> list[tuple[str, dict[str, Any]]]:
        """(place, line) for each line. place: where (by default the file's name) and the line's number.

        Raises Inconclusive, with the place, for a line that is not JSON, has other keys or a key twice, holds no text
        where text belongs, or repeats an earlier line's unique texts.
        """
        found: list[tuple[str, dict[str, Any]]] = []
        seen: set[tuple[str, ...]] = set()
        for number, raw in enumerate(store.read_blob(record.blobs[self.name]).splitlines(), start=1):
            place = f"{where or self.name}, line {number}"
            line = self._parsed(raw, place)
            key = tuple(line[name] for name in self.unique)
            if key in seen:
                raise Inconclusive(f"{' '.join(map(repr, key))} was {self.verb} twice", where=place)
            seen.add(key)
            found.append((place, line))
        return found

    def _parsed(self, raw: bytes, place: str) -> dict[str, Any]:
        texts = (*self.unique, *self.texts)
        try:
            line = parse_json(raw)
        except ValueError as error:
            raise Inconclusive(f"not {self.what}: {error}", where=place) from error
        if self.values is None:
            if not isinstance(line, dict) or not line.keys() >= set(texts):
                raise Inconclusive(f"not {self.what}", where=place)
        elif not isinstance(line, dict) or line.keys() - self.optional != {*texts, *self.values}:
            keys = ", ".join(sorted((*texts, *self.values)))
            raise Inconclusive(f"{self.what} has exactly the keys {keys}", where=place)
        for name in texts:
            if not isinstance(line[name], str) or not line[name]:
                raise Inconclusive(f"{name} is {line[name]!r}, not a name", where=place)
        return line


_ANSWERS = LineFile("answers.jsonl", "an answer with an id", "answered", unique=("id",), values=None)


def read_answer_lines(
    store: Store, record: Record, expected: Collection[str], where: str, what: str = "rows"
) -> dict[str, dict[str, Any]]:
    """The lines of an answers record: id -> line, exactly one for each expected id. what: what was asked, in words.

    Raises Inconclusive otherwise.
    """
    if _ANSWERS.name not in record.blobs:
        raise Inconclusive("the record holds no answers", where=where)
    lines = {line["id"]: line for _, line in _ANSWERS.read(store, record, where)}
    missing, foreign = sorted(set(expected) - lines.keys()), sorted(lines.keys() - set(expected))
    if missing:
        raise Inconclusive(
            f"{len(missing)} of {len(expected)} {what} have no answer, such as {missing[0]!r}", where=where
        )
    if foreign:
        raise Inconclusive(
            f"{len(foreign)} answers are to {what} that were not asked, such as {foreign[0]!r}", where=where
        )
    return lines


class AnswerLines(Sequence[Mapping[str, Any]]):
    """The lines of an answers record in the order of its rows, each read when it is looked at first.

    ids: of the rows. Raises Inconclusive as read_answer_lines does, for a line that does not fit when it is looked at.
    """

    def __init__(self, store: Store, record: Record, ids: Sequence[str], where: str) -> None:
        self._read_all = partial(read_answer_lines, store, record, frozenset(ids), where)
        self._ids, self._lines = ids, list[Mapping[str, Any] | None]([None] * len(ids))
        self._raw = store.read_blob(record.blobs[_ANSWERS.name]).splitlines() if _ANSWERS.name in record.blobs else []
        if len(self._raw) != len(ids):
            self._read_in_order()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: Any) -> Any:
        line = self._lines[place]
        if line is None:
            line = self._lines[place] = self._read(place)
        return line

    def mention(self, key: str) -> bool:
        """Whether some line may have a key: False only if none has."""
        written = f'"{key}"'.encode()
        return any(written in raw for raw in self._raw)

    def _read(self, place: int) -> Mapping[str, Any]:
        try:
            line = parse_json(self._raw[place])
        except ValueError:
            line = None
        if isinstance(line, dict) and line.get("id") == self._ids[place]:
            return line
        self._read_in_order()  # written in another order, or not valid
        found = self._lines[place]
        assert found is not None
        return found

    def _read_in_order(self) -> None:
        by_id = self._read_all()
        self._lines = [by_id[each] for each in self._ids]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number, not a boolean."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def is_share(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number from 0 to 1."""
    return is_number(value) and 0.0 <= value <= 1.0

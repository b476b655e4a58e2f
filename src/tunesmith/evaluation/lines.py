"""Reads and writes the files of JSON lines that evidence is kept in, and refuses lines that are not valid evidence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Self, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.core.digests import canonical_lines
from tunesmith.core.errors import Inconclusive
from tunesmith.core.reading.strict_json import Fields, NotJson, parse_json
from tunesmith.core.values import Frozen
from tunesmith.records.evaluation import AnswersBody
from tunesmith.store.records import Record
from tunesmith.store.store import Store

ITEMS = "items.jsonl"  # of an answers record: what was asked
_OTHER_PARENT = {
    "base": "the answers are of other weights than the candidate's",
    "training": "the answers are of other weights than the candidate's",
    "candidate": "the answers are another candidate's",
    "dataset": "the answers are to rows of another dataset version",
    "answers": "other answers were judged",
}
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Lines = Mapping[str, Fields]  # id -> line of an answers record


class Asked(Frozen):
    """Something that is asked, named by its id."""

    id: str


Item = TypeVar("Item", bound=Asked)


class Line(Frozen):
    """A line of a file of evidence. file: the file's name in a record; unique: fields whose values occur once together.

    A number is finite, and no text or boolean.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    file: ClassVar[str]
    unique: ClassVar[tuple[str, ...]]

    @classmethod
    def read(cls, store: Store, record: Record, where: str = "") -> list[Self]:
        """The lines of a record's file; none where it has no such file. where: in messages, by default the file's name.

        Raises Inconclusive, with the line's number, for one that is not JSON, has a key twice, is not such a line, or
        repeats an earlier line's unique fields.
        """
        lines: dict[tuple[str, ...], Self] = {}
        raw = store.read_blob(record.blobs[cls.file]) if cls.file in record.blobs else b""
        for number, text in enumerate(raw.splitlines(), start=1):
            place = f"{where or cls.file}, line {number}"
            try:
                line = cls.model_validate(parse_json(text))
            except ValueError as error:
                raise Inconclusive(why_not(error), where=place) from error
            key = tuple(getattr(line, name) for name in cls.unique)
            if key in lines:
                raise Inconclusive(f"{' '.join(map(repr, key))} is there twice", where=place)
            lines[key] = line
        return list(lines.values())

    @classmethod
    def grouped(cls, lines: Iterable[Self], *fields: str) -> dict[Any, list[Self]]:
        """Lines by the value of a field, or by those of several, in the order of these values and then of ids."""
        ordered = sorted(lines, key=attrgetter(*fields, "id"))
        return {value: list(own) for value, own in groupby(ordered, attrgetter(*fields))}


class CandidateLine(Line):
    """A line about one answer of a candidate. group: of the request; answers to requests of one are not independent."""

    candidate: Name
    id: Name
    group: Name


class AnswerLine(Line):
    """An answer: its id, and what the kind of answer has besides."""

    model_config = ConfigDict(extra="allow")
    file = "answers.jsonl"
    unique = ("id",)
    id: Name


def why_not(error: ValueError) -> str:
    """Why a line is not valid, in words: pydantic's first error, or why it is not JSON."""
    if not isinstance(error, ValidationError):
        return f"not JSON: {error}" if isinstance(error, NotJson) else str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"


def encode_lines(rows: Iterable[Fields | BaseModel]) -> bytes:
    """Canonical JSON, one row a line."""
    return canonical_lines(row.model_dump(mode="json") if isinstance(row, BaseModel) else dict(row) for row in rows)


def read_items(store: Store, record: Record, kind: type[Item]) -> list[Item]:
    """What an answers record answers. Raises Inconclusive for items that cannot be read, and for two of one id."""
    if ITEMS not in record.blobs:
        raise Inconclusive("the record does not hold what was asked")
    try:
        items = [kind.model_validate(parse_json(line)) for line in store.read_blob(record.blobs[ITEMS]).splitlines()]
    except ValueError as error:
        raise Inconclusive(f"what was asked cannot be read: {type(error).__name__}") from error
    if len({item.id for item in items}) != len(items):
        raise Inconclusive("two items have the same id")
    return items


def answers_to(store: Store, digest: str, suite: str, where: str, **parents: str | None) -> tuple[Record, AnswersBody]:
    """An answers record, and what it states. where: in messages. parents: those that it must have, None for none.

    Raises Inconclusive for answers to another suite, and for those that were made from something else.
    """
    record = store.record(digest, kind="answers")
    body = AnswersBody.of(record)
    if body.suite != suite:
        raise Inconclusive(f"these are answers to {body.suite!r}, not to {suite!r}", where=where)
    for role, expected in parents.items():
        if record.parents.get(role) != expected:
            raise Inconclusive(_OTHER_PARENT[role], where=where, fix="evaluate again")
    return record, body


def read_answer_lines(
    store: Store, record: Record, expected: Collection[str], where: str, what: str = "rows"
) -> dict[str, dict[str, Any]]:
    """The lines of an answers record: id -> line, exactly one for each expected id. what: what was asked, in words.

    Raises Inconclusive otherwise.
    """
    if AnswerLine.file not in record.blobs:
        raise Inconclusive("the record holds no answers", where=where)
    lines = {line.id: line.model_dump() for line in AnswerLine.read(store, record, where)}
    for odd, said in (
        (set(expected) - lines.keys(), f"of {len(expected)} {what} have no answer"),
        (lines.keys() - set(expected), f"answers are to {what} that were not asked"),
    ):
        if odd:
            raise Inconclusive(f"{len(odd)} {said}, such as {min(odd)!r}", where=where)
    return lines


class AnswerLines(Sequence[Fields]):
    """The lines of an answers record in the order of its rows, each read when it is looked at first.

    ids: of the rows. Raises Inconclusive as read_answer_lines does, for a line that does not fit when it is looked at.
    """

    def __init__(self, store: Store, record: Record, ids: Sequence[str], where: str) -> None:
        self._read_all = partial(read_answer_lines, store, record, frozenset(ids), where)
        self._ids, self._lines = ids, list[Fields | None]([None] * len(ids))
        blob = record.blobs.get(AnswerLine.file)
        self._raw = store.read_blob(blob).splitlines() if blob else []
        if len(self._raw) != len(ids):
            self._read_in_order()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: Any) -> Any:
        if self._lines[place] is None:
            self._read(place)
        return self._lines[place]

    def mention(self, key: str) -> bool:
        """Whether some line may have a key: False only if none has."""
        written = f'"{key}"'.encode()
        return any(written in raw for raw in self._raw)

    def _read(self, place: int) -> None:
        try:
            line = parse_json(self._raw[place])
        except ValueError:
            line = None
        if isinstance(line, dict) and line.get("id") == self._ids[place]:
            self._lines[place] = line
        else:  # written in another order, or not valid
            self._read_in_order()

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

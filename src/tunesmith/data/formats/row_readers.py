"""Readers of row files: JSONL, JSON, CSV, Parquet and Arrow. file_types.py lists them.

A reader takes a stream, the file's name for error messages, and the part to read. It yields (number, fields) of each
row and raises UsageError, with the place, for the first row that it cannot read.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO, Final, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import Fields, NotJson, parse_json

# These limits keep a wrong or hostile file from filling the memory.
LONGEST_ROW = 64 << 20
LARGEST_JSON = 1 << 30  # a JSON array is parsed whole
LARGEST_GROUP = 4 << 30  # a row group of Parquet is unpacked whole
_PIECE = 1 << 20
_ROWS_AT_ONCE = 1024
_ARROW_FILE = b"ARROW1"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_TOLD_MARK = re.compile(r'"?sep=([^\s"]|\t)"?\r?\n?', re.IGNORECASE)  # a first line that tells Excel the mark
_QUOTED = re.compile(r'(?:^|(?<=[,\t;]))"(?:[^"]|"")*+"?')  # a name in quotes, in the header of CSV


class SourceRow(NamedTuple):
    """One row as it was read. number counts from 1: the line in JSONL, the record in other types."""

    source: str
    number: int
    fields: Fields

    @property
    def where(self) -> str:
        """The place for error messages."""
        return f"{self.source}, row {self.number}"


class Part(NamedTuple):
    """A part of a file. start and stop count bytes of JSONL (at the start of a line) and row groups of Parquet.

    stop: None reads to the end. first: the number of the part's first row.
    """

    start: int = 0
    stop: int | None = None
    first: int = 1


WHOLE: Final = Part()
NumberedRow = tuple[int, Fields]
Reader = Callable[[BinaryIO, str, Part], Iterator[NumberedRow]]


def read_jsonl(stream: BinaryIO, name: str, part: Part) -> Iterator[NumberedRow]:
    """Rows of JSONL: one JSON object a line; empty lines are skipped."""
    number, left = part.first - 1, None if part.stop is None else part.stop - part.start
    if part.start:
        stream.seek(part.start)
    while (left is None or left > 0) and (line := stream.readline(LONGEST_ROW + 1)):
        number += 1
        left = None if left is None else left - len(line)
        where = f"{name}, line {number}"
        if len(line) > LONGEST_ROW:
            raise UsageError(f"the line is longer than {LONGEST_ROW >> 20} MiB", where=where, fix="one row a line")
        text = decoded(line, where, first=number == 1).strip()
        if text:
            yield number, _as_fields(_parse(text, where), where)


def read_json(stream: BinaryIO, name: str, _part: Part) -> Iterator[NumberedRow]:
    """Rows of a JSON array, which is parsed whole."""
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        limit = f"{LARGEST_JSON >> 20} MiB"
        raise UsageError(f"a JSON array is read whole and may have {limit} at most", where=name, fix="make it JSONL")
    rows = _parse(decoded(data, name), name)
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        fix = f"write the list under {lists[0]} alone into a file" if lists else "write [row, row, ...], or use .jsonl"
        raise UsageError("the JSON is not a list of rows", where=name, fix=fix)
    for number, row in enumerate(rows, start=1):
        yield number, _as_fields(row, f"{name}, row {number}")


def read_csv(stream: BinaryIO, name: str, _part: Part) -> Iterator[NumberedRow]:
    """Rows of CSV under the names of its header. What separates these, a comma, tab or semicolon, separates all.

    A first line such as `sep=;` may name another mark. Columns without a name and values, as spreadsheets write them,
    are left out.
    """
    csv.field_size_limit(LONGEST_ROW)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    above = 0  # lines above the table
    try:
        first = text.readline()
        if told := _TOLD_MARK.fullmatch(first):
            first, above = text.readline(), 1
        mark = told[1] if told else max(",\t;", key=_QUOTED.sub("", first).count)
        table = csv.reader(chain([first], text), delimiter=mark, strict=True)
        header = next(table, [])
        columns = {place: key for place, key in enumerate(header) if key.strip()}
        last = max(columns, default=0)
        if len(set(columns.values())) != len(columns):
            fix = "give each column a name of its own"
            raise UsageError(f"the header has repeated names: {header}", where=name, fix=fix)
        for number, row in enumerate(filter(None, table), start=1):
            nameless = [place for place, value in enumerate(row) if value.strip() and place not in columns]
            if nameless or len(row) <= last:
                where = f"{name}, line {above + table.line_num}"
                if nameless and nameless[0] < len(header):
                    fix = "name it in the header, or remove it (pandas: `to_csv(index=False)`)"
                    raise UsageError(f"column {nameless[0] + 1} has values and no name", where=where, fix=fix)
                fix = f"write {mark!r} between fields, and in quotes a field that holds {mark!r} or a line break"
                raise UsageError(f"the row does not have the header's {len(header)} fields", where=where, fix=fix)
            yield number, {key: row[place] for place, key in columns.items()}
    except csv.Error as error:
        where, fix = f"{name}, line {above + table.line_num}", "close each quote, and write a quote in a field twice"
        raise UsageError(f"broken CSV: {error}", where=where, fix=fix) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason}", where=name, fix="convert the file to UTF-8") from error
    finally:
        text.detach()


def read_parquet(stream: BinaryIO, name: str, part: Part) -> Iterator[NumberedRow]:
    """Rows of Parquet, from the row groups of a part."""
    return _rows_of(_parquet_batches(stream, name, part), name, "Parquet", part.first)


def _parquet_batches(stream: BinaryIO, name: str, part: Part) -> Iterator[Any]:
    file = _parquet(stream)
    groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
    for group in groups:
        size = file.metadata.row_group(group).total_byte_size
        if size > LARGEST_GROUP:
            raise UsageError(
                f"row group {group + 1} unpacks to {size >> 20} MiB; at most {LARGEST_GROUP >> 20} MiB are read",
                where=name,
                fix="write smaller row groups",
            )
    yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups))


def parquet_parts(stream: BinaryIO, name: str, _size: int) -> list[Part]:
    """One part for each row group of a Parquet file. Raises UsageError for a broken file."""
    import pyarrow as arrow

    try:
        file = _parquet(stream)
        parts, first = [], 1
        for group in range(file.num_row_groups):
            parts.append(Part(group, group + 1, first))
            first += file.metadata.row_group(group).num_rows
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"broken Parquet: {error}", where=f"{name}, after row 0") from error
    return parts


def line_parts(stream: BinaryIO, _name: str, size: int) -> list[Part]:
    """Parts of whole lines, each of at least `size` bytes except the last."""
    stream.seek(0)
    starts = [(0, 1)]  # (offset, number of the line there)
    offset = lines = 0
    while piece := stream.read(_PIECE):
        while (wanted := starts[-1][0] + size - offset) <= len(piece):  # where in this piece the next part may begin
            cut = piece.find(b"\n", max(0, wanted - 1)) + 1
            if not cut:
                break
            starts.append((offset + cut, 1 + lines + piece.count(b"\n", 0, cut)))
        lines += piece.count(b"\n")
        offset += len(piece)
    if len(starts) > 1 and starts[-1][0] >= offset:
        starts.pop()
    stops = [*(start for start, _ in starts[1:]), None]
    return [Part(start, stop, line) for (start, line), stop in zip(starts, stops, strict=True)]


def _parquet(stream: BinaryIO) -> Any:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(arrow.PythonFile(stream, mode="r"))


def read_arrow(stream: BinaryIO, name: str, _part: Part) -> Iterator[NumberedRow]:
    """Rows of an Arrow file, or of an Arrow stream such as Hugging Face `datasets` saves."""
    return _rows_of(_arrow_batches(stream, name), name, "Arrow")


def _arrow_batches(stream: BinaryIO, name: str) -> Iterator[Any]:
    import pyarrow as arrow
    from pyarrow import ipc

    source = arrow.PythonFile(stream, mode="r")
    if stream.read(len(_ARROW_FILE)) == _ARROW_FILE:
        file = ipc.open_file(source)
        batches = (file.get_batch(place) for place in range(file.num_record_batches))
    else:
        # A stream cut off between two batches would be read without an error, so its end mark is checked.
        stream.seek(-min(len(_ARROW_END), stream.seek(0, os.SEEK_END)), os.SEEK_END)
        if stream.read() != _ARROW_END:
            raise UsageError("the Arrow stream is truncated", where=name, fix="copy or save it again")
        stream.seek(0)
        batches = iter(ipc.open_stream(source))
    for batch in batches:
        yield from (batch.slice(start, _ROWS_AT_ONCE) for start in range(0, batch.num_rows, _ROWS_AT_ONCE))


def _rows_of(batches: Iterator[Any], name: str, kind: str, first: int = 1) -> Iterator[NumberedRow]:
    """The batches' rows as Python's values. Raises UsageError where Python has none. first: the number of the first."""
    import pyarrow as arrow

    number = first - 1
    try:
        for batch in batches:
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError, LookupError) as error:
                raise UsageError(
                    f"a value cannot be read: {error}",
                    where=f"{name}, in the {batch.num_rows} rows after row {number}",
                    fix="correct its column: text must be UTF-8, times of the years 1 to 9999 and of a known zone",
                ) from error
            for row in rows:
                number += 1
                yield number, _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"broken {kind}: {error}", where=f"{name}, after row {number}") from error


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null: Parquet gives every key of a struct to every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def decoded(data: bytes, where: str, *, first: bool = True) -> str:
    """The text, without the byte order mark that some editors write first. Raises UsageError for other encodings."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 at byte {error.start + 1}: {error.reason}", where=where, fix="convert the file to UTF-8"
        ) from error


def _parse(text: str, where: str) -> Any:
    """The value of strict JSON. Raises UsageError with the place."""
    try:
        return parse_json(text)
    except NotJson as error:
        fix = "correct the row"
        if error.what == "Extra data" and where.endswith(".json"):
            fix = "one row a line is JSONL: name the file .jsonl"
        elif text in ("[", "[{", "{"):
            fix = "a list over several lines is JSON: name the file .json"
        place = "" if error.line is None else f", column {error.column}"
        if error.line is not None and error.line > 1:
            place = f", line {error.line}{place}"
        raise UsageError(f"broken JSON: {error.what}", where=f"{where}{place}", fix=fix) from None


def _as_fields(row: Any, where: str) -> Fields:
    """The row without keys that are null, as Parquet gives it. Inside, only the formats know what null means."""
    if not isinstance(row, dict):
        raise UsageError(f"a row must be an object, not a {type(row).__name__}", where=where)
    return {key: value for key, value in row.items() if value is not None}

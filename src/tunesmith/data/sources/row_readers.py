"""From the bytes of a file or of a part of it to rows: JSONL, JSON, CSV, Parquet, Arrow; errors with their place."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from tunesmith.core.errors import UsageError

# A longer line is no row of text but a file of another kind, or an attempt to fill the memory.
LONGEST_ROW = 64 << 20
# A JSON array is parsed whole, and so is a row group of Parquet or a record batch of Arrow unpacked.
LARGEST_JSON = 1 << 30
LARGEST_GROUP = 4 << 30
_ROWS_AT_ONCE = 1024
_ARROW_FILE = b"ARROW1"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a file is read: bytes of JSONL (both at the start of a line), row groups of Parquet; else all.

    first: the number of the part's first line or row. stop: None reads to the end.
    """

    start: int = 0
    stop: int | None = None
    first: int = 1


WHOLE: Final = Part()
Numbered = tuple[int, Mapping[str, Any]]
Reader = Callable[[BinaryIO, str, Part], Iterator[Numbered]]


def _read_jsonl(stream: BinaryIO, name: str, part: Part) -> Iterator[Numbered]:
    number, left = part.first - 1, None if part.stop is None else part.stop - part.start
    if part.start:
        stream.seek(part.start)
    while (left is None or left > 0) and (line := stream.readline(LONGEST_ROW + 1)):
        number += 1
        left = None if left is None else left - len(line)
        where = f"{name}, line {number}"
        if len(line) > LONGEST_ROW:
            raise UsageError(f"the line is longer than {LONGEST_ROW >> 20} MiB", where=where, fix="one row a line")
        text = _decode(line, where, first=number == 1).strip()
        if text:
            yield number, _as_fields(_parse(text, where), where)


def _read_json(stream: BinaryIO, name: str, _part: Part) -> Iterator[Numbered]:
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise UsageError("a JSON array is read whole, and this one is too large", where=name, fix="make it JSONL")
    rows = _parse(_decode(data, name, first=True), name)
    if not isinstance(rows, list):
        raise UsageError("the JSON is not a list of rows", where=name, fix="write [row, row, ...], or use .jsonl")
    for number, row in enumerate(rows, start=1):
        yield number, _as_fields(row, f"{name}, row {number}")


def _read_csv(stream: BinaryIO, name: str, _part: Part) -> Iterator[Numbered]:
    csv.field_size_limit(LONGEST_ROW)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        table = csv.DictReader(text, strict=True)
        header = table.fieldnames or []
        if "" in header or len(set(header)) != len(header):
            raise UsageError(f"the header has empty or repeated names: {header}", where=name)
        for number, row in enumerate(table, start=1):
            if None in row or None in row.values():
                raise UsageError(f"not {len(header)} fields, as the header has", where=f"{name}, line {table.line_num}")
            yield number, row
    except csv.Error as error:
        raise UsageError(f"broken CSV: {error}", where=f"{name}, line {table.line_num}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason}", where=name, fix="convert the file to UTF-8") from error
    finally:
        text.detach()


def _read_parquet(stream: BinaryIO, name: str, part: Part) -> Iterator[Numbered]:
    import pyarrow as arrow

    number = part.first - 1
    try:
        file = _parquet(stream)
        groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
        for group in groups:
            size = file.metadata.row_group(group).total_byte_size
            if size > LARGEST_GROUP:
                raise UsageError(
                    f"row group {group + 1} unpacks to {size >> 20} MiB, and {LARGEST_GROUP >> 20} are let in",
                    where=name,
                    fix="write smaller row groups",
                )
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=list(groups)):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"broken Parquet: {error}", where=f"{name}, after row {number}") from error


def parquet_parts(stream: BinaryIO, name: str) -> list[Part]:
    """One part for each row group. Raises UsageError for what is no Parquet."""
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


def _parquet(stream: BinaryIO) -> Any:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(arrow.PythonFile(stream, mode="r"))


def _read_arrow(stream: BinaryIO, name: str, _part: Part) -> Iterator[Numbered]:
    """Arrow's stream, as `datasets` keeps rows, or its file."""
    import pyarrow as arrow
    from pyarrow import ipc

    number = 0
    try:
        source = arrow.PythonFile(stream, mode="r")
        if stream.read(len(_ARROW_FILE)) == _ARROW_FILE:
            file = ipc.open_file(source)
            batches = (file.get_batch(place) for place in range(file.num_record_batches))
        else:
            # A stream that ends between two batches reads as a whole one: its end mark tells.
            stream.seek(-min(len(_ARROW_END), stream.seek(0, os.SEEK_END)), os.SEEK_END)
            if stream.read() != _ARROW_END:
                raise UsageError("the Arrow stream is cut off", where=name, fix="copy or save it again")
            stream.seek(0)
            batches = iter(ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"broken Arrow: {error}", where=f"{name}, after row {number}") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every key of a struct to every row; a null there means that the row has no such key."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _decode(data: bytes, where: str, *, first: bool) -> str:
    """UTF-8, with the byte order mark that some editors put at the start of a file left out."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 at byte {error.start + 1}: {error.reason}", where=where, fix="convert the file to UTF-8"
        ) from error


def _parse(text: str, where: str) -> Any:
    """Strict JSON: no repeated keys, no NaN, no infinities."""
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        fix = "correct the row"
        if error.msg == "Extra data" and where.endswith(".json"):
            fix = "a row a line is JSONL: name the file .jsonl"
        elif text in ("[", "[{", "{"):
            fix = "a list over several lines is JSON: name the file .json"
        raise UsageError(f"broken JSON: {error.msg}", where=f"{where}, {place}", fix=fix) from None
    except RecursionError:
        raise UsageError("the JSON is nested too deep", where=where) from None
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=where, fix="correct the row") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    for key in fields:
        if not key.isascii() and any("\ud800" <= letter <= "\udfff" for letter in key):
            raise ValueError(f"the key {key!r} holds half a surrogate pair")
    return fields


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _as_fields(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"a row is an object, and this is a {type(row).__name__}", where=where)
    return row

"""Infers the schema of a new project's answers from rows: which values are closed, copied from requests, or open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tunesmith.candidates.copying import paths_to_copy, patterns_of, text_fields
from tunesmith.core.messages import Message

_ENUM_VALUES, _ENUM_CHARACTERS = 60, 20_000
_LABELS = 8  # so few values are labels even where requests say them, as a request says "high" for the priority high
# A range is a property of the task, and not of these rows, where it counts from 0 or 1, has more values than a year
# has months, and its ends are seen again and again: 0 to 100 percent.
_RANGE_VALUES, _RANGE_DISTINCT, _RANGE_ENDS = 200, 13, 5
_LARGEST_RANGE = 1 << 53  # beyond, not every reader of JSON tells whole numbers apart
# An object with more keys than this is a table of values, not a record with fields.
_MOST_KEYS = 200
# Below so many levels the schema says the kind of a value only: a check of the schema itself goes only so deep.
_DEEPEST = 24


def schema_and_copied(
    values: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Sequence[Message]]]
) -> tuple[dict[str, Any], list[str]]:
    """The answers' schema and the patterns of the fields to copy.

    A field that is copied from the request is not closed, even where few values were seen, but for labels.
    """
    found = paths_to_copy(infer_schema(values, closed=False), rows)
    schema = infer_schema(values, copied=found)
    free = set(text_fields(schema))
    return schema, patterns_of(schema, [path for path in found if path in free])


def infer_schema(
    values: Sequence[Mapping[str, Any]], *, closed: bool = True, copied: Collection[str] = ()
) -> dict[str, Any]:
    """A JSON Schema that all these answers satisfy.

    closed: list the values of texts that are a vocabulary. copied: paths of texts that requests say, of which only
    labels are listed.
    """
    most = dict.fromkeys(copied, _LABELS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_infer(values, "", 0, lambda path: most.get(path, _ENUM_VALUES) if closed else 0),
    }


def _infer(values: Sequence[Any], path: str, level: int, listed: Callable[[str], int]) -> dict[str, Any]:
    """The schema of the values at a path. listed: a path -> the most texts that may be listed there."""
    kinds = sorted({_kind(value) for value in values})
    if kinds == ["null"]:
        return {"type": ["boolean", "null", "number", "string"]}  # which of them it may have is not known
    if kinds == ["integer", "number"]:
        kinds = ["number"]
    found: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if level >= _DEEPEST:
        return found
    objects = [value for value in values if isinstance(value, dict)]
    keys = list(dict.fromkeys(key for value in objects for key in value))  # an answer is decoded in this order
    if 0 < len(keys) <= _MOST_KEYS:
        found["properties"] = {
            key: _infer(
                [value[key] for value in objects if key in value], f"{path}.{key}" if path else key, level + 1, listed
            )
            for key in keys
        }
        found["required"] = [key for key in keys if all(key in value for value in objects)]
        found["additionalProperties"] = False
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        found["items"] = _infer(items, f"{path}[]", level + 1, listed)
    if kinds == ["integer"] and _is_range(values):
        found |= {"minimum": min(values), "maximum": max(values)}
    if kinds == ["string"] and _is_vocabulary(values, listed(path)):
        found["enum"] = sorted(set(values))
    return found


def _is_range(values: Sequence[int]) -> bool:
    least, most = min(values), max(values)
    if len(values) < _RANGE_VALUES or least not in (0, 1) or most > _LARGEST_RANGE:
        return False
    return len(set(values)) >= _RANGE_DISTINCT and min(values.count(least), values.count(most)) >= _RANGE_ENDS


def _is_vocabulary(values: Sequence[str], most: int) -> bool:
    """Whether so few distinct texts in so many rows are a vocabulary, not free text: nearly each is seen again."""
    times = Counter(values)
    if len(times) > most or sum(map(len, times)) > _ENUM_CHARACTERS or len(values) < 20 * len(times):
        return False
    once = sum(count == 1 for count in times.values())
    return once <= max(len(times) // 20, len(values) // 1000)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")

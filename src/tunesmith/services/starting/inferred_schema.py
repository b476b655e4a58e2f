"""Infers the schema of a new project's answers from rows: which values are closed, copied from requests, or open."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import regex

from tunesmith.candidates.grammars.copying import paths_to_copy, patterns_of, texts_of
from tunesmith.candidates.grammars.words import is_copied, pieces
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import NotJson, parse_json

_ENUM_VALUES, _ENUM_CHARACTERS = 200, 20_000
_MOST_WORDS = 60  # texts that requests say and that may be labels: more of them are copied
_ENUM_TIMES = 20  # how often each is seen on average
_LABEL_TIMES = 5  # the same for whole answers: a prompt lists them, and nothing forbids others
_ASKED = 200  # requests that are searched for all values of a field
_UNSAID = 0.02  # the share of a field's values that requests need not say, as for fields to copy
_UNSAID_NUMBERS = 0.5  # the same for numbers
_FEWEST_TEXTS, _MOST_TEXTS = 6, 0.8  # of several texts, the share that requests say where they say most of them
_WHOLE = regex.compile(r"-?\d+(\s\p{L}+)?")  # 5, or 5 stars
_DIGITS = re.compile(r"\d+")
# A number, date, time, amount (`$5`, `30 min`), duration (`PT30M`), or period of a year (`Q3 2026`, `2026-W05`).
_FIGURES = regex.compile(
    r"[+-]?\p{Sc}?\s?[+-]?\d[\d.,:/ -]*(T[\d.,:+-]+)?(%|[Zz]|[AaPp][Mm]|\p{Sc})?"
    r"|([+-]?\d[\d.,]*\s?\p{L}+\.?\s?)+"
    r"|[Vv]\d+(\.\d+)+"
    r"|P(?=[\dT])(\d+[DWMY])*(T(\d+[HMS])+)?"
    r"|[QWH]\d+[- /]?\d{4}|\d{4}[- /]?[QWH]\d+"
)
# A range is a property of the task, and not of these rows, where it counts from 0 or 1, has more values than a year
# has months, and its ends are seen again and again: 0 to 100 percent. Where only its values are, it gets a margin.
_RANGE_VALUES, _RANGE_DISTINCT, _RANGE_ENDS, _RANGE_TIMES = 200, 13, 5, 10
_LARGEST_RANGE = 1 << 53  # beyond, not every reader of JSON tells whole numbers apart
# An object with more keys than this is a table of values, not a record with fields. Fewer suffice where requests say
# them, such as the ingredients of a recipe, and none is in half of the objects.
_MOST_KEYS, _MOST_SAID_KEYS = 200, 20
# Below so many levels the schema says the kind of a value only: a check of the schema itself goes only so deep.
_DEEPEST = 24


def schema_and_copied(
    values: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Sequence[Message]]]
) -> tuple[dict[str, Any], list[str]]:
    """The answers' schema and the patterns of the fields to copy.

    A value that requests say is not closed, even where few were seen: the next request may say another. But where most
    requests list all values of a text, as "positive or negative?" does, these are the choices. A text with few values
    that every answer has may be a word of the request or a label that happens to stand there: it is not copied either.
    """
    said = _said(rows, most=True)
    said -= _listed(said, rows)
    schema = infer_schema(values, said)
    said -= set(_closed_in_all(infer_schema(values)))
    return schema, patterns_of(schema, [path for path in paths_to_copy(schema, rows) if path in said])


def infer_schema(values: Sequence[Mapping[str, Any]], said: Collection[str] = ()) -> dict[str, Any]:
    """A JSON Schema that all these answers satisfy.

    said: paths of values that requests say, and of objects whose keys they say. They are not closed.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_infer(values, "", 0, said)}


def rare_keys(values: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> list[str]:
    """The paths of the keys that one answer alone has, where the schema forbids other keys.

    As many answers in as many others are likely to have a key that was not seen (Good and Turing's estimate).
    """
    times = Counter(path for value in values for path in set(_keys_of(value, schema, "")))
    return [path for path, count in times.items() if count == 1]


def _keys_of(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """The path of every key that the schema names."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key in schema.get("properties", {}):
                inside = f"{path}.{key}" if path else key
                yield inside
                yield from _keys_of(each, schema["properties"][key], inside)
    elif isinstance(value, list):
        for each in value:
            yield from _keys_of(each, schema.get("items", {}), f"{path}[]")


def answer_labels(rows: Sequence[tuple[str, Sequence[Message]]]) -> tuple[str, ...]:
    """The answers, if they are a few labels that requests do not say, or that most requests list. Whole numbers may be
    labels, as the stars of a review are."""
    answers = [answer for answer, _ in rows]
    if not _is_vocabulary(answers, _LABEL_TIMES, numbers=True):  # too many: the requests need not be searched
        return ()
    named = [(json.dumps({"label": answer}), own) for answer, own in rows]
    said = _said(named)
    return () if "label" in said - _listed(said, named) else tuple(sorted(set(answers)))


def _said(rows: Sequence[tuple[str, Sequence[Message]]], *, most: bool = False) -> set[str]:
    """The paths of texts and keys that requests say in nearly all rows, in capitals or not, and of numbers that they
    say in most rows: `a chair` is 1, and `a dozen` is 12.

    most: also paths of several texts of which most are said wherever they are the value: a town that some requests
    shorten, or a name in whose place some answers have "" or "unknown".
    """
    found: Counter[str] = Counter()
    unsaid: Counter[str] = Counter()
    numbers: set[str] = set()
    texts: dict[str, dict[str, list[int]]] = {}  # path -> text -> how often it is the value, and unsaid
    for answer, own in rows:
        given = _given(own)
        with suppress(NotJson):
            for path, word in _words_of(parse_json(answer)):
                missing = not is_copied(str(word).casefold(), given)
                found[path] += 1
                unsaid[path] += missing
                if not isinstance(word, str):
                    numbers.add(path)
                elif len(known := texts.setdefault(path, {})) <= _ENUM_VALUES:
                    counts = known.setdefault(word, [0, 0])
                    counts[0] += 1
                    counts[1] += missing
    return {
        path
        for path, times in found.items()
        if times >= _ENUM_TIMES
        and (
            unsaid[path] <= (_UNSAID_NUMBERS if path in numbers else _UNSAID) * times
            or (most and _most_said(texts.get(path, {}).values()))
        )
    }


def _most_said(texts: Collection[Sequence[int]]) -> bool:
    """Whether most of several texts are said in most of their rows."""
    said = sum(2 * missing < times for times, missing in texts)
    return len(texts) >= _FEWEST_TEXTS and said >= _MOST_TEXTS * len(texts)


def _words_of(value: Any, path: str = "") -> Iterator[tuple[str, str | int | float]]:
    """The path of every text, number and key in a JSON value, and itself.

    A key has the path of its object.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            yield path, key
            yield from _words_of(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            yield from _words_of(each, f"{path}[]")
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, value


def _given(own: Sequence[Message]) -> list[str]:
    """The pieces of the user's turns, without capitals, and the digits in them: the 3 of `3x`."""
    texts = [turn.content.casefold() for turn in own if turn.role == "user"]
    return pieces([*texts, *(digits for text in texts for digits in _DIGITS.findall(text))])


def _closed_in_all(schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The paths of texts of which a schema lists a few values and that every answer has."""
    if len(schema.get("enum", ())) in range(1, _MOST_WORDS + 1):
        yield path
    for key in schema.get("required", ()):
        yield from _closed_in_all(schema["properties"][key], f"{path}.{key}" if path else key)


def _listed(paths: Collection[str], rows: Sequence[tuple[str, Sequence[Message]]]) -> set[str]:
    """The paths whose values, two or more, all stand in most requests."""
    known: dict[str, set[str]] = {path: set() for path in paths}
    for answer, _ in rows:
        with suppress(NotJson):
            for path, text in texts_of(parse_json(answer)):
                if path in known and len(known[path]) <= _ENUM_VALUES:
                    known[path].add(text)
    given = [_given(own) for _, own in rows[:: -(-len(rows) // _ASKED)]]
    return {
        path
        for path, texts in known.items()
        if 1 < len(texts) <= _ENUM_VALUES
        and 2 * sum(all(is_copied(text.casefold(), said) for text in texts) for said in given) > len(given)
    }


def _infer(values: Sequence[Any], path: str, level: int, said: Collection[str]) -> dict[str, Any]:
    """The schema of the values at a path."""
    kinds = _kinds(values)
    if kinds == ["null"]:
        return {"type": ["boolean", "null", "number", "string"]}  # which of them it may have is not known
    found: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if level >= _DEEPEST:
        return found
    objects = [value for value in values if isinstance(value, dict)]
    keys = list(dict.fromkeys(key for value in objects for key in value))  # an answer is decoded in this order
    if keys and _is_table(objects, keys, path in said):
        inside = _kinds([each for value in objects for each in value.values()])
        if len(inside) == 1 and inside != ["null"]:
            found["additionalProperties"] = {"type": inside[0]}
    elif keys:
        found["properties"] = {
            key: _infer(
                [value[key] for value in objects if key in value], f"{path}.{key}" if path else key, level + 1, said
            )
            for key in keys
        }
        found["required"] = [key for key in keys if all(key in value for value in objects)]
        found["additionalProperties"] = False
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        found["items"] = _infer(items, f"{path}[]", level + 1, said)
    if kinds in (["integer"], ["number"]) and (ends := _range(values, path in said)) is not None:
        found |= {"minimum": ends[0], "maximum": ends[1]}
    if kinds == ["string"] and path not in said and _is_vocabulary(values):
        found["enum"] = sorted(set(values))
    return found


def _is_table(objects: Sequence[Mapping[str, Any]], keys: Sequence[str], said: bool) -> bool:
    """Whether the keys of objects are data and not names of fields. said: whether requests say them."""
    if said and _MOST_SAID_KEYS < len(keys) <= _MOST_KEYS:
        return 2 * max(Counter(key for value in objects for key in value).values()) < len(objects)
    return len(keys) > _MOST_KEYS


def _range(values: Sequence[int | float], said: bool) -> tuple[int, int] | None:
    """The least and the largest number that answers should have; None where these values do not say.

    Numbers that are seldom seen again, such as those of orders, go on beyond what was seen. So do numbers that requests
    say, such as the guests at a table: the next request may say any.
    """
    least, most, distinct = min(values), max(values), len(set(values))
    if said or len(values) < _RANGE_VALUES or distinct < _RANGE_DISTINCT or max(-least, most) > _LARGEST_RANGE:
        return None
    whole = all(isinstance(value, int) for value in values)
    if whole and least in (0, 1) and min(values.count(least), values.count(most)) >= _RANGE_ENDS:
        return int(least), int(most)
    # Within a range, decoding writes no exponent.
    if len(values) < _RANGE_TIMES * distinct or any("e" in repr(value) for value in values):
        return None
    span = most - least
    return math.floor(least - span) if least < 0 else 0, math.ceil(most + span)


def _is_vocabulary(values: Sequence[str], each: int = _ENUM_TIMES, *, numbers: bool = False) -> bool:
    """Whether so few distinct texts in so many rows are a vocabulary, not free text: nearly each is seen again.

    Dates, times and amounts are not: the next row may have another. each: how often a text is seen on average, at
    least. numbers: whole ones may be.
    """
    times = Counter(values)
    if len(times) > _ENUM_VALUES or sum(map(len, times)) > _ENUM_CHARACTERS or len(values) < each * len(times):
        return False
    figures = [text for text in times if _FIGURES.fullmatch(text) and not (numbers and _WHOLE.fullmatch(text))]
    if 2 * len(figures) > len(times):
        return False
    once = sum(count == 1 for count in times.values())
    return once <= max(len(times) // 20, len(values) // 1000)


def _kinds(values: Sequence[Any]) -> list[str]:
    """The JSON types of values; whole numbers among others are numbers."""
    kinds = sorted({_kind(value) for value in values})
    return ["number"] if kinds == ["integer", "number"] else kinds


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")

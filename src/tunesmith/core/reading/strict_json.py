"""Reads JSON strictly: one reader for rows, answers, schemas, requests, records and the replies of servers.

json.loads takes more than JSON: NaN, keys that occur twice, half surrogate pairs, numbers that become infinite. A text
that one part of the system reads and the next one refuses is worse than one that is refused at the start. So a text
that this reader returns can be written as JSON again, hashed, compared and checked against a schema.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

# JSON objects whose keys are not ours: of files, clients, servers and templates. Fields are read only.
Fields: TypeAlias = Mapping[str, Any]
JsonObject: TypeAlias = dict[str, Any]

# More than any sensible value has, and far fewer than would exhaust the stack of the functions that walk a value.
DEEPEST: Final = 64
# Any whole number of so many characters is finite as a double too.
_LONGEST_INTEGER: Final = 308
_SHOWN: Final = 80
# A string, closed or not, or a bracket. Possessive, so that no text makes it try a character twice.
_MARKS: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[\]{}]', re.DOTALL)


class NotJson(ValueError):
    """The text is not one JSON value that all JSON readers understand in the same way.

    what: the reason alone. line, column: where the text stops being JSON, from 1; None where the reason says it.
    """

    def __init__(self, what: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(what if line is None else f"{what}: line {line}, column {column}")
        self.what, self.line, self.column = what, line, column


def parse_json(text: str | bytes) -> Any:
    """The JSON value in a text, or in UTF-8, without surrounding white space. Raises NotJson.

    As RFC 7493 (I-JSON) asks: no key twice, no NaN or infinity, no number that overflows to one, no half of a surrogate
    pair, and no more than 64 levels.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if not text.isascii():
            text.encode()  # half a surrogate pair outside an escape
        _bound_depth(text)
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, error.lineno, error.colno) from None
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 at byte {error.start + 1}: {error.reason}") from None
    except UnicodeEncodeError:
        raise NotJson("it holds half of a surrogate pair") from None
    except RecursionError:
        raise NotJson(_TOO_DEEP) from None
    except ValueError as error:
        raise NotJson(str(error)) from None
    return value


def json_in(text: str) -> Any:
    """The JSON object or list that a text is; None for prose, and for what parse_json refuses."""
    with suppress(NotJson):
        return parse_json(text) if text.lstrip().startswith(("{", "[")) else None


def values_in(value: Any, *keys: str | int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value in a JSON value, itself first and each before those in it, with the keys and places that lead to it.

    keys: those that lead to the value itself.
    """
    yield keys, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from values_in(each, *keys, key)


def unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """The object of these pairs. Raises ValueError for a key that occurs twice."""
    keyed = dict(pairs)
    if len(keyed) != len(pairs):
        key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {key[:_SHOWN]!r} appears twice")
    return keyed


_TOO_DEEP: Final = f"it is nested more than {DEEPEST} levels deep"


def _bound_depth(text: str) -> None:
    if text.count("{") + text.count("[") <= DEEPEST:
        return
    depth = 0
    for match in _MARKS.finditer(text):
        mark = match[0]
        if mark in ("{", "["):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(_TOO_DEEP)
        elif mark in ("}", "]"):
            depth -= 1


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError("a number is too large")
    return int(text)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=unique_keys, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
)


# A string, a comma or colon with the white space around it, or other white space.
_PARTS: Final = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+")|\s*+([,:])\s*+|\s++', re.DOTALL)


def as_decoded(text: str) -> str:
    """The same JSON value as constrained decoding can write it; the text itself if it can already, or is not JSON.

    Numbers keep their digits: 1.50 does not become 1.5.
    """
    try:
        parse_json(text)
    except NotJson:
        return text
    return _PARTS.sub(_respelled, text)


def _respelled(part: re.Match[str]) -> str:
    string, mark = part[1], part[2]
    if string is not None:
        if "\\u" in string or "\\/" in string:
            string = json.dumps(json.loads(string), ensure_ascii=False)
        return str(string).replace("\x7f", "\\u007f")
    if mark is None:
        return ""
    return part[0] if part[0] in (mark, f"{mark} ") else f"{mark} "

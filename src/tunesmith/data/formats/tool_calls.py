"""Reads the tools and tool calls of a row, in the spellings that are in use.

OpenAI has `tools` and `tool_calls` (arguments as text), earlier `functions` and `function_call`. Hugging Face has
arguments as an object, or the whole list as text. ShareGPT has `function_call` and `observation` turns.
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import ToolCall
from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json


def read_tools(value: Any, where: str) -> list[JsonObject]:
    """The tools of a row in OpenAI's form. value: a list or its JSON text; each entry is a function, or has one under
    `function`. Raises UsageError for anything else.
    """
    if isinstance(value, str):
        value = parsed(value or "[]", where)
    if not isinstance(value, list):
        raise UsageError(f"the tools are a {type(value).__name__}, not a list", where=where)
    tools = [_tool(entry, f"{where}[{place}]") for place, entry in enumerate(value)]
    return parsed(_written(tools, where), where)  # type: ignore[no-any-return]


def object_of(entry: Any, what: str, where: str) -> JsonObject:
    """What is given of a turn, a tool or a call. Raises UsageError where it is no object."""
    if not isinstance(entry, dict):
        raise UsageError(f"a {what} must be an object", where=where)
    return given(entry)


def given(entry: Fields) -> JsonObject:
    """The keys of a turn, a tool or a call that are not null: null stands for a key that is not there."""
    return {key: value for key, value in entry.items() if value is not None}


def _tool(entry: Any, where: str) -> JsonObject:
    entry = object_of(entry, "tool", where)
    function = entry.get("function", entry)
    kind = entry.get("type", "function")
    if kind != "function" or not isinstance(function, dict):
        raise UsageError(f"a tool must be a function, not {kind!r}", where=where)
    function = given(function)
    _name(function, where)
    if not isinstance(function.get("parameters", {}), dict):
        raise UsageError("parameters is not a JSON Schema object", where=f"{where}.parameters")
    return {"type": "function", "function": {key: each for key, each in function.items() if key != "type"}}


def read_calls(value: Any, where: str, first: int) -> tuple[ToolCall, ...]:
    """A turn's calls. first: the number of earlier calls in the conversation, which numbers calls without an id."""
    if not isinstance(value, list):
        raise UsageError(f"tool_calls is a {type(value).__name__}, not a list", where=where)
    return tuple(read_call(each, f"{where}[{n}]", first + n) for n, each in enumerate(value))


def read_call(entry: Any, where: str, number: int) -> ToolCall:
    """One call: {"name", "arguments"}, itself or under `function`. Raises UsageError for anything else."""
    entry = object_of(entry, "call", where)
    function = entry.get("function", entry)
    if not isinstance(function, dict) or entry.get("type", "function") != "function":
        raise UsageError("a call must have a function with a name and arguments", where=where)
    name = sound(_name(function, where), f"{where}.name")
    identity = entry.get("id", made_id(number))
    if not isinstance(identity, str) or not identity:
        raise UsageError("the call's id is not text", where=f"{where}.id")
    stated = given(function).get("arguments", {})
    place = f"{where}.arguments"
    text = stated if isinstance(stated, str) else _written(stated, place)
    if not isinstance(parsed(text.strip() or "{}", place), dict):
        raise UsageError("a call's arguments must be a JSON object", where=place)
    return ToolCall(id=sound(identity, f"{where}.id"), name=name, arguments=sound(text.strip() or "{}", place))


def made_id(number: int) -> str:
    """An id for a call without one: nine letters and digits, as Mistral's templates require."""
    return f"call{number:05d}"


def sound(text: str, where: str) -> str:
    """The text. Raises UsageError for NUL characters and broken surrogate pairs."""
    if "\0" in text:
        raise UsageError("the text holds a NUL character", where=where, fix="remove it: the file may be damaged")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError("the text holds half a surrogate pair", where=where, fix="correct it: it is not a character")
    return text


def _name(function: Fields, where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError("the function has no name", where=f"{where}.name")
    return name


def _written(value: Any, where: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # dates, bytes and NaN of Parquet and Arrow
        raise UsageError(f"the value is no JSON: {error}", where=where, fix="write it as JSON text") from None


def parsed(text: str, where: str) -> Any:
    """The value of JSON in a row. Raises UsageError for anything else."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"broken JSON: {error}", where=where, fix="correct the row") from None

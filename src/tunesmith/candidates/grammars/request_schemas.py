"""JSON Schemas that a request brings: what of them can be held, and one schema for the request's and the candidate's.
And grammars that hold an answer to calls of its functions, in the form in which the base's template writes calls.

A request may narrow what a candidate answers, and never widen it. llguidance and xgrammar ignore or approximate some
keywords, so a request's schema may use only those that are held exactly; every other keyword is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from tunesmith.candidates.grammars.schema_rules import resolved, types_of
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.core.values import Schema
from tunesmith.engines.protocol import restricted
from tunesmith.models.call_format import CallFormat

# What `response_format: {"type": "json_object"}` asks for. Stated in full: some backends read a schema that does not
# mention further properties as one without them.
ANY_OBJECT: Final[Schema] = {"type": "object", "additionalProperties": True}

# OpenAI's limits of a schema, https://platform.openai.com/docs/guides/structured-outputs
MOST_PROPERTIES, MOST_LEVELS, MOST_ENUM, MOST_LETTERS = 5_000, 10, 1_000, 120_000
_MOST_MULTIPLE: Final = 10_000  # llguidance computes for minutes over multiples of a large prime

_NOTES: Final = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "$schema"})
_DEFINITIONS: Final = frozenset({"$defs", "definitions"})
_KEYWORDS: Final = frozenset(
    {
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "anyOf", "$ref"),
        *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
_COUNTS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_NUMBERS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TYPES: Final = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_MOST_COUNT: Final = 100_000
_LARGEST: Final = 1e15  # of a bound: the regular expression of larger ones is not written
_REFERENCE: Final = re.compile(r"#(/[^/]+)*")
_OWN, _REQUESTED = "version", "request"


def check_schema(schema: Any, *, strict: bool) -> None:
    """Raise ValueError, which names the place, for a schema that cannot be held exactly.

    strict: also for one beyond the subset that OpenAI takes with `strict: true`.
    """
    counted = dict.fromkeys(("properties", "enum values", "letters"), 0)
    parts = list(_parts(schema))
    checked = frozenset(id(part) for _, part, _ in parts)
    for place, part, level in parts:
        _check_part(part, place, strict)
        if "$ref" in part:
            _check_reference(schema, part["$ref"], place, checked)
        if level > MOST_LEVELS:
            raise ValueError(f"{place}: more than {MOST_LEVELS} levels of nesting")
        named = [*part.get("properties", ()), *(each for each in part.get("enum", ()) if isinstance(each, str))]
        counted["properties"] += len(part.get("properties", ()))
        counted["enum values"] += len(part.get("enum", ()))
        counted["letters"] += sum(map(len, named)) + len(part.get("pattern", "")) + len(str(part.get("const", "")))
        bounds = (MOST_PROPERTIES, MOST_ENUM, MOST_LETTERS)
        for (what, count), most in zip(counted.items(), bounds, strict=True):
            if count > most:
                raise ValueError(f"more than {most} {what} in all")
    if strict and (types_of(schema) != ["object"] or "anyOf" in schema):
        raise ValueError("strict: the schema's own type must be 'object', without anyOf")


def _parts(schema: Any) -> Iterator[tuple[str, JsonObject, int]]:
    """(place, part, level) of a schema and every schema in it. Raises ValueError for what is not a schema."""
    waiting: list[tuple[str, Any, int]] = [("schema", schema, 0)]
    while waiting:
        place, part, level = waiting.pop()
        if isinstance(part, bool) and place != "schema":
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{place}: not a schema")
        for key in ("properties", *sorted(_DEFINITIONS)):
            inside = part.get(key, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{place}.{key}: not an object")
            deeper = level + (key == "properties")
            waiting += [(f"{place}.{key}.{name}"[:200], each, deeper) for name, each in inside.items()]
        options = part.get("anyOf", [])
        if not isinstance(options, list) or (not options and "anyOf" in part):
            raise ValueError(f"{place}.anyOf: not a list of schemas")
        waiting += [(f"{place}.anyOf[{number}]", each, level) for number, each in enumerate(options)]
        waiting += [(f"{place}.{key}", part[key], level) for key in ("items", "additionalProperties") if key in part]
        yield place, part, level


def _check_part(part: Schema, place: str, strict: bool) -> None:
    if unknown := sorted(part.keys() - _KEYWORDS - _NOTES - _DEFINITIONS):
        raise ValueError(f"{place}: {unknown[0][:40]!r} is not supported")
    for alone in ("$ref", "anyOf"):
        if alone in part and (beside := sorted(part.keys() - {alone} - _NOTES - _DEFINITIONS)):
            raise ValueError(f"{place}: {beside[0]!r} is not supported beside {alone!r}")
    for key in ("type", "required"):
        named = part.get(key, [])
        listed = [named] if key == "type" and isinstance(named, str) else named
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise ValueError(f"{place}.{key}: not a list of names")
    if wrong := set(types_of(part)) - _TYPES:
        raise ValueError(f"{place}.type: {sorted(wrong)[0]!r:.80} is not a type of JSON Schema")
    for key, kind, what in (("enum", list, "a list"), ("pattern", str, "text"), ("format", str, "text")):
        if not isinstance(part.get(key, kind()), kind):
            raise ValueError(f"{place}.{key}: not {what}")
    _check_numbers(part, place)
    if strict:
        _check_strict(part, place)


def _check_reference(root: Schema, reference: Any, place: str, checked: frozenset[int]) -> None:
    """Raise ValueError for a reference out of the schema, to nothing, or back to itself with nothing in between.

    checked: ids of the parts that are checked. What is elsewhere, such as a value of enum, was not.
    """
    for _ in range(MOST_LEVELS):
        if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
            raise ValueError(f"{place}.$ref: only '#' and '#/...' are supported")
        try:
            target = resolved(root, reference, place)
        except UsageError:
            target = None
        if not isinstance(target, bool) and id(target) not in checked:
            raise ValueError(f"{place}.$ref: there is no schema at {reference[:80]!r}")
        if not isinstance(target, dict) or "$ref" not in target:
            return
        reference = target["$ref"]
    raise ValueError(f"{place}.$ref: it leads to another one more than {MOST_LEVELS} times, perhaps back to itself")


def _check_numbers(part: Schema, place: str) -> None:
    for key in (*_COUNTS, *_NUMBERS):
        value = part.get(key, 0)
        kinds = int if key in _COUNTS else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or (key in _COUNTS and value < 0):
            raise ValueError(f"{place}.{key}: not a number that it can be")
        if abs(value) > (largest := _MOST_COUNT if key in _COUNTS else _LARGEST):
            raise ValueError(f"{place}.{key}: supported is at most {largest:g}")
    if "multipleOf" in part:
        value = part["multipleOf"]
        digits = f"{value:.12f}".replace(".", "").strip("0") or "0"
        if not 0 < value <= _MOST_MULTIPLE or not 0 < int(digits) <= _MOST_MULTIPLE:
            raise ValueError(f"{place}.multipleOf: supported are short numbers above 0 and up to {_MOST_MULTIPLE}")


def _check_strict(part: Schema, place: str) -> None:
    """Raise ValueError for what OpenAI does not take with `strict: true`."""
    if "object" not in types_of(part):
        return
    if part.get("additionalProperties") is not False:
        raise ValueError(f"{place}: strict: 'additionalProperties' must be false")
    if missing := sorted(part.get("properties", {}).keys() - set(part.get("required", ()))):
        raise ValueError(f"{place}: strict: 'required' must name every property, and {missing[0]!r:.80} is missing")


def only_objects(root: Schema, schema: Any, passed: int = 0) -> bool:
    """Whether every answer that a candidate's schema allows is a JSON object. False where that is not plain."""
    if not isinstance(schema, dict) or passed > MOST_LEVELS:
        return False
    if types_of(schema) == ["object"]:
        return True
    if isinstance(schema.get("$ref"), str):
        try:
            return only_objects(root, resolved(root, schema["$ref"], ""), passed + 1)
        except UsageError:  # the name of an $anchor, say
            return False
    return all(only_objects(root, option, passed + 1) for option in schema.get("anyOf") or [None])


def same_schema(one: Schema, other: Schema) -> bool:
    """Whether two schemas say the same, word for word. The order of keys says nothing."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def both(own: Schema, requested: Schema) -> JsonObject:
    """A schema whose answers fit the candidate's own schema and the requested one, with keys in the requested order.

    Raises UsageError where the two cannot be held together.
    """
    if '"multipleOf"' in json.dumps(own) and '"multipleOf"' in json.dumps(requested):
        raise _apart("both limit a number by multipleOf")
    named = {_REQUESTED: requested, _OWN: own}
    return {
        "allOf": [{"$ref": f"#/$defs/{name}"} for name in named],
        "$defs": {name: moved(schema, f"#/$defs/{name}") for name, schema in named.items()},
    }


def moved(schema: Schema, path: str) -> JsonObject:
    """A schema as it must be written at this path of another one: its references lead there.

    Raises UsageError for references that are not plain paths.
    """
    written: JsonObject = {}
    for key, value in schema.items():
        if key in ("$schema", "$id"):
            continue
        if key in ("properties", *_DEFINITIONS) and isinstance(value, dict):
            written[key] = {name: _moved(each, path) for name, each in value.items()}
        elif key in ("$ref", "$dynamicRef", "$anchor"):
            if key != "$ref" or not _REFERENCE.fullmatch(str(value)):
                raise _apart(f"it refers to {value!r:.80}")
            written[key] = path + str(value)[1:]
        elif key in ("enum", "const", "default", "examples"):
            written[key] = value
        else:
            written[key] = _moved(value, path)
    return written


def _moved(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        if "$id" in value:
            raise _apart("a part of it has an $id")
        return moved(value, path)
    return [_moved(each, path) for each in value] if isinstance(value, list) else value


def _apart(why: str) -> UsageError:
    return UsageError(
        f"the version's own answer schema cannot be held together with the requested one: {why}",
        where="response_format",
        fix="leave response_format out: the version's own schema is held in any case",
    )


_MOST_CALLS: Final = 16  # in one answer
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(form: CallFormat, functions: Sequence[Fields], *, forced: bool, several: bool) -> str:
    """A Lark grammar of answers that call one of the functions, or several in a row.

    functions: {"name", "parameters", "strict"} of each. forced: the answer is a call; else it may also be text, before
    calls or alone, and arguments are held only where the function is strict. Raises UsageError where a schema of
    arguments or the form cannot be held.
    """
    if not form.exact or (not forced and not form.marker):
        raise UsageError(
            "the base's chat template writes calls by control tokens, or not apart from text, so answers cannot be "
            "held to them",
            where="tool_choice",
            fix="send tool_choice: auto, without strict and parallel_tool_calls: false",
        )
    call = json.dumps(restricted(_calls(form, functions, forced)), ensure_ascii=False)
    most = _MOST_CALLS - 1 if several and form.between is not None else 0
    more = f"({_literal(form.between)} call){{0,{most}}}" if most else ""
    if forced:
        start = f"start: {_literal(form.opening)} call {more} {_literal(form.closing)}\n"
        return f"{start}call: %json {call}\n"
    before, _, after = form.opening.partition(form.marker)
    return (
        f"%llguidance {{}}\nstart: TEXT | begun {_literal(after)} call {more} {_literal(form.closing)}\n"
        f"begun[lazy]: TEXT {_literal(before + form.marker)}\nTEXT: /(.|\\n)*/\ncall: %json {call}\n"
    )


def _calls(form: CallFormat, functions: Sequence[Fields], forced: bool) -> JsonObject:
    """JSON Schema of a call of one of the functions."""
    options: list[JsonObject] = []
    definitions: JsonObject = {}
    for number, function in enumerate(functions):
        definitions[f"p{number}"] = _parameters(function, f"#/$defs/p{number}", forced)
        properties = {form.name: {"const": function["name"]}, form.arguments: {"$ref": f"#/$defs/p{number}"}}
        options.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    return {"anyOf": options, "$defs": definitions}


def _parameters(function: Fields, path: str, forced: bool) -> Schema:
    if not forced and not function.get("strict"):
        return {"type": "object"}
    schema = function.get("parameters") or _NO_PARAMETERS
    try:
        check_schema(schema, strict=False)
    except ValueError as error:
        raise UsageError(f"the parameters of {function['name']} cannot be held: {error}", where="tools") from None
    return moved(schema, path)


def _literal(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""

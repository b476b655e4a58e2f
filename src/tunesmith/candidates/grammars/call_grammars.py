"""Grammars that hold an answer to calls of functions, in the form in which the base's template writes calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunesmith.candidates.grammars.request_schemas import check_schema, moved
from tunesmith.core.errors import UsageError
from tunesmith.engines.decoding.json_text import restricted
from tunesmith.models.call_format import CallFormat

_MOST_CALLS: Final = 16  # in one answer
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(form: CallFormat, functions: Sequence[Mapping[str, Any]], *, forced: bool, several: bool) -> str:
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


def _calls(form: CallFormat, functions: Sequence[Mapping[str, Any]], forced: bool) -> dict[str, Any]:
    """JSON Schema of a call of one of the functions."""
    options: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, function in enumerate(functions):
        definitions[f"p{number}"] = _parameters(function, f"#/$defs/p{number}", forced)
        properties = {form.name: {"const": function["name"]}, form.arguments: {"$ref": f"#/$defs/p{number}"}}
        options.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    return {"anyOf": options, "$defs": definitions}


def _parameters(function: Mapping[str, Any], path: str, forced: bool) -> Mapping[str, Any]:
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

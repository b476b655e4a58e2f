"""Prompts for a new project: they describe the answers of its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from tunesmith.candidates.grammars.copying import text_fields
from tunesmith.candidates.grammars.inferred_schema import AnswerFindings
from tunesmith.candidates.grammars.schema_rules import types_of
from tunesmith.core.values import Schema

_WITH_KEYS = ("array", "object")  # named last: the lines of their keys follow


def long_prompt(answers: AnswerFindings) -> str:
    """The prompt of the untuned candidates."""
    schema, said = answers.schema, answers.said
    if schema is None and answers.labels:
        labels = [label if label.isprintable() else _quoted(label) for label in answers.labels]
        return "\n".join(
            ["Answer the request with one of these lines as it is written, and nothing else:", *labels, ""]
        )
    if schema is None:
        return "Answer the request as the examples do: in the same style, at the same length, and nothing else.\n"
    all_said = set(text_fields(schema)) <= said.keys() and set(said.values()) <= {None}  # said once, not of each field
    lines = [
        "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence.",
        *_keys(schema, "", {} if all_said else said),
        *(["Copy each string from the request as it is written."] if said and all_said else []),
        *(["Leave out what the request does not say."] if _leaves_out(schema) else []),
    ]
    return "".join(f"{line}\n" for line in lines)


def short_prompt(answers: AnswerFindings) -> str:
    """The prompt of the tuned candidate, which has learned the rest from the rows."""
    objects_only = answers.schema is not None and not answers.others
    return "Answer with one JSON object.\n" if objects_only else "Answer as in the examples.\n"


def _keys(schema: Schema, path: str, said: Mapping[str, str | None], indent: str = "") -> Iterator[str]:
    """A line for each key of an object, followed by the lines of the objects in it."""
    for key, value in schema.get("properties", {}).items():
        place = f"{path}.{key}" if path else key
        yield f"{indent}{_quoted(key)}: {_kind(value, place, said)}"
        yield from _keys(value, place, said, f"{indent}  ")
        while "items" in value:
            place, value = f"{place}[]", value["items"]
            yield from _keys(value, place, said, f"{indent}  ")


def _kind(schema: Schema, path: str, said: Mapping[str, str | None]) -> str:
    """What values a schema allows, in words."""
    kinds = types_of(schema)
    names = sorted((kind for kind in kinds if kind != "null"), key=_WITH_KEYS.__contains__)
    words = {}
    if path in said:
        instead = said[path]
        words["string"] = "string, copied from the request" + ("" if instead is None else f", or {_quoted(instead)}")
    if "properties" in schema:
        words["object"] = "an object with" if schema.get("required") else "an object with any of"
    if "items" in schema:
        words["array"] = f"array of {_kind(schema['items'], f'{path}[]', said)}"
    if "enum" in schema:
        words["string"] = f"one of {', '.join(map(_quoted, schema['enum']))}"
    described = " or ".join(words.get(name, name) for name in names)
    return described if "null" not in kinds else f"null where the request says nothing, or {described}"


def _leaves_out(schema: Schema) -> bool:
    """Whether the answers of the rows leave out a key."""
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return len(schema.get("required", ())) < len(schema.get("properties", ())) or any(map(_leaves_out, inner))


def _quoted(text: str) -> str:
    """A text as a JSON string on one line, with escapes for what cannot be seen."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in written)

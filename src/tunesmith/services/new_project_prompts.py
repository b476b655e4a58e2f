"""The prompts that a new project begins with. Tuning is compared with them, so they must say what the rows show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def long_prompt(schema: Mapping[str, Any] | None) -> str:
    if schema is None:
        return "Answer the request as the examples do: in the same style, at the same length, and nothing else.\n"
    return (
        "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence.\n"
        f"{_described(schema)}\n"
        "Copy values from the request as they are written. Leave out what the request does not say.\n"
    )


def _described(schema: Mapping[str, Any], path: str = "") -> str:
    lines = []
    for key, value in schema.get("properties", {}).items():
        place = f"{path}.{_quoted(key)}" if path else _quoted(key)
        if "properties" in value:
            inside = [f"{_quoted(name)} ({_type(each)})" for name, each in value["properties"].items()]
            lines.append(f"{place}: an object with any of {', '.join(inside)}")
        elif "enum" in value:
            lines.append(f"{place}: one of {', '.join(map(_quoted, value['enum']))}")
        else:
            lines.append(f"{place}: {_type(value)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A text as a JSON string on one line, with escapes for what cannot be seen."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in written)


def _type(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", "any value")
    said = kinds if isinstance(kinds, str) else " or ".join(kinds)
    return f"array of {_type(schema['items'])}" if said == "array" and "items" in schema else said


def short_prompt(is_json: bool) -> str:
    return "Answer with one JSON object.\n" if is_json else "Answer as in the examples.\n"

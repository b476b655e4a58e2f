"""Puts the keys of JSON answers in the order in which the request mentions their values.

The order of keys says nothing in JSON, but a model writes one key after the other. Where the order is that of the
request, it reads the request once from left to right. Where it is any other, it must look for each value in the whole
request and keep in mind what it has written: far more to learn from the same rows.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tunesmith.core.messages import Conversation, Turns
from tunesmith.core.reading.strict_json import json_in, values_in

# How rows write JSON: json.dumps' own ways, each with and without escapes, and indented.
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"ensure_ascii": escaped, **style}
    for style in ({}, {"separators": (",", ":")}, {"indent": 1}, {"indent": 2}, {"indent": 4})
    for escaped in (False, True)
)


def in_request_order(messages: Conversation) -> Turns:
    """The conversation with the keys of each JSON answer in the order in which the user turns before it mention them.

    Keys whose values stand in no user turn keep their places. An answer stays as it is where it is not an object, or
    written in a way that json.dumps does not write.
    """
    asked: list[str] = []
    ordered = []
    for message in messages:
        if message.role == "user":
            asked.append(message.content)
        if message.role == "assistant" and message.content.lstrip().startswith("{"):
            message = message.model_copy(update={"content": _ordered("\n".join(asked), message.content)})
        ordered.append(message)
    return tuple(ordered)


def _ordered(request: str, answer: str) -> str:
    value = json_in(answer)
    changed = _sorted(request.casefold(), value)
    if json.dumps(changed) == json.dumps(value):
        return answer
    style = next((each for each in _STYLES if json.dumps(value, **each) == answer.strip()), None)
    return answer if style is None else json.dumps(changed, **style)


def _sorted(request: str, value: Any) -> Any:
    """A value whose objects, at every level, have their keys in the request's order. request: in lower case."""
    if isinstance(value, list):
        return [_sorted(request, each) for each in value]
    if not isinstance(value, dict):
        return value
    places = {key: place for key, each in value.items() if (place := _place(request, each)) is not None}
    mentioned = iter(sorted(places, key=lambda key: places[key]))
    keys = [next(mentioned) if key in places else key for key in value]
    return {key: _sorted(request, value[key]) for key in keys}


def _place(request: str, value: Any) -> int | None:
    """Where the request first mentions a value or one inside it, as whole words; None where it does not."""
    inner = (each for _, each in values_in(value) if isinstance(each, str | int | float) and not isinstance(each, bool))
    texts = (each if isinstance(each, str) else json.dumps(each) for each in inner if each != "")
    matches = (re.search(rf"(?<!\w){re.escape(text.casefold())}(?!\w)", request) for text in texts)
    return min((match.start() for match in matches if match), default=None)

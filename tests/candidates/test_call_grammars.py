"""Answers that are held to calls: which are allowed, and which tools cannot be held."""

from __future__ import annotations

from typing import Any

import pytest

from tests.candidates.test_copying import fits
from tunesmith.candidates.grammars.call_grammars import call_grammar
from tunesmith.core.errors import UsageError
from tunesmith.models.call_format import CallFormat

TAGGED = CallFormat("<call>\n", "\n</call>\n<call>\n", "\n</call>", "name", "arguments", exact=True)
BARE = CallFormat("", None, "", "name", "parameters", exact=True)
LISTED = CallFormat("[", ", ", "]", "name", "arguments", exact=True)
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"c": {"enum": ["Oslo", "Rome"]}}}
WEATHER: dict[str, Any] = {"name": "weather", "parameters": CITY, "strict": True}
TIME: dict[str, Any] = {"name": "time", "parameters": None, "strict": None}
OSLO, NOW = '{"name": "weather", "arguments": {"city": "Oslo"}}', '{"name": "time", "arguments": {}}'
FREE = '{"name": "time", "arguments": {"any": [1]}}'


def one(call: str) -> str:
    return f"<call>\n{call}\n</call>"


@pytest.mark.parametrize(
    ("answer", "forced", "several", "allowed"),
    [
        (one(OSLO), True, False, True),
        (f"{one(OSLO)}\n{one(NOW)}", True, True, True),
        (f"{one(OSLO)}\n{one(NOW)}", True, False, False),
        (one(OSLO.replace("Oslo", "Bonn")), True, True, False),
        (one(FREE), True, True, False),
        (one(NOW.replace("time", "delete")), True, True, False),
        ("Hello", True, True, False),
        ("", True, True, False),
        ("", False, True, True),
        ("a < b, <cal> and </call>", False, True, True),
        (f"I look.\n{one(OSLO)}\n{one(NOW)}", False, True, True),
        (f"I look.\n{one(OSLO)}\n{one(NOW)}", False, False, False),
        (f"I look.\n{one(OSLO.replace('Oslo', 'Bonn'))}", False, True, False),
        (one(FREE), False, True, True),  # its function is not strict
        (one(FREE.replace("time", "delete")), False, True, False),
        (f"{one(OSLO)} and more", False, True, False),
    ],
)
def test_answers_are_held_to_calls(answer: str, forced: bool, several: bool, allowed: bool) -> None:
    assert fits(call_grammar(TAGGED, [WEATHER, TIME], forced=forced, several=several), answer) == allowed


@pytest.mark.parametrize(
    ("form", "answer", "allowed"),
    [
        (BARE, '{"name": "weather", "parameters": {"city": "Rome"}}', True),
        (BARE, '{"name": "weather", "parameters": {"city": "Bonn"}}', False),
        (LISTED, f"[{OSLO}, {NOW}]", True),
        (LISTED, "[]", False),
    ],
)
def test_other_formats_are_held_too(form: CallFormat, answer: str, allowed: bool) -> None:
    assert fits(call_grammar(form, [WEATHER, TIME], forced=True, several=True), answer) is allowed


@pytest.mark.parametrize(
    ("form", "tool", "forced", "where"),
    [
        (BARE, WEATHER, False, "tool_choice"),
        (CallFormat("", "", "", "name", "arguments", exact=False), WEATHER, True, "tool_choice"),
        (TAGGED, {"name": "f", "parameters": {"oneOf": []}}, True, "tools"),
        (TAGGED, {"name": "f", "parameters": {"type": "object", "properties": 3}}, True, "tools"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(form: CallFormat, tool: Any, forced: bool, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        call_grammar(form, [tool], forced=forced, several=True)
    assert caught.value.where == where

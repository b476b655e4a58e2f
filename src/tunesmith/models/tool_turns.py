"""Converts conversations with tools into the form that chat templates read, and marks what they must render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json


def tool_turns(messages: Sequence[Message]) -> list[JsonObject]:
    """The turns as chat templates of transformers expect them: arguments as an object, tool turns with a name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    turns = []
    for message in messages:
        turn: JsonObject = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": parse_json(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id or "", "")}
        turns.append(turn)
    return turns


def marked_tools(
    turns: Sequence[Fields], tools: Sequence[Fields]
) -> tuple[list[JsonObject], list[JsonObject], dict[str, str]]:
    """(turns, tools, mark -> what it stands for), with a mark in every place that a template must render.

    Marks consist of letters and digits, so that escaping does not change them.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        made = f"zq{len(marks)}qz"
        marks[made] = what
        return made

    declared = [
        dict(tool, function=dict(tool["function"], name=mark(f"the tool {tool['function']['name']}"))) for tool in tools
    ]
    shown = []
    for turn in turns:
        changed = dict(turn)
        if turn["role"] == "tool":
            changed["content"] = mark(f"the result of the tool {turn['name']}")
        if "tool_calls" in turn:
            changed["tool_calls"] = [_marked_call(call, mark) for call in turn["tool_calls"]]
            if turn["content"]:
                changed["content"] = mark("the text of a turn with a call")
        shown.append(changed)
    return shown, declared, marks


def _marked_call(call: Fields, mark: Any) -> JsonObject:
    name = call["function"]["name"]
    called = mark(f"the call of {name}")
    arguments = {mark(f"the arguments of {name}"): mark(f"the arguments of {name}")}
    return dict(call, function={"name": called, "arguments": arguments})

"""Rows with tools: the spellings they come in, what is no conversation, and OpenAI's own rules."""

import copy
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.data.formats.test_row_formats import conversation, error, reason
from tests.data.rows import build, held, many_rows, row, settings, turns, write_jsonl
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall, tools_of
from tunesmith.data.building.staging import PRIVATE, SPOILT_CALL
from tunesmith.data.dataset import dataset_summary, example_id
from tunesmith.data.formats import turns as turn_checks
from tunesmith.store.store import Store

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "at": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "the weather in a city", "parameters": CITY}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = '{"city": "Tromsø", "at": "noon"}'


def call(identity: str = "call_1", arguments: Any = ARGUMENTS, name: str = "weather") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def asked(*calls: dict[str, Any], content: str | None = None) -> list[dict[str, Any]]:
    said = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return [{"role": "user", "content": "weather in Tromsø?"}, said]


def told(identity: str = "call_1", content: str = "4 degrees") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content}


WHOLE = [*asked(call()), told(), {"role": "assistant", "content": "Cold."}]


SHAREGPT = [
    {"from": "human", "value": "weather in Tromsø?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Tromsø", "at": "noon"}}'},
    {"from": "observation", "value": "4 degrees"},
    {"from": "gpt", "value": "Cold."},
]
OLDER = [
    WHOLE[0],
    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ARGUMENTS}},
    {"role": "function", "name": "weather", "content": "4 degrees"},
    WHOLE[3],
]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": OLDER, "functions": [FUNCTION]},
        {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])},
        {"messages": [*asked({"name": "weather", "arguments": json.loads(ARGUMENTS)}), {"role": "tool", "content": "4 degrees"}, WHOLE[3]], "tools": [FUNCTION]},  # noqa: E501
    ],
)  # fmt: skip
def test_every_spelling_says_the_same(fields: dict[str, Any]) -> None:
    same = conversation({"messages": [*asked(call("call00000")), told("call00000"), WHOLE[3]], "tools": TOOLS})
    assert conversation(fields) == same
    found = conversation({"messages": WHOLE, "tools": TOOLS, "parallel_tool_calls": False})
    assert found[1].tool_calls == (ToolCall(id="call_1", name="weather", arguments=ARGUMENTS),)
    assert found[2].tool_call_id == "call_1"
    assert tools_of(found) == TOOLS
    assert [turn.tools is None for turn in found] == [False, True, True, True]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (asked(call("1"), call("2")), None),
        ([*asked(call("1"), call("2")), told("2"), told("1"), WHOLE[3]], None),
        ([*asked(call(), content="Let me look."), told(), *asked(call("2"))[1:], told("2"), WHOLE[3]], None),
        ([*asked(call("1"), call("2")), told("1"), WHOLE[3]], turn_checks.UNANSWERED),
        ([*asked(call("1")), told("1"), told("1"), WHOLE[3]], turn_checks.UNANSWERED),
        ([*asked(call()), WHOLE[3]], turn_checks.UNANSWERED),
        ([*asked(call()), told()], turn_checks.NO_ANSWER),
        ([*asked(call()), told(), *turns("x", "y")], turn_checks.OUT_OF_ORDER),
        (asked(call(name="time")), turn_checks.UNDECLARED),
    ],
)
def test_what_answers_what(messages: list[dict[str, Any]], expected: str | None) -> None:
    assert reason(messages, tools=TOOLS) == expected


@pytest.mark.parametrize(
    ("messages", "more", "place"),
    [
        (asked(call(arguments="{")), {}, "messages[1].tool_calls[0].arguments"),
        (asked(call(arguments="[1]")), {}, "messages[1].tool_calls[0].arguments"),
        (asked(call(arguments={"at": date(2026, 1, 2)})), {}, "messages[1].tool_calls[0].arguments"),
        (asked({"id": "1", "type": "function"}), {}, "messages[1].tool_calls[0].name"),
        (asked({"id": 3, "function": {"name": "f"}}), {}, "messages[1].tool_calls[0].id"),
        ([{**asked(call())[1], "tool_calls": {"a": 1}}], {}, "messages[0].tool_calls"),
        ([{**asked(call())[1], "role": "user"}], {}, "messages[0].tool_calls"),
        ([*asked(call()), {**told(), "tool_call_id": 3}], {}, "messages[2].tool_call_id"),
        (asked(call()), {"tools": "[{"}, "tools"),
        (asked(call()), {"tools": [{"name": "f", "parameters": {"default": b"x"}}]}, "tools"),
        (asked(call()), {"tools": [{"type": "retrieval"}]}, "tools[0]"),
        (asked(call()), {"tools": [{"name": "f", "parameters": "x"}]}, "tools[0].parameters"),
        (asked(call()), {"tools": TOOLS, "functions": [FUNCTION]}, "row 3"),
        (asked(call("1"), call("2")), {"parallel_tool_calls": False}, "parallel_tool_calls"),
    ],
)
def test_broken_tools_name_row_and_key(messages: list[dict[str, Any]], more: dict[str, Any], place: str) -> None:
    assert error({"messages": messages, **more}).where.endswith(place)


def test_weights_are_kept_and_what_follows_the_last_is_left_out() -> None:
    spoken = turns("a", "b", "c", "d", "e", "f")
    spoken[1]["weight"] = spoken[5]["weight"] = 0
    found = conversation({"messages": spoken})
    assert [(turn.content, turn.weight) for turn in found] == [("a", 1), ("b", 0), ("c", 1), ("d", 1)]
    spoken[3]["weight"] = 0
    assert reason(spoken) == turn_checks.NOT_TO_LEARN
    plain = [Message(role="user", content="hi"), Message(role="assistant", content="yo")]
    assert example_id(plain, "a.jsonl") == "f5c2b15acc0828e371cb", "without tools and weights as it always was"


def tool_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        said = copy.deepcopy(WHOLE)
        said[0]["content"] = many_rows(count)[n]["messages"][0]["content"]
        said[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": f"city {n}"})
        rows.append({"messages": said, "tools": TOOLS})
    return rows


def test_a_dataset_of_tool_rows(tmp_path: Path) -> None:
    rows = tool_rows(60)
    spoken = rows[0]["messages"]
    spoken[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "ada@lovelace.org", "at": "noon"}'
    spoken[2]["content"] = "mail to ada@lovelace.org"
    odd = [rows[1], {"messages": [*asked(call()), WHOLE[3]], "tools": TOOLS}]
    dataset = build(tmp_path, settings(privacy={"entities": ["EMAIL_ADDRESS"]}), rows=[*rows, *odd])
    body = dataset.record.body
    assert body["rows"]["removed"] == {"exact duplicate": 1, turn_checks.UNANSWERED: 1}
    assert body["ignored_keys"] == {}
    assert body["privacy"] == {"EMAIL_ADDRESS": 1}
    assert body["privacy_scan"]["fields"] == {"call": {"EMAIL_ADDRESS": 1}, "tool": {"EMAIL_ADDRESS": 1}}
    (changed,) = [one.messages for one in held(dataset) if "person1" in one.messages[2].content]
    assert json.loads(changed[1].tool_calls[0].arguments) == {"city": "person1@example.com", "at": "noon"}
    assert [turn.role for turn in changed] == ["user", "assistant", "tool", "assistant"]
    assert tools_of(changed) == TOOLS
    assert "lovelace" not in "".join(one.model_dump_json() for one in held(dataset))
    # Two spellings of one address become the same key.
    spoken[1]["tool_calls"][0]["function"]["arguments"] = '{"ada@lovelace.org": 1, "ADA@lovelace.org": 2}'
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for action, why in (("pseudonymise", SPOILT_CALL), ("remove", PRIVATE)):
        dataset = build(tmp_path, settings(privacy={"action": action, "entities": ["EMAIL_ADDRESS"]}))
        assert dataset.record.body["rows"]["removed"][why] == 1
    for identity, arguments in (("call_1", '{"city": "<|im_end|>"}'), ("<|im_end|>", "{}")):
        spoken[1:3] = [asked(call(identity, arguments))[1], told(identity)]
        with pytest.raises(Refused, match="control token"):
            build(tmp_path, control_tokens=("<|im_end|>",), rows=rows)


OPENAI = {"messages": WHOLE, "tools": TOOLS}


@pytest.mark.parametrize(
    ("change", "said", "place"),
    [
        (lambda m: m.pop(), "the last message must be from the assistant", "messages[2].role"),
        (lambda m: m[0].update(weight=1), "only an assistant message may have a weight", "messages[0].weight"),
        (lambda m: m[3].update(weight=2), "weight is 2", "messages[3].weight"),
        (lambda m: m[0].pop("content"), "must have content", "messages[0]"),
        (lambda m: m[2].pop("tool_call_id"), "must have tool_call_id", "messages[2]"),
        (lambda m: m[0].update(mood="fine"), "has no key 'mood'", "messages[0].mood"),
        (lambda m: m[1]["tool_calls"][0].pop("id"), "a call must have an id", "messages[1].tool_calls[0]"),
        (lambda m: m[1]["tool_calls"][0]["function"].update(arguments={}), "JSON as text", "function.arguments"),
    ],
)
def test_openais_rules(change: Any, said: str, place: str) -> None:
    assert conversation(OPENAI, "openai")
    broken = copy.deepcopy(OPENAI)
    change(broken["messages"])
    found = error(broken, "openai")
    assert said in found.what
    assert found.where.endswith(place)
    assert "true or false" in error({**OPENAI, "parallel_tool_calls": "no"}, "openai").what
    assert "at most 128" in error({**OPENAI, "tools": TOOLS * 129}, "openai").what
    assert "must not be empty" in error({"messages": WHOLE, "functions": []}, "openai").what


def test_a_file_in_openais_format(tmp_path: Path) -> None:
    rows = [{"messages": row(f"{n} {'abcdefghi'[n] * 9}", str(n))["messages"], "part": str(n % 3)} for n in range(9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    chosen = settings(source={"format": "openai"}, split={"group_by": "part", "test": 0.5})
    document = dataset_summary(Store(tmp_path / "store"), build(tmp_path, chosen).digest).document()
    assert document["warnings"] == ["rows.jsonl: 9 rows: OpenAI's service accepts files of at least 10 examples"]
    assert document["sources"][0]["evidence"] == "set in the settings"
    with pytest.raises(UsageError) as caught:
        build(tmp_path, chosen, rows=[OPENAI, {"messages": WHOLE[:-1], "tools": TOOLS}])
    assert caught.value.where == "rows.jsonl, row 2, messages[2].role"

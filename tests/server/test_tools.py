"""Functions over HTTP: offered, called, answered and streamed as OpenAI's clients expect, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fabricate import NAME, Scene
from tests.models.test_rendering_tools import SHORT_CALLS
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_engine import TinyEngine
from tests.tiny import TEMPLATE
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import ToolCall, tools_of
from tunesmith.registry.versions import Version

Versions = dict[int, Version]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '<call>{"name": "weather", "arguments": {"city": "Ålesund"}}</call>'


def strict(tool: Any) -> Any:
    return {**tool, "function": {**tool["function"], "strict": True}}


def test_a_call_is_answered_as_openais(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: f"I look. {CALL}"
    choice = served.ask(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function", "weather", {"city": "Ålesund"},
    )  # fmt: skip
    # The model sees the tools as they were sent, keys in their order; nothing is held.
    asked = served.engine.seen[-1]
    assert json.dumps(tools_of(asked.messages)) == json.dumps(TOOLS)
    assert (asked.schema, asked.grammar) == (None, None)
    # Such an answer is no evidence about a version that was measured without tools.
    (row,) = served.rows()
    assert (row.ok, row.cut, row.scores, row.features["tools"]) == (True, True, {}, 2.0)


def test_a_conversation_goes_on_with_the_functions_result(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: CALL
    message = served.ask(tools=TOOLS).choices[0].message
    assert message.content is None
    call = message.tool_calls[0]
    served.engine.answer = lambda _request, _adapter: "Cold."
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "4 degrees"}]}
    for said in (message, {"role": "assistant", "tool_calls": [call.model_dump()]}):
        answer = served.ask(messages=[*HELLO, said, result], tools=TOOLS).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("Cold.", None, "stop")
        turns = served.engine.seen[-1].messages
        assert turns[-2].tool_calls == (ToolCall(id=call.id, name="weather", arguments='{"city": "Ålesund"}'),)
        assert (turns[-1].role, turns[-1].content, turns[-1].tool_call_id) == ("tool", "4 degrees", call.id)


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        (f"I look. {CALL}", "I look.", 1),
        (CALL + CALL, "", 2),
        ("It is a < b and <calm> today.", "It is a < b and <calm> today.", 0),
        ("Say <call> and no more", "Say <call> and no more", 0),
        ('<call>{"name": "delete_all", "arguments": {}}</call>',) * 2 + (0,),
    ],
)
def test_a_stream_sends_text_and_whole_calls(served: Served, answer: str, content: str, calls: int) -> None:
    served.engine.answer = lambda _request, _adapter: answer
    chunks = [chunk.choices[0] for chunk in served.ask(tools=TOOLS, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == content
    made = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in made] == [(n, "weather") for n in range(calls)]
    assert all(json.loads(call.function.arguments) == {"city": "Ålesund"} for call in made)
    assert chunks[-1].finish_reason == ("tool_calls" if calls else "stop")
    whole = served.ask(tools=TOOLS).choices[0].message
    assert ((whole.content or ""), len(whole.tool_calls or ())) == (content, calls)


def test_none_shows_no_tools_and_reads_no_calls(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: CALL
    answer = served.ask(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"}).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (CALL, None, "stop")
    assert tools_of(served.engine.seen[-1].messages) == []


@pytest.mark.parametrize(
    ("more", "said", "forbidden"),
    [
        ({"tool_choice": "required"}, ["weather", "time", "{0,15}"], ["begun"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["weather", "time"], ["begun", "{0,15}"]),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, ["time"], ["weather", "{0,15}"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["begun", "weather"], ["{0,15}"]),
        ({"tools": [strict(WEATHER), TIME]}, ["begun", "city"], []),
    ],
)
def test_what_must_hold_is_held_by_a_grammar(served: Served, more: Any, said: list[str], forbidden: list[str]) -> None:
    served.post(**{"tools": TOOLS, **more})
    asked = served.engine.seen[-1]
    assert asked.constrained_by == "tools"
    assert asked.grammar is not None
    assert all(each in asked.grammar for each in said)
    assert not any(each in asked.grammar for each in forbidden)


ANSWERS = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}]}  # fmt: skip


def changed(arguments: str) -> Any:
    call = {**ANSWERS["tool_calls"][0], "function": {"name": "time", "arguments": arguments}}  # type: ignore[index]
    return {"messages": [*HELLO, {**ANSWERS, "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, None, "invalid_value"),
        ({"tool_choice": "none"}, None, "invalid_value"),
        ({"tools": [WEATHER] * 2}, "tools", "invalid_value"),
        ({"tools": [WEATHER] * 129}, "tools", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom", "unknown_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [strict(TIME)]}, "tools[0].function", "invalid_json_schema"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, None, "invalid_value"),
        ({"tools": TOOLS, "logprobs": True}, None, "invalid_value"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1]", "invalid_value"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "b"}]}, "messages", "invalid_value"),
        ({"messages": [{**HELLO[0], "tool_call_id": "a"}]}, "messages[0]", "invalid_value"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": []}]}, None, None),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x", "refusal": "no"}]}, "messages[1].refusal", None),
        (changed("[1]"), "messages[1].tool_calls[0].function.arguments", "invalid_value"),
        (changed("{"), "messages[1].tool_calls[0].function.arguments", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_not_valid_is_refused_by_name(shared: Served, body: Any, param: str | None, code: str | None) -> None:
    asked = len(shared.engine.seen)
    response = shared.post(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert len(shared.engine.seen) == asked


@pytest.mark.parametrize("rule", [{"answer_schema": "{}"}, {"answer_grammar": 'start: "a"'}, {"method": "nearest"}])
def test_a_version_with_a_rule_of_its_own_calls_nothing(scene: Scene, engine: Any, rule: dict[str, Any]) -> None:
    """A call would not fit the rule, and nobody loosens it."""
    facts: dict[str, Any] = {"name": "c", "base": scene.base, "max_tokens": 9}
    Answerer(scene.store, engine, Candidate(**facts)).require_calls()
    with pytest.raises(UsageError, match="so it cannot call functions") as caught:
        Answerer(scene.store, engine, Candidate(**facts, **rule)).require_calls()
    assert caught.value.where == "tools"


def real(scene: Scene, folder: Path, template: str) -> Any:
    """A server that answers by a tiny random model with this template."""
    engine: Any = TinyEngine(scene.base, folder / "tiny", template)
    engine.gate = FakeEngine(scene.base).gate
    return running(scene, engine)


def test_a_template_without_tools_is_the_requests_fault(scene: Scene, versions: Versions, tmp_path: Path) -> None:
    with real(scene, tmp_path, TEMPLATE) as server:
        server.begin(versions[1])
        for body, param in (({"tools": TOOLS}, "tools"), ({"messages": [*HELLO, ANSWERS, {
            "role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages")):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match="does not render") as caught:
                server.ask(**body)
            assert caught.value.param == param
        assert server.rows() == []


def test_a_real_engine_calls(scene: Scene, versions: Versions, tmp_path: Path) -> None:
    """A random model calls a function only because the grammar holds it to that."""
    numbers = {
        "type": "object",
        "properties": {"c": {"enum": [1, 2]}},
        "required": ["c"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": numbers}}
    asked: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 32}
    asked |= {"messages": [{"role": "user", "content": "x"}], "model": NAME}
    with real(scene, tmp_path, SHORT_CALLS) as server:  # versions of the scene answer with at most 32 tokens
        server.begin(versions[1])
        choice = server.ask(**asked).choices[0]
        assert choice.finish_reason == "tool_calls", choice
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)["c"] in (1, 2)) == ("f", True)
        bad = {"name": "f", "parameters": {"type": "object", "oneOf": []}}
        with pytest.raises(openai.BadRequestError, match="cannot be held") as caught:
            server.ask(**{**asked, "tools": [{"type": "function", "function": bad}]})
        assert caught.value.param == "tools"

"""Functions over HTTP: offered, called, answered and streamed as OpenAI's clients expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fabricate import Scene
from tests.models.test_rendering_tools import SHORT_CALLS
from tests.server.conftest import HELLO, Served, running
from tests.server.test_refused_requests import TIME, TOOLS, WEATHER, calling, closed, said, strict
from tests.server.tiny_engine import TinyEngine
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import ToolCall, tools_of
from tunesmith.registry.versions import Version

CALL = '<call>{"name": "weather", "arguments": {"city": "Ålesund"}}</call>'


def test_a_conversation_goes_on_with_the_functions_result(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: CALL
    choice = served.ask(tools=TOOLS).choices[0]
    message, (call,) = choice.message, choice.message.tool_calls
    assert (message.content, choice.finish_reason) == (None, "tool_calls")
    called = (call.type, call.function.name, json.loads(call.function.arguments))
    assert called == ("function", "weather", {"city": "Ålesund"})
    # The model sees the tools as they were sent, keys in their order; nothing is held.
    asked = served.engine.seen[-1]
    assert json.dumps(tools_of(asked.messages)) == json.dumps(TOOLS)
    assert (asked.schema, asked.grammar) == (None, None)
    # Such an answer is no evidence about a version that was measured without tools.
    (row,) = served.rows()
    assert (row.ok, row.cut, row.scores, row.features["tools"]) == (True, True, {}, 2.0)
    served.engine.answer = lambda _request, _adapter: "Cold."
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "4 degrees"}]}
    for turn in (message, {"role": "assistant", "tool_calls": [call.model_dump()]}):
        answer = served.ask(messages=[*HELLO, turn, result], tools=TOOLS).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("Cold.", None, "stop")
        turns = served.engine.seen[-1].messages
        assert turns[-2].tool_calls == (ToolCall(id=call.id, name="weather", arguments='{"city": "Ålesund"}'),)
        assert (turns[-1].role, turns[-1].content, turns[-1].tool_call_id) == ("tool", "4 degrees", call.id)


def test_none_shows_no_tools_and_reads_no_calls(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: CALL
    answer = served.ask(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"}).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (CALL, None, "stop")
    assert tools_of(served.engine.seen[-1].messages) == []


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


@pytest.mark.parametrize(
    ("more", "words", "forbidden"),
    [
        ({"tool_choice": "required"}, ["weather", "time", "{0,15}"], ["begun"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["weather", "time"], ["begun", "{0,15}"]),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, ["time"], ["weather", "{0,15}"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["begun", "weather"], ["{0,15}"]),
        ({"tools": [strict(WEATHER), TIME]}, ["begun", "city"], []),
    ],
)
def test_what_must_hold_is_held_by_a_grammar(served: Served, more: Any, words: list[str], forbidden: list[str]) -> None:
    served.post(**{"tools": TOOLS, **more})
    asked = served.engine.seen[-1]
    assert asked.constrained_by == "tools"
    assert asked.grammar is not None
    assert all(each in asked.grammar for each in words)
    assert not any(each in asked.grammar for each in forbidden)


@pytest.mark.parametrize("rule", [{"answer_schema": "{}"}, {"answer_grammar": 'start: "a"'}, {"method": "nearest"}])
def test_a_version_with_a_rule_of_its_own_calls_nothing(scene: Scene, engine: Any, rule: dict[str, Any]) -> None:
    """A call would not fit the rule, and nobody loosens it."""
    facts: dict[str, Any] = {"name": "c", "base": scene.base, "max_tokens": 9}
    Answerer(scene.store, engine, Candidate(**facts)).require_calls()
    with pytest.raises(UsageError, match="so it cannot call functions") as caught:
        Answerer(scene.store, engine, Candidate(**facts, **rule)).require_calls()
    assert caught.value.where == "tools"


def refused(served: Served, message: str, **asked: Any) -> str | None:
    """The field that a refusal names."""
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        served.ask(**asked)
    return caught.value.param


def test_a_template_without_tools_is_the_requests_fault(tiny: Served) -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "x"}
    assert refused(tiny, "does not render", tools=TOOLS) == "tools"
    assert refused(tiny, "does not render", **said(calling(), result)) == "messages"
    assert tiny.rows() == []


def test_a_real_engine_calls(scene: Scene, versions: dict[int, Version], tmp_path: Path) -> None:
    """A random model calls a function only because the grammar holds it to that."""
    tool = {"type": "function", "function": {"name": "f", "parameters": closed({"c": {"enum": [1, 2]}})}}
    asked: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    asked |= {"messages": [{"role": "user", "content": "x"}]}
    # Versions of the scene answer with at most 32 tokens.
    with running(scene, TinyEngine(scene.base, tmp_path / "tiny", SHORT_CALLS)) as server:
        server.begin(versions[1])
        choice = server.ask(**asked).choices[0]
        assert choice.finish_reason == "tool_calls", choice
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)["c"] in (1, 2)) == ("f", True)
        bad = {"name": "f", "parameters": {"type": "object", "oneOf": []}}
        asked["tools"] = [{"type": "function", "function": bad}]
        assert refused(server, "cannot be held", **asked) == "tools"

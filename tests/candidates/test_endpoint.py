"""An outside model: what is sent, what is read, when it is asked again, and that the key goes nowhere else."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.chat_server import ChatServer, chat_server, completion
from tunesmith.candidates.endpoint import Endpoint
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.messages import Message, ToolCall, with_tools
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.evaluation.metrics.scorers import exact_match

KEY = "sk-test-0123456789"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def _endpoint(server: ChatServer, **more: Any) -> Endpoint:
    return Endpoint(EndpointSettings(url=server.url, model="big", **{"retries": 2, "timeout": 60.0, **more}))


def _asked(text: str = "hi", **more: Any) -> Generation:
    return Generation(messages=(Message(role="system", content="s"), Message(role="user", content=text)), **more)


def _said(server: ChatServer, document: Any, **more: Any) -> Completion:
    """What is read of this answer."""
    server.reply = lambda _: (200, {}, document)
    (given,) = _endpoint(server, **more).generate([_asked()])
    return given


def test_what_is_sent_and_read(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    given = _endpoint(server, key_env="A_KEY").generate([_asked(max_tokens=9, schema='{"type":"object"}')])
    assert given == [Completion("hello", "stop", 11, 3, served_by="m-2026")]
    (body,), (headers,) = server.asked, server.headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body["model"] == "big"
    assert body["max_tokens"] == 9
    assert body["temperature"] == 0.0
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "object"}}
    assert KEY not in str(body)
    schema = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    _endpoint(server).generate([_asked(schema=json.dumps(schema))])
    sent = server.asked[1]["response_format"]["json_schema"]
    assert sent == {"name": "answer", "schema": schema, "strict": True}, "where OpenAI takes it"


def test_answers_come_in_the_order_of_requests(server: ChatServer) -> None:
    others = threading.Event()

    def slow_first(body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        if text == "0":
            assert others.wait(60)
        elif text == "3":
            others.set()
        return 200, {}, completion(text, finish="length" if text == "1" else "stop")

    server.reply = slow_first
    given = _endpoint(server, parallel=4).generate([_asked(str(number)) for number in range(8)])
    assert [each.text for each in given] == [str(number) for number in range(8)]
    assert [each.finish for each in given][:2] == ["stop", "length"]


@pytest.mark.parametrize("first", [(429, {"retry-after": "0"}, {}), (503, {}, {}), (0, {}, b"")])
def test_a_busy_or_broken_endpoint_is_asked_again(server: ChatServer, first: Any) -> None:
    turns = iter([first, (200, {}, completion("at last"))])
    server.reply = lambda _: next(turns)
    assert _endpoint(server).generate([_asked()])[0].text == "at last"
    assert len(server.asked) == 2
    server.reply = lambda _: first
    with pytest.raises(TunesmithError, match="gave no answer"):
        _endpoint(server, retries=1).generate([_asked()])
    assert len(server.asked) == 4, "it gives up after its retries"


def test_a_refusal_is_not_asked_again_and_does_not_show_the_key(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    server.reply = lambda _: (401, {}, {"error": f"bad key {KEY}"})
    with pytest.raises(TunesmithError) as raised:
        _endpoint(server, key_env="A_KEY").generate([_asked()])
    assert len(server.asked) == 1
    assert KEY not in str(raised.value)
    assert "bad key [key]" in str(raised.value)
    with chat_server() as other:
        server.reply = lambda _: (307, {"location": f"{other.url}/chat/completions"}, {})
        with pytest.raises(TunesmithError, match="status 307"):
            _endpoint(server, key_env="A_KEY").generate([_asked()])
        assert not other.asked, "a redirect does not carry the key away"
    monkeypatch.delenv("A_KEY")
    with pytest.raises(UsageError, match="A_KEY is not set"):
        _endpoint(server, key_env="A_KEY")


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", {}, {"choices": []}, {"choices": [{"message": {"content": "x"}}]}, b"[" * 100_000),
        completion("x", usage={"prompt_tokens": "many", "completion_tokens": 1}),
        completion("x", usage={"prompt_tokens": -1, "completion_tokens": 1}),
        completion("x", usage={"prompt_tokens": 2**63, "completion_tokens": 1}),
        completion("\ud800"),
        {**completion("x"), "choices": [{"message": {}}]},
        {**completion("x"), "choices": [{"message": {"content": None, "tool_calls": [{"id": "a"}]}}]},
        {**completion("x"), "choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}}]},
        {**completion("x"), "choices": [{"message": {"content": None, "tool_calls": 7}}]},
    ],
)
def test_what_is_no_completion_is_an_error(server: ChatServer, body: Any) -> None:
    with pytest.raises(TunesmithError, match="not a chat completion"):
        _said(server, body)


def test_a_refusal_in_a_field_of_its_own_is_the_answer(server: ChatServer) -> None:
    document = completion(None)
    assert _said(server, document).text == ""
    for message, text in (
        ({"content": None, "refusal": "I can't assist with that."}, "I can't assist with that."),
        ({"content": "Fine.", "refusal": None}, "Fine."),
    ):
        document["choices"][0]["message"] = message
        assert _said(server, document).text == text


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def _called(*calls: tuple[str, str], content: Any = None) -> dict[str, Any]:
    """An answer that calls functions: (name, arguments)."""
    document = completion(content, finish="tool_calls")
    document["choices"][0]["message"]["tool_calls"] = [
        {"id": f"c{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(calls)
    ]
    return document


def test_tools_and_their_turns_are_sent(server: ChatServer) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = (
        Message(role="user", content="rain in Rome?"),
        Message(role="assistant", content="", tool_calls=(ToolCall(id="call1", **function),)),
        Message(role="tool", content="dry", tool_call_id="call1"),
    )
    _endpoint(server).generate([Generation(messages=with_tools(turns, TOOLS)), _asked()])
    with_them, without = sorted(server.asked, key=lambda body: "tools" not in body)
    assert with_them["tools"] == TOOLS
    calls = [{"id": "call1", "type": "function", "function": function}]
    assert with_them["messages"] == [
        {"role": "user", "content": "rain in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "dry", "tool_call_id": "call1"},
    ]
    assert "tools" not in without
    assert without["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "calls", [[("weather", '{"city":"Rome"}')], [("weather", '{"city":"Rome"}'), ("weather", "")]], ids=["one", "two"]
)
def test_calls_are_scored_as_those_of_a_row(server: ChatServer, calls: list[tuple[str, str]]) -> None:
    made = tuple(ToolCall(id=f"call{n}", name=name, arguments=text or "{}") for n, (name, text) in enumerate(calls))
    reference = Message(role="assistant", content="", tool_calls=made).text.replace('":"', '": "')
    given = _said(server, _called(*calls))
    assert exact_match(given.text, reference, None) == 1.0
    assert exact_match(_said(server, _called(("weather", '{"city":"Oslo"}'))).text, reference, None) == 0.0
    assert _said(server, _called(*calls, content="I look.")).text == f"I look.\n{given.text}"


def test_how_sure_an_answer_is(server: ChatServer) -> None:
    document = completion("hello")
    document["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -0.2}]}
    assert _said(server, document, logprobs=True).confidence == pytest.approx(0.740818, abs=1e-6)
    assert server.asked[0]["logprobs"] is True
    document["choices"][0]["logprobs"] = None
    with pytest.raises(TunesmithError, match="not a chat completion"):
        _said(server, document, logprobs=True)


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "x", "https://user:pw@host/v1", "https://host/v1?key=1", "https:///v1", "http://h/v1#a"]
)
def test_a_url_that_is_none_or_may_hold_a_secret(url: str) -> None:
    with pytest.raises(ValidationError):
        EndpointSettings(url=url, model="m")

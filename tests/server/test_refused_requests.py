"""What a chat completion request may not say: the refusal names the field, and the engine is not asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import HELLO, Served

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "time"}}
TOOLS = [WEATHER, TIME]


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "command", "schema": schema, **more}}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no other."""
    names = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **names}


ONE = closed({"intent": {"enum": ["on", "off"]}})


def strict(tool: Any) -> Any:
    return {**tool, "function": {**tool["function"], "strict": True}}


def said(*messages: Any) -> Any:
    return {"messages": [*HELLO, *messages]}


def calling(arguments: str = "{}") -> Any:
    """A message of the assistant that calls a function."""
    call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def formatted(value: Any) -> Any:
    return {"response_format": value}


NOT, SCHEMA, UNKNOWN = "invalid_value", "invalid_json_schema", "unknown_parameter"
# (fields of the request, the field that is named, the code). The limits of fields are in test_costs.py.
REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"top_logprobs": 2}, None, NOT),
    ({"tools": []}, "tools", NOT),
    ({"temprature": 0.1}, "temprature", UNKNOWN),
    ({"messages": [{**HELLO[0], "name": "n"}]}, "messages[0].name", UNKNOWN),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", NOT),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", NOT),
    ({"messages": []}, "messages", NOT),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", NOT),
    ({"n": 2}, "n", NOT),
    ({"temperature": 2.1}, "temperature", NOT),
    ({"temperature": "0"}, "temperature", NOT),
    ({"max_tokens": True}, "max_tokens", NOT),
    ({"max_tokens": 1, "max_completion_tokens": 2}, None, NOT),
    ({"stop": ""}, "stop", NOT),
    ({"stream_options": {"include_usage": True}}, None, NOT),
    ({"model": ""}, "model", NOT),
    (formatted({"type": "xml"}), "response_format.type", NOT),
    (formatted({"type": "json_object", "schema": {}}), "response_format.schema", UNKNOWN),
    (formatted({"type": "json_schema"}), "response_format", NOT),
    (formatted({"type": "text", "json_schema": {"name": "a", "schema": {}}}), "response_format", NOT),
    (formatted(schema_format(ONE, name="a b")), "response_format.json_schema.name", NOT),
    (formatted(schema_format(ONE, name="a" * 65)), "response_format.json_schema.name", NOT),
    (formatted(schema_format({"type": "object"}, strict=True)), "response_format.json_schema", SCHEMA),
    (formatted(schema_format({"oneOf": [ONE]})), "response_format.json_schema", SCHEMA),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", NOT),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", NOT),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, None, NOT),
    ({"tool_choice": "none"}, None, NOT),
    ({"tools": [WEATHER] * 2}, "tools", NOT),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom", UNKNOWN),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", NOT),
    ({"tools": [strict(TIME)]}, "tools[0].function", SCHEMA),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, None, NOT),
    ({"tools": TOOLS, "logprobs": True}, None, NOT),
    (said({"role": "tool", "content": "x"}), "messages[1]", NOT),
    (said({"role": "tool", "content": "x", "tool_call_id": "b"}), "messages", NOT),
    ({"messages": [{**HELLO[0], "tool_call_id": "a"}]}, "messages[0]", NOT),
    (said({"role": "assistant", "tool_calls": []}), "messages[1].content", "missing_required_parameter"),
    (said({"role": "assistant", "content": "x", "refusal": "no"}), "messages[1].refusal", NOT),
    (said(calling("[1]")), "messages[1].tool_calls[0].function.arguments", NOT),
    (said(calling("{")), "messages[1].tool_calls[0].function.arguments", NOT),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "code"), REFUSED)
def test_what_is_not_valid_is_refused_by_name(shared: Served, body: Any, param: str | None, code: str) -> None:
    asked = len(shared.engine.seen)  # other files' tests share this server
    response = shared.post(**body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert (error["param"] or "").startswith(param) if param else error["param"] is None
    assert len(shared.engine.seen) == asked


NUL = "The body holds a NUL character."


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "code", "words"),
    [
        ("POST", "/v1/chat/completions", b'{"a":' * 70 + b"1" + b"}" * 70, 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b'{"temperature": NaN}', 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b'{"model": "\\ud800"}', 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b'{"model": "home\xff"}', 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b"null", 400, "invalid_json", "a JSON object"),
        ("POST", "/v1/chat/completions", b'\xef\xbb\xbf{"model": "home"}', 400, "invalid_json", ""),
        ("GET", "/v1/files/%00", b"", 404, "not_found", "There is nothing at this address."),
        ("GET", "/api/versions/home%00/1", b"", 404, "not_found", "There is nothing at this address."),
        ("GET", "/v1/files?purpose=%00", b"", 400, "invalid_value", "The address holds a NUL character."),
        ("POST", "/api/feedback", b'{"request_id": "\\u0000", "score": {"a": 1}}', 400, "invalid_value", NUL),
        ("POST", "/api/feedback", b'{"request_id": "x", "score": {"a\\u0000": 1}}', 400, "invalid_value", NUL),
    ],
)
def test_what_is_no_plain_json_object_or_holds_nul_is_refused(
    shared: Served, method: str, url: str, body: bytes, status: int, code: str, words: str
) -> None:
    with shared.http() as http:
        response = http.request(method, url, content=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], words in error["message"]) == (status, code, True), error


KEYS = st.sampled_from(["model", "messages", "role", "content", "stop", "stream", "user", "x"])
LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_no_json_makes_the_server_fail(shared: Served, body: Any) -> None:
    with shared.http() as http:
        response = http.post("/v1/chat/completions", content=json.dumps(body).encode())
    assert response.status_code in (400, 404)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

"""What one request may say and cost: fields are refused by name and have limits, and others are answered meanwhile."""

import json
import time
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai.types.chat as types
import pytest
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from tests.attack_table import Happened
from tests.fabricate import NAME
from tests.schemas import closed
from tests.server.conftest import HELLO, Served
from tests.server.fake_engine import VALID
from tunesmith.server import limits
from tunesmith.server.answering.request import ChatMessage, ChatRequest, StreamOptions

MIB = 1 << 20
SECONDS = 60  # for an honest request meanwhile; without limits some of these hold it up for minutes


def neighbour(served: Served) -> str:
    """The token of another tenant's user."""
    return served.person("neighbour", "engineer", tenant="acme")


def meanwhile(served: Served, attacks: list[Callable[[], httpx.Response]]) -> tuple[list[httpx.Response], float]:
    """(answers to attacks sent together, the longest that another tenant's request took until they were answered)."""
    token, worst = neighbour(served), 0.0
    with ThreadPoolExecutor(len(attacks)) as pool, served.http(token) as http:
        sent = [pool.submit(attack) for attack in attacks]
        while True:
            over = all(one.done() for one in sent)
            began = time.monotonic()
            body = {"model": NAME, "messages": HELLO, "max_tokens": 2}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            worst = max(worst, time.monotonic() - began)
            if over:
                return [one.result() for one in sent], worst


def posting(served: Served, content: str, path: str = "/v1/chat/completions") -> Callable[[], httpx.Response]:
    def post() -> httpx.Response:
        with served.http() as http:
            return http.post(path, content=content.encode())

    return post


def many(item: str, size: int = MIB - 4096) -> str:
    """A JSON list of as many items as fit."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def keys(size: int) -> str:
    """An object with many keys, the last of which comes twice."""
    return "{" + ",".join(f'"k{number}":1' for number in range(size)) + f',"k{size - 1}":1}}'


def with_fields(**fields: Any) -> str:
    return json.dumps({"model": NAME, "messages": HELLO, **fields})


MESSAGES = '{"model": "home", "messages": %s}'
PARTS = '{"model": "home", "messages": [{"role": "user", "content": %s}]}'
# what is tried -> (body, what the refusal names)
KEYS = {"type": "object", "properties": {f"k{number}": {} for number in range(5_001)}}
MANY_KEYS = {"type": "json_schema", "json_schema": {"name": "many", "schema": KEYS}}
BODIES = {
    "empty messages": (MESSAGES % many("{}"), "20000 JSON values"),
    "too many messages": (with_fields(messages=HELLO * (limits.MESSAGES + 1)), "at most 2048 items"),
    "too many parts": (PARTS % many('{"type":"text","text":""}', 60_000), "at most 2048 items"),
    "lists in lists": (f'{{"a": {many("[" * 60 + "]" * 60)}}}', "20000 JSON values"),
    "keys twice": (keys(90_000), "appears twice"),
    "a long key": ('{"%s": 1}' % ("k" * (MIB - 99)), "Unrecognized request argument"),
    "deep": ("[" * (MIB - 99), "not valid JSON"),
    "a long number": ('{"seed": %s}' % ("9" * (MIB - 99)), "not valid JSON"),
    "long stops": (with_fields(stop=["a" * 240_000] * 4), "at most 4 texts, each of 1 to 256 characters"),
    "stop too long": (with_fields(stop="a" * 257), "at most 4 texts, each of 1 to 256 characters"),
    "stops": (with_fields(stop=["a"] * 5), "at most 4 texts"),
    "a long model": (with_fields(model="m" * 201), "at most 200 characters"),
    "a long user": (with_fields(user="u" * 513), "at most 512 characters"),
    "many metadata": (with_fields(metadata={str(number): "" for number in range(17)}), "at most 16 pairs"),
    "a long metadata key": (with_fields(metadata={"k" * 65: ""}), "at most 64 characters"),
    "a long metadata text": (with_fields(metadata={"k": "t" * 513}), "at most 512 characters"),
    "logprobs": (with_fields(logprobs=True, top_logprobs=21), "less than or equal to 20"),
    "a schema": (with_fields(response_format=MANY_KEYS), "more than 5000 properties"),
    "functions": (with_fields(tools=[{"type": "function", "function": {"name": "f"}}] * 129), "at most 128"),
}


@pytest.mark.attack("serving", "fields whose cost grows faster than their size", "refused, 400, with the limit")
@pytest.mark.parametrize("tried", BODIES)
def test_each_field_has_a_limit_that_its_refusal_names(shared: Served, tried: str) -> None:
    content, named = BODIES[tried]
    began = time.monotonic()
    response = posting(shared, content)()
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert named in error["message"]
    assert len(response.content) < 1000
    assert time.monotonic() - began < SECONDS


@pytest.mark.slow
@pytest.mark.attack("serving", "hostile bodies sent together, next to another tenant")
def test_hostile_bodies_do_not_hold_up_another_tenant(served: Served, happened: Happened) -> None:
    attacks = [posting(served, content) for content, _ in BODIES.values()]
    refused, worst = meanwhile(served, attacks)
    assert {response.status_code for response in refused} == {400}
    assert worst < SECONDS
    happened("the other tenant answered within seconds", len(attacks))


@pytest.mark.slow
@pytest.mark.attack("serving", "stop texts and prompts at the limit, tiny model")
def test_costly_requests_to_a_model_do_not_hold_up_another_tenant(tiny: Served, happened: Happened) -> None:
    stops = ["a" * 255 + letter for letter in "abcd"]
    long = [{"role": "user", "content": "x" * (MIB - 4096)}]
    spaces = [{"role": "user", "content": " é" * (MIB // 8)}]
    turns = [{"role": "user", "content": ""}] * limits.MESSAGES
    within = [posting(tiny, with_fields(stop=stops, temperature=2.0, seed=seed)) for seed in range(4)]
    beyond = [posting(tiny, with_fields(messages=one)) for one in (long, spaces, turns) for _ in range(4)]
    answers, worst = meanwhile(tiny, [*within, *beyond])
    assert [response.status_code for response in answers] == [200] * 4 + [400] * 12
    assert {response.json()["error"]["code"] for response in answers[4:]} == {"context_length_exceeded"}
    assert worst < SECONDS
    assert {row.ok for row in tiny.rows()} == {True}
    happened("answered or refused; the other tenant in seconds", len(answers))


@pytest.mark.attack("serving", "an expected answer that scorers would take long over")
def test_feedback_texts_have_a_limit(shared: Served) -> None:
    body = {"request_id": "x", "expected": "a " * (limits.EXPECTED // 2) + "b"}
    response = posting(shared, json.dumps(body), "/api/feedback")()
    assert response.status_code == 400
    assert f"at most {limits.EXPECTED} characters" in response.json()["error"]["message"]


# Parameters at their ends


ENDS: list[dict[str, Any]] = [
    *({"temperature": 1.0, "top_p": top_p} for top_p in (1e-300, 5e-324, 1e-45, 1e-7, 0.999999999999, 1.0)),
    *({"temperature": temperature} for temperature in (5e-324, 1e-310, 1e-45, 1e-9, 2.0)),
    *({"temperature": 1.0, "seed": seed} for seed in (-(2**63), -1, 2**63 - 1)),
    *({"max_tokens": most} for most in (1, 2**31, 2**63, 10**300)),
    {"logprobs": True, "top_logprobs": 20, "temperature": 2.0, "top_p": 5e-324},
]
REFUSED = (
    '"top_p": 0', '"top_p": -1e-300', '"top_p": 1.0000001', '"top_p": NaN', '"top_p": Infinity', '"top_p": 1e999',
    '"temperature": NaN', '"temperature": -Infinity', '"temperature": 1e400', '"temperature": -5e-324',
    '"seed": 9223372036854775808', '"seed": -9223372036854775809', '"seed": 1.5', '"seed": 1e30',
    '"max_tokens": 0', '"max_tokens": -1', '"max_tokens": 1e3', '"logit_bias": {"1": 1e300}',
    '"top_logprobs": 1e300',
)  # fmt: skip


@pytest.mark.attack("rollout", "parameters that make the engine fail, against an arm")
def test_requests_own_errors_count_against_no_arm(tiny: Served, happened: Happened) -> None:
    for end in ENDS:
        response = tiny.post(**{"max_tokens": 3, **end})
        assert response.status_code == 200, (end, response.text)
    before = len(tiny.rows())
    control = tiny.engine.native._renderer.control_tokens[0]  # type: ignore[attr-defined]
    own = [
        with_fields(messages=[*HELLO, {"role": "assistant", "content": "on"}]),
        with_fields(messages=[{"role": "user", "content": f"x{control}y"}]),
        with_fields(messages=[{"role": "user", "content": "turn on " * 2000}]),
        *(f"{with_fields()[:-1]}, {field}}}" for field in REFUSED),
    ]
    for content in own:
        for more in ('"stream": false', '"stream": true'):
            response = posting(tiny, content[:-1] + f", {more}}}")()
            assert response.status_code == 400, content[:200]
            assert response.json()["error"]["type"] == "invalid_request_error"
    rows = tiny.rows()
    assert (len(rows), {row.ok for row in rows}) == (before, {True})
    happened("answered", len(ENDS))
    happened("refused, 400, and not recorded", 2 * len(own))


@pytest.mark.attack("serving", "a prompt of 1 MiB: refused before it is tokenised")
def test_text_that_cannot_fit_is_not_tokenised(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = tiny.engine
    monkeypatch.setattr(engine.native._renderer, "_encode", lambda *_: pytest.fail("tokenised"))
    response = tiny.post(messages=[{"role": "user", "content": "x" * (MIB - 4096)}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


# What is refused by name, before the engine is asked


CITY = closed({"city": {"type": "string"}})
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "time"}}
TOOLS = [WEATHER, TIME]


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "command", "schema": schema, **more}}


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


# Of every parameter in the official client's types: its default is accepted, what would change the answer is refused.
DEFAULTS: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "function_call": "none",
    "verbosity": "medium", "service_tier": "auto", "reasoning_effort": "low", "safety_identifier": "u1",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {}, "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "x"}, "store": True,
    "tool_choice": "none", "parallel_tool_calls": True,
    "n": 1, "user": "u", "stream": False, "top_p": 1, "logprobs": False, "response_format": {"type": "text"},
}  # fmt: skip
CHANGING: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"5": 1}, "modalities": ["text", "audio"],
    "function_call": "auto", "functions": [{"name": "f"}], "audio": {"voice": "alloy", "format": "mp3"},
    "moderation": {"model": "m"}, "web_search_options": {}, "verbosity": "low", "n": 2,
}  # fmt: skip

NOT, SCHEMA, UNKNOWN = "invalid_value", "invalid_json_schema", "unknown_parameter"
# (fields of the request, the field that is named, the code). The limits of fields: BODIES.
INVALID: list[tuple[dict[str, Any], str | None, str]] = [
    ({"top_logprobs": 2}, None, NOT),
    ({"tools": []}, "tools", NOT),
    ({"temprature": 0.1}, "temprature", UNKNOWN),
    ({"messages": [{**HELLO[0], "nam": "n"}]}, "messages[0].nam", UNKNOWN),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", NOT),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", NOT),
    ({"messages": []}, "messages", NOT),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", NOT),
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
    ({"tool_choice": "required"}, None, NOT),
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
    *(({name: value}, name, NOT) for name, value in CHANGING.items()),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "code"), INVALID)
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
        ("POST", "/v1/chat/completions", b'{"model": "\\ud800"}', 400, "invalid_json", ""),
        ("POST", "/v1/chat/completions", b'{"model": "home\xff"}', 400, "invalid_json", ""),
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


def test_every_parameter_of_the_client_is_known() -> None:
    assert set(typing.get_type_hints(CompletionCreateParamsBase)) <= set(ChatRequest.model_fields)
    assert set(typing.get_type_hints(ChatCompletionStreamOptionsParam)) <= set(StreamOptions.model_fields)
    for role in ("Assistant", "Developer", "System", "Tool", "User"):
        kind = getattr(types, f"ChatCompletion{role}MessageParam")
        assert set(typing.get_type_hints(kind)) <= set(ChatMessage.model_fields), role


def test_defaults_are_accepted_alone_and_together(shared: Served) -> None:
    for given in (*({name: value} for name, value in DEFAULTS.items()), DEFAULTS, dict.fromkeys(DEFAULTS)):
        response = shared.post(**given)
        assert response.status_code == 200, (given, response.text)
    assert shared.post(store=True).headers["x-tunesmith-store"] == "no"
    options = {"include_obfuscation": False, "include_usage": True}
    assert shared.post(stream=True, stream_options=options).status_code == 200


def test_an_answer_can_be_sent_back_and_a_developer_speaks_for_the_system(served: Served) -> None:
    client: Any = served.client().chat.completions
    first = client.create(model=NAME, messages=HELLO).choices[0].message
    told = {"role": "developer", "content": "Be brief.", "name": "ops"}
    for sent in (first, first.model_dump(), {**first.model_dump(), "annotations": []}):
        asked = [told, *HELLO, sent, {"role": "user", "content": "again", "name": "ann"}]
        assert client.create(model=NAME, messages=asked).choices[0].message.content == VALID
    assert [turn.role for turn in served.engine.seen[-1].messages][-4:] == ["system", "user", "assistant", "user"]

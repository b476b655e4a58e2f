"""The official openai client drives the server: answers, streams, formats, functions, and which model answers whom."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.fabricate import NAME, OWNER, Scene
from tests.models.test_rendering_tools import SHORT_CALLS
from tests.schemas import closed
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import VALID
from tests.server.test_costs import ONE, TIME, TOOLS, WEATHER, calling, said, schema_format, strict
from tests.server.tiny_engine import TinyEngine
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.messages import ToolCall, tools_of
from tunesmith.core.text.names import Scope
from tunesmith.registry import opening
from tunesmith.registry.versions import Version
from tunesmith.server.answering import routing

Versions = dict[int, Version]


def test_a_completion_says_which_version_answered(served: Served, versions: Versions) -> None:
    answer = served.client().chat.completions.with_raw_response.create(model=NAME, messages=HELLO)
    completion = answer.parse()
    assert completion.choices[0].message.content == VALID
    assert (completion.choices[0].finish_reason, completion.choices[0].logprobs) == ("stop", None)
    assert completion.model == f"{NAME}@v1"
    assert completion.system_fingerprint == short(versions[1].digest)
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert answer.headers["x-tunesmith-version"] == f"{NAME}@v1"
    assert answer.headers["x-tunesmith-arm"] == "stable"
    assert completion.id == "chatcmpl-" + answer.headers["x-request-id"]


def test_a_stream_is_openais(served: Served) -> None:
    chunks = list(served.ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == VALID
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 2)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    response = served.post(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert {("usage" in event, event["object"]) for event in events} == {(False, "chat.completion.chunk")}


def test_every_honoured_field_reaches_the_engine(served: Served) -> None:
    served.engine.answer = lambda _request, _adapter: "one two three four five"
    completion = served.ask(
        max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=["END"], n=1, user="u", metadata={"k": "v"},
        response_format={"type": "text"},
    )  # fmt: skip
    asked = served.engine.seen[-1]
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed, asked.stop) == (3, 0.5, 0.9, 7, ("END",))
    assert (completion.choices[0].finish_reason, completion.choices[0].message.content) == ("length", "one two three")
    assert completion.metadata == {"k": "v"}
    parts = [{"type": "text", "text": "switch "}, {"type": "text", "text": "on"}]
    nulls = dict.fromkeys(("temperature", "top_p", "stop", "max_tokens", "stream", "n"))
    served.post(messages=[{"role": "user", "content": parts}], **nulls)
    asked = served.engine.seen[-1]
    assert asked.messages[-1].content == "switch on"
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed, asked.stop) == (32, 0.0, 1.0, 0, ())
    assert (asked.top_logprobs, asked.schema) == (None, None)


def test_log_probabilities_are_openais_whole_and_streamed(served: Served) -> None:
    whole = served.ask(logprobs=True, top_logprobs=2).choices[0].logprobs
    assert served.engine.seen[-1].top_logprobs == 2
    assert [one.token for one in whole.content] == ['{"intent":', ' "on"}']
    assert bytes(whole.content[1].bytes).decode() == ' "on"}'
    assert [(one.token, one.logprob) for one in whole.content[0].top_logprobs] == [("a", -1.0), ("b", -1.0)]
    chunks = list(served.ask(logprobs=True, stream=True))
    assert served.engine.seen[-1].top_logprobs == 0
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [(one.token, one.logprob) for one in streamed] == [(one.token, one.logprob) for one in whole.content]
    assert all(one.top_logprobs == [] for one in streamed)
    assert "".join(one.token for one in streamed) == "".join(c.choices[0].delta.content or "" for c in chunks)


def test_prompt_of_context_length_is_refused(served: Served) -> None:
    # The fake engine counts words and one more for each turn: `Answer as tuned.` is 4 tokens.
    room = served.engine.context_length - 4 - 1

    def words(count: int) -> list[Any]:
        return [{"role": "user", "content": " ".join(["w"] * count)}]

    assert served.post(messages=words(room - 1)).status_code == 200
    for stream in (False, True):
        refused = served.post(stream=stream, messages=words(room))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert [row.ok for row in served.rows()] == [True]  # a request's own fault is no failure of an arm


# Formats of answers


class Command(BaseModel):
    intent: Literal["on", "off"]
    level: int | None


def test_any_object_a_schema_and_the_clients_own_helper_reach_the_engine(served: Served) -> None:
    served.ask(response_format={"type": "json_object"})
    assert json.loads(served.engine.seen[-1].schema or "") == {"type": "object", "additionalProperties": True}
    served.ask(response_format=schema_format(ONE, strict=True, description="what to do"), stream=True).close()
    assert json.loads(served.engine.seen[-1].schema or "") == ONE
    served.engine.answer = lambda _request, _adapter: '{"intent":"off","level":null}'
    parsed = served.client().chat.completions.parse(model=NAME, messages=HELLO, response_format=Command)
    assert parsed.choices[0].message.parsed == Command(intent="off", level=None)
    assert json.loads(served.engine.seen[-1].schema or "")["properties"].keys() == {"intent", "level"}
    served.ask(response_format={"type": "text"})
    # Nobody measured the version with these formats, so such answers are no evidence about it.
    assert [(row.cut, bool(row.scores)) for row in served.rows()] == [(True, False)] * 3 + [(False, True)]
    found = [served.feedback(row.id, score={"helpful": 1.0}) for row in served.rows()]
    assert [each.status_code for each in found] == [409, 409, 409, 200]
    assert found[0].json()["error"]["code"] == "answer_cut"
    assert [set(row.scores) & {"helpful"} for row in served.rows()] == [set()] * 3 + [{"helpful"}]


def test_a_real_engine_holds_answers_whole_and_streamed(tiny: Served) -> None:
    for part in ({"type": "string", "pattern": "("}, {"const": 10**20}):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="cannot be held to this response_format") as caught:
                tiny.ask(response_format=schema_format(closed({"a": part})), stream=stream)
            assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format.json_schema")
    assert tiny.rows() == [], "a schema that does not compile is no failure of the version"
    asked = {"response_format": schema_format(ONE, strict=True), "temperature": 1.5, "seed": 3}
    whole = tiny.ask(**asked).choices[0]
    assert (json.loads(whole.message.content)["intent"] in ("on", "off"), whole.finish_reason) == (True, "stop")
    chunks = list(tiny.ask(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


# Who may ask for what


def test_an_invalid_token_is_401_before_the_body_is_read_and_unknown_paths_answer_alike(served: Served) -> None:
    with served.http() as http:
        for header in ("Bearer wrong", f"Basic {served.token}", "Bearer", ""):
            response = http.post("/v1/chat/completions", headers={"Authorization": header}, content=b"{" * 99)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert served.token not in response.text
        assert http.get("/v2/nothing").json()["error"]["code"] == "not_found"
        assert http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_models_waits_only_once_for_a_bucket_that_is_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []

    def away(*given: Any) -> None:
        waited.append(given)
        raise TunesmithError("the bucket cannot be used")

    monkeypatch.setattr(routing.Router, "_require_approved", away)
    assert [model.id for model in served.client().models.list().data] == [NAME, f"{NAME}@champion"]
    assert len(waited) == 1


def test_models_lists_what_can_be_asked_and_nothing_else(served: Served) -> None:
    listed = [model.id for model in served.client().models.list()]
    assert listed == [NAME, f"{NAME}@champion", f"{NAME}@v1", f"{NAME}@v2", f"{NAME}@v3"]  # v4 is not approved
    assert served.client().models.retrieve(f"{NAME}@v2").owned_by == "tunesmith"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("gone")
    error = served.post(model=f"{NAME}@v4").json()["error"]
    assert (error["code"], "is not approved" in error["message"]) == ("model_not_available", True)
    # A version whose weights were changed is listed until they are read.
    weights = served.scene.store.root / "versions" / NAME / "v3" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    response = served.post(model=f"{NAME}@v3")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_available")
    assert served.engine.adapters == {}
    response = served.post(model=f"{NAME}@v2")
    assert (response.headers["x-tunesmith-version"], response.headers["x-tunesmith-arm"]) == (f"{NAME}@v2", "pinned")
    assert [row.arm for row in served.rows()] == ["pinned"]


@pytest.mark.parametrize(
    "model",
    [
        "nothing", f"{NAME}@v99", f"{NAME}@challenger", f"{NAME}@", f"{NAME}@@champion", f"{NAME}@champion@v1",
        "@champion",
        f"{NAME}@v1/../../x", "../../etc/passwd", f"{NAME}\x00", f"{NAME}'; drop table versions;--", f"{NAME.upper()}",
        "hоme", f"{NAME}@v٣", f"{NAME}@v01", f"{NAME}@v-1", "%", "*", f" {NAME}", f"{NAME}@champion ",
    ],
)  # fmt: skip
def test_any_other_name_is_the_same_404(shared: Served, model: str) -> None:
    response = shared.post(model=model)
    assert response.status_code == 404
    message = f"The model {model!r} does not exist or you do not have access to it."
    kind = {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert response.json()["error"] == {"message": message, **kind}


def test_another_tenants_or_regions_model_looks_nonexistent(served: Served, scene: Any, engine: Any) -> None:
    served.begin(served.scene.version(21, name="theirs", scope=Scope("acme")), scope=Scope("acme"))
    served.begin(scene.version(22, name="euro", scope=Scope(region="eu")), scope=Scope(region="eu"))
    tokens = {user: served.person(user, "operator", tenant=of) for user, of in (("al", "acme"), ("bo", "umbra"))}
    for model in ("theirs", "theirs@champion", "theirs@v1"):
        assert served.post(tokens["al"], model=model).json()["model"] == "theirs@v1"
    for model in ("theirs", "theirs@champion", "theirs@v1", "euro", "euro@v1"):
        denied, absent = (served.post(tokens["bo"], model=one) for one in (model, f"x{model[1:]}"))
        assert denied.status_code == absent.status_code == 404
        assert denied.text == absent.text.replace(f"x{model[1:]}", model)
    listed = {model["id"].partition("@")[0] for model in served.get("/v1/models", tokens["bo"]).json()["data"]}
    assert listed == {NAME}  # what is for all tenants is theirs too
    assert served.post(tokens["bo"]).status_code == 200
    with running(scene, engine, region="eu") as here:
        assert here.post(model="euro").headers["x-tunesmith-version"] == "euro@v1"


def test_one_request_at_a_time_reads_the_weights_of_a_pinned_version_and_they_are_verified_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read, broken = opening.private_copy, list[str](), ["v3"]

    @contextlib.contextmanager
    def copying(folder: Path) -> Iterator[Path]:
        read.append(folder.name)
        if folder.name in broken:
            raise TunesmithError("the disk is full")
        with whole(folder) as copy:
            yield copy

    def posted(version: str) -> set[int]:
        with ThreadPoolExecutor(4) as pool:
            return set(pool.map(lambda _: served.post(model=f"{NAME}@{version}").status_code, range(4)))

    monkeypatch.setattr(routing, "_REST", 600.0)
    monkeypatch.setattr(opening, "private_copy", copying)
    assert (posted("v3"), read) == ({503}, ["v3"])
    assert (posted("v2"), read) == ({200}, ["v3", "v2", "v2"]), "to route the first request, and to load the version"
    with served.scene.store.change(OWNER, "test", "a", {}):  # an entry in the audit log
        pass
    assert served.post(model=f"{NAME}@v2").status_code == 200
    assert len(list(served.client().models.list())) == 4
    assert read.count("v2") == 2
    broken.clear()
    served.serving.router._retries._until.clear()
    assert posted("v3") == {200}


# Functions


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

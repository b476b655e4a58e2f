"""The official openai client drives the server, and every field it sends is honoured or refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fabricate import NAME, OWNER, STEWARD
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import VALID
from tunesmith.core.digests import short
from tunesmith.core.errors import TunesmithError
from tunesmith.core.scope import Scope
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry import opening
from tunesmith.registry.versions import Version
from tunesmith.server.answering import routing
from tunesmith.store.store import Store

Versions = dict[int, Version]


def test_a_completion_says_which_version_answered(served: Served, versions: Versions) -> None:
    answer = served.client().chat.completions.with_raw_response.create(model=NAME, messages=HELLO)
    completion = answer.parse()
    assert completion.choices[0].message.content == VALID
    assert completion.choices[0].finish_reason == "stop"
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
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].message.content == "one two three"
    assert completion.metadata == {"k": "v"}
    parts = [{"type": "text", "text": "switch "}, {"type": "text", "text": "on"}]
    nulls = dict.fromkeys(("temperature", "top_p", "stop", "max_tokens", "stream", "n"))
    served.post(messages=[{"role": "user", "content": parts}], **nulls)
    asked = served.engine.seen[-1]
    assert asked.messages[-1].content == "switch on"
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed, asked.stop) == (32, 0.0, 1.0, 0, ())


def test_log_probabilities_are_openais_whole_and_streamed(served: Served) -> None:
    plain = served.ask()
    assert plain.choices[0].logprobs is None
    assert served.engine.seen[-1].top_logprobs is None
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


@pytest.mark.parametrize(
    ("field", "value", "param", "code"),
    [
        ("top_logprobs", 2, None, "invalid_value"),
        ("top_logprobs", 21, "top_logprobs", "invalid_value"),
        ("tools", [], "tools", "invalid_value"),
        ("temprature", 0.1, "temprature", "unknown_parameter"),
        ("messages", [{"role": "user", "content": "x", "name": "n"}], "messages[0].name", "unknown_parameter"),
        ("messages", [{"role": "user"}], "messages[0].content", "missing_required_parameter"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content", "invalid_value"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", None),
        ("messages", [], "messages", "invalid_value"),
        ("messages", [{"role": "system", "content": "x"}], "messages", "invalid_value"),
        ("n", 2, "n", "invalid_value"),
        ("temperature", 2.1, "temperature", "invalid_value"),
        ("temperature", "0", "temperature", "invalid_value"),
        ("top_p", 0, "top_p", "invalid_value"),
        ("max_tokens", 0, "max_tokens", "invalid_value"),
        ("max_tokens", True, "max_tokens", "invalid_value"),
        ("seed", 2**64, "seed", "invalid_value"),
        ("stop", ["a"] * 5, "stop", "invalid_value"),
        ("stop", "", "stop", "invalid_value"),
        ("stream_options", {"include_usage": True}, None, "invalid_value"),
        ("model", "", "model", "invalid_value"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    shared: Served, field: str, value: Any, param: str | None, code: str | None
) -> None:
    asked = len(shared.engine.seen)  # other files' tests share this server
    response = shared.post(**{field: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    if code is not None:
        assert (error["param"], error["code"]) == (param, code)
    else:
        assert error["param"].startswith(param)
    assert len(shared.engine.seen) == asked


def test_prompt_of_context_length_is_refused(served: Served) -> None:
    # The fake engine counts words and one more for each turn: `Answer as tuned.` is 4 tokens.
    room = served.engine.context_length - 4 - 1

    def words(count: int) -> list[Any]:
        return [{"role": "user", "content": " ".join(["w"] * count)}]

    assert served.post(messages=words(room - 1)).status_code == 200
    for count in (room, room + 1):
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(messages=words(count))
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    streamed = served.post(stream=True, messages=words(room))
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert [row.ok for row in served.rows()] == [True]  # a request's own fault is no failure of an arm


# Who may ask for what


def test_an_invalid_token_is_401_before_the_body_is_read(served: Served) -> None:
    with served.http() as http:
        for header in ("Bearer wrong", f"Basic {served.token}", "Bearer", ""):
            response = http.post("/v1/chat/completions", headers={"Authorization": header}, content=b"{" * 99)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert served.token not in response.text
    with pytest.raises(openai.AuthenticationError):
        served.client("nope").models.list()


def test_models_lists_what_can_be_asked_and_nothing_else(served: Served) -> None:
    listed = [model.id for model in served.client().models.list()]
    assert listed == [NAME, f"{NAME}@champion", f"{NAME}@v1", f"{NAME}@v2", f"{NAME}@v3"]  # v4 is not approved
    assert served.client().models.retrieve(f"{NAME}@v2").owned_by == "tunesmith"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("gone")


def test_a_version_may_be_asked_for_by_its_number(served: Served) -> None:
    response = served.post(model=f"{NAME}@v2")
    assert (response.headers["x-tunesmith-version"], response.headers["x-tunesmith-arm"]) == (f"{NAME}@v2", "pinned")
    assert served.rows()[-1].arm == "pinned"


def test_an_unapproved_version_is_not_served(served: Served) -> None:
    error = served.post(model=f"{NAME}@v4").json()["error"]
    assert (error["code"], "is not approved" in error["message"]) == ("model_not_available", True)


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
    assert response.json()["error"] == {
        "message": f"The model {model!r} does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_another_tenants_model_looks_nonexistent(served: Served) -> None:
    theirs = served.scene.version(21, name="theirs", scope=Scope("acme"))
    served.begin(theirs, scope=Scope("acme"))
    tokens = {user: served.person(user, "operator", tenant=of) for user, of in (("al", "acme"), ("bo", "umbra"))}
    for model in ("theirs", "theirs@champion", "theirs@v1"):
        assert served.client(tokens["al"]).chat.completions.create(model=model, messages=HELLO).model == "theirs@v1"
        with served.http(tokens["bo"]) as http:
            denied = http.post("/v1/chat/completions", json={"model": model, "messages": HELLO})
            absent = http.post("/v1/chat/completions", json={"model": model.replace("e", "a"), "messages": HELLO})
        assert denied.status_code == absent.status_code == 404
        assert denied.text.replace("theirs", "thairs") == absent.text
    assert [model.id for model in served.client(tokens["bo"]).models.list() if "theirs" in model.id] == []
    # What is for all tenants is theirs too.
    assert served.client(tokens["bo"]).chat.completions.create(model=NAME, messages=HELLO).model == f"{NAME}@v1"


def test_a_version_for_one_region_is_not_served_in_another(scene: Any, engine: Any, versions: Versions) -> None:
    eu = scene.version(22, name="euro", scope=Scope(region="eu"))
    with running(scene, engine, region="us") as us:
        us.begin(eu, scope=Scope(region="eu"))
        assert us.post(model="euro").json()["error"]["code"] == "model_not_found"
        assert us.post(model="euro@v1").json()["error"]["code"] == "model_not_found"
    with running(scene, engine, region="eu") as here:
        assert here.post(model="euro").headers["x-tunesmith-version"] == "euro@v1"


def test_a_recall_stops_serving_at_the_next_request(served: Served, versions: Versions) -> None:
    assert served.post().status_code == 200
    cause = Cause(kind="version", value=versions[1].digest)
    recall(served.scene.store, cause, reason="a licence was withdrawn", actor=STEWARD)
    for model in (NAME, f"{NAME}@v1"):
        response = served.post(model=model)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_available")
        assert f"{NAME}@v1 was recalled: a licence was withdrawn" in error["message"]


def test_a_version_whose_weights_were_changed_is_not_served(served: Served, versions: Versions) -> None:
    folder = served.scene.store.root / "versions" / NAME / "v2"
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    response = served.post(model=f"{NAME}@v2")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_available")
    assert served.engine.adapters == {}


def test_a_pinned_version_answers_again_once_the_bucket_does(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> bytes:
        raise TunesmithError("the bucket cannot be used")

    monkeypatch.setattr(routing, "_REST", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read_blob", away)
        response = served.post(model=f"{NAME}@v2")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert [model.id for model in served.client().models.list()] == [NAME, f"{NAME}@champion"]
    assert served.post(model=f"{NAME}@v2").status_code == 200


def test_one_request_at_a_time_tries_a_pinned_version_that_cannot_be_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def failing(folder: Path) -> Any:
        tried.append(folder.name)
        raise TunesmithError("the disk is full")

    def post(_number: int) -> Any:
        return served.post(model=f"{NAME}@v2").json()["error"]["code"]

    monkeypatch.setattr(routing, "_REST", 600.0)
    monkeypatch.setattr(opening, "private_copy", failing)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(post, range(4))) == {"unavailable"}
    assert tried == ["v2"]


def test_the_weights_of_a_pinned_version_are_verified_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, copied = opening.private_copy, list[str]()

    @contextlib.contextmanager
    def copying(folder: Path) -> Iterator[Path]:
        copied.append(folder.name)
        with whole(folder) as copy:
            yield copy

    def post(_number: int = 0) -> int:
        return served.post(model=f"{NAME}@v2").status_code

    monkeypatch.setattr(opening, "private_copy", copying)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(post, range(4))) == {200}
    assert copied == ["v2", "v2"], "to route the first request, and to load the version"
    with served.scene.store.change(OWNER, "test", "a", {}):  # an entry in the audit log
        pass
    assert post() == 200
    assert len(list(served.client().models.list())) == 5
    assert copied.count("v2") == 2


def test_unknown_paths_and_methods_answer_in_the_same_shape(served: Served) -> None:
    with served.http() as http:
        assert http.get("/v2/nothing").json()["error"]["code"] == "not_found"
        assert http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"

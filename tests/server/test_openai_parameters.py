"""Every parameter in the official client's types: its default is accepted, what would change the answer is refused."""

from __future__ import annotations

import typing
from typing import Any

import openai.types.chat as types
import pytest
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served
from tests.server.fake_engine import VALID
from tunesmith.server.answering.request import ChatMessage, ChatRequest, StreamOptions

DEFAULTS: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "function_call": "none",
    "verbosity": "medium", "service_tier": "auto", "reasoning_effort": "low", "safety_identifier": "u1",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {}, "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "x"}, "store": True,
    "tool_choice": "none", "parallel_tool_calls": True,
    "n": 1, "user": "u", "stream": False, "top_p": 1, "logprobs": False, "response_format": {"type": "text"},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"5": 1}, "modalities": ["text", "audio"],
    "function_call": "auto", "functions": [{"name": "f"}], "audio": {"voice": "alloy", "format": "mp3"},
    "moderation": {"model": "m"}, "web_search_options": {}, "verbosity": "low", "n": 2,
}  # fmt: skip


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


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(shared: Served, name: str) -> None:
    response = shared.post(**{name: REFUSED[name]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_an_answer_can_be_sent_back_and_a_developer_speaks_for_the_system(served: Served) -> None:
    client: Any = served.client().chat.completions
    first = client.create(model=NAME, messages=HELLO).choices[0].message
    told = {"role": "developer", "content": "Be brief.", "name": "ops"}
    for sent in (first, first.model_dump(), {**first.model_dump(), "annotations": []}):
        asked = [told, *HELLO, sent, {"role": "user", "content": "again", "name": "ann"}]
        assert client.create(model=NAME, messages=asked).choices[0].message.content == VALID
    assert [turn.role for turn in served.engine.seen[-1].messages][-4:] == ["system", "user", "assistant", "user"]

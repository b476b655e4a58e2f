"""The response objects of the chat completions API, as OpenAI defines them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ApiObject(BaseModel):
    """An object of the API."""

    model_config = ConfigDict(frozen=True)

    def json_text(self) -> str:
        """The object as JSON, with the keys that were given."""
        return self.model_dump_json(exclude_unset=True)


class Model(ApiObject):
    """A model that the caller may use. id: NAME@champion or NAME@v3. created: when its version was registered."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(ApiObject):
    """The models that the caller may use now."""

    object: Literal["list"]
    data: list[Model]


class Alternative(ApiObject):
    """A likely token at one position. bytes: of its text, because one character may span several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    """A token of the answer, and the likeliest tokens at its position."""

    top_logprobs: list[Alternative]


class Logprobs(ApiObject):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class Usage(ApiObject):
    """Number of tokens of the prompt, including what the candidate adds to the request, and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(ApiObject):
    """A function's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


class AnswerCall(ApiObject):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(ApiObject):
    """The answer. content: null where it only calls functions. refusal: always null."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerCall] | None = None


class Choice(ApiObject):
    """The one answer to a request. finish_reason: stop, tool_calls, or length if it reached max_tokens."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(ApiObject):
    """A whole answer. model: the version that answered; system_fingerprint: the start of its digest."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    metadata: dict[str, str] | None = None


class DeltaCall(AnswerCall):
    """A call in a streamed answer, sent whole. index: its place among the answer's calls."""

    index: int


class Delta(ApiObject):
    """The next piece of a streamed answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[DeltaCall] | None = None


class ChunkChoice(ApiObject):
    """The one choice of a chunk. finish_reason: only in the last chunk."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletionChunk(ApiObject):
    """A piece of a streamed answer. usage: in a last chunk without choices, if stream_options.include_usage is set."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    metadata: dict[str, str] | None = None

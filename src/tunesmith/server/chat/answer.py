"""The response objects of the chat completions API, as OpenAI defines them, and what builds those of one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from tunesmith.core.clock import now
from tunesmith.core.digests import short
from tunesmith.core.messages import ToolCall
from tunesmith.engines.protocol import Completion, TokenScore
from tunesmith.server.answering.job import ChatJob

ID_PREFIX = "chatcmpl-"
_CHUNK: Final = "chat.completion.chunk"


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


class ResponseBuilder:
    """Builds the response objects of one job. scored: with the log-probabilities of the answer's tokens."""

    def __init__(self, job: ChatJob) -> None:
        self._job, self._version = job, job.route.version
        self.scored = bool(job.request.logprobs)
        self._common: dict[str, Any] = {
            "id": ID_PREFIX + job.id,
            "created": int(now().timestamp()),
            "model": self._version.label,
            "system_fingerprint": short(self._version.digest),
        }

    def headers(self) -> dict[str, str]:
        """The response headers: the version, its arm, and the retrieved sources (percent-encoded names)."""
        headers = {
            "x-request-id": self._job.id,
            "x-tunesmith-version": self._version.label,
            "x-tunesmith-arm": self._job.route.arm,
            "x-tunesmith-system-prompt": self._job.prompt_used,
        }
        if self._job.sources:
            headers["x-tunesmith-sources"] = ", ".join(quote(source, safe="/") for source in self._job.sources)
        return headers

    def whole(self, completion: Completion) -> ChatCompletion:
        """The answer as one object."""
        scores = completion.scores if self.scored else None
        text, calls, finish = self._said(completion)
        more: dict[str, Any] = {"tool_calls": [AnswerCall(**_call(call)) for call in calls]} if calls else {}
        content = None if calls and not text else text
        message = AnswerMessage(role="assistant", content=content, refusal=None, **more)
        choice = Choice(index=0, message=message, logprobs=_logprobs(scores), finish_reason=finish)
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[choice],
            usage=_usage(completion),
            **self._metadata(),
        )

    def chunk(self, delta: Delta, finish: str | None = None, scores: Sequence[TokenScore] | None = None) -> str:
        """A chunk as a server-sent event. The last one has the request's metadata."""
        choice = ChunkChoice(index=0, delta=delta, logprobs=_logprobs(scores), finish_reason=finish)
        more: dict[str, Any] = {"usage": None} if self._job.request.include_usage else {}
        more |= self._metadata() if finish else {}
        return event_text(ChatCompletionChunk(**self._common, object=_CHUNK, choices=[choice], **more).json_text())

    def ending(self, completion: Completion) -> Iterator[str]:
        """The chunks that end a streamed answer: withheld text, each call whole, and the reason why it ends."""
        text, calls, finish = self._said(completion)
        if text and self._job.answer is not None:
            yield self.chunk(Delta(content=text))
        for place, call in enumerate(calls):
            yield self.chunk(Delta(tool_calls=[DeltaCall(index=place, **_call(call))]))
        yield self.chunk(Delta(), finish=finish)

    def _said(self, completion: Completion) -> tuple[str, tuple[ToolCall, ...], str]:
        """(text, calls, finish_reason). Without tools the text is the whole answer; with them, what was not sent."""
        if self._job.answer is None:
            return completion.text, (), completion.finish
        return self._job.answer.end(completion)

    def usage_chunk(self, completion: Completion) -> str:
        """The chunk without choices that stream_options.include_usage asks for."""
        chunk = ChatCompletionChunk(**self._common, object=_CHUNK, choices=[], usage=_usage(completion))
        return event_text(chunk.json_text())

    def _metadata(self) -> dict[str, Any]:
        return {} if self._job.request.metadata is None else {"metadata": self._job.request.metadata}


def _usage(completion: Completion) -> Usage:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def _logprobs(scores: Sequence[TokenScore] | None) -> Logprobs | None:
    if scores is None:
        return None

    def one(score: TokenScore) -> dict[str, Any]:
        return {"token": score.token, "logprob": score.logprob, "bytes": list(score.data)}

    content = [
        TokenLogprob(**one(score), top_logprobs=[Alternative(**one(other)) for other in score.top]) for score in scores
    ]
    return Logprobs(content=content, refusal=None)


def _call(call: ToolCall) -> dict[str, Any]:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return {"id": call.id, "type": "function", "function": function}


def event_text(text: str) -> str:
    """A server-sent event."""
    return f"data: {text}\n\n"

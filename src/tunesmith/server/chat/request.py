"""The body of a chat completion request: the fields of OpenAI's API that the server supports. It refuses others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from tunesmith.core.messages import Message
from tunesmith.server.intake import limits

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP)]
MetadataKey = Annotated[str, Field(max_length=limits.METADATA_KEY)]
MetadataText = Annotated[str, Field(max_length=limits.METADATA_TEXT)]


class TextPart(BaseModel):
    """A text part of a message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. content: text, or a list of text parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=limits.PARTS)]

    def plain(self) -> Message:
        """The message with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


class StreamOptions(BaseModel):
    """Options of a stream. include_usage: send a last chunk with the token counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: StrictBool = False


class ResponseFormat(BaseModel):
    """The format of the answer: only text, because the decoder does not enforce others on request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str

    @field_validator("type")
    @classmethod
    def _supported(cls, value: str) -> str:
        if value != "text":
            raise ValueError(f"only 'text' is supported, not {value[:40]!r}")
        return value


class ChatRequest(BaseModel):
    """A chat completion request. A field that is null has its default.

    temperature is 0 by default, so that equal requests get equal answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=limits.MODEL)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MESSAGES)]
    max_tokens: Annotated[StrictInt | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[StrictInt | None, Field(ge=1)] = None
    temperature: Annotated[Number | None, Field(ge=0, le=2)] = None
    top_p: Annotated[Number | None, Field(gt=0, le=1)] = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt | None, Field(ge=0, le=20)] = None
    seed: Annotated[StrictInt | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.STOPS)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    user: Annotated[str | None, Field(max_length=limits.USER)] = None
    metadata: Annotated[dict[MetadataKey, MetadataText], Field(max_length=limits.METADATA)] | None = None
    response_format: ResponseFormat | None = None

    @field_validator("messages")
    @classmethod
    def _has_user_message(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        if not any(message.role == "user" for message in value):
            raise ValueError("there is no user message to answer")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        """Refuse what pydantic would name by its union's members, and before it reads each item of a long list."""
        given = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        few = len(given) <= limits.STOPS
        if not few or not all(isinstance(one, str) and 0 < len(one) <= limits.STOP for one in given):
            raise ValueError(f"at most {limits.STOPS} texts, each of 1 to {limits.STOP} characters")
        return value

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("only one answer is given")
        return value

    @field_validator("metadata", mode="before")
    @classmethod
    def _small(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limits.METADATA:
            raise ValueError(f"at most {limits.METADATA} pairs")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens disagree")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs without logprobs")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream")
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages, with their parts joined."""
        return tuple(message.plain() for message in self.messages)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def scored(self) -> int | None:
        """Number of likeliest tokens to return for each position; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

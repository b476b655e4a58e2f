"""The body of a chat completion request: the fields of OpenAI's API that the server supports. It refuses others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, StrictBool, StrictInt, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from tunesmith.candidates.grammars.request_schemas import ANY_OBJECT, call_grammar, check_schema
from tunesmith.core.messages import Message, ToolCall, with_tools
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.values import Frozen, Schema
from tunesmith.models.call_format import CallFormat
from tunesmith.server import limits
from tunesmith.server.errors import INVALID_SCHEMA

Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP)]
MetadataKey = Annotated[str, Field(max_length=limits.METADATA_KEY)]
MetadataText = Annotated[str, Field(max_length=limits.METADATA_TEXT)]


@dataclass(frozen=True)
class Only:
    """A field of OpenAI's API that is accepted where it means the default, null or one of these values, and refused
    where it would change the answer."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> JsonObject:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> None:
        if value is not None and not any(value == one and type(value) is not bool for one in self.values):
            known = " or ".join(json.dumps(one) for one in (None, *self.values))
            raise ValueError(f"not supported: only {known}")


# What OpenAI's service does with these does not change an answer here: no model reasons, and nothing is billed.
Ignored = Annotated[str | None, Field(max_length=limits.USER)]


class Function(Frozen):
    """A function that the model may call. parameters: JSON Schema of its arguments. strict: whether arguments are held
    to it; where the request forces a call, they are in any case."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None
    _order: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _in_its_order(cls, value: Any, handler: Callable[[Any], Function]) -> Function:
        function = handler(value)
        function._order = tuple(value)
        if function.strict and function.parameters is not None:
            try:
                check_schema(function.parameters, strict=True)
            except ValueError as error:
                said = f"Invalid schema for function {function.name!r}: {error}"
                raise PydanticCustomError(INVALID_SCHEMA, "{said}", {"said": said}) from None
        return function

    def declared(self) -> JsonObject:
        """The function as it was given, with its keys in that order, since the model sees it."""
        return {key: value for key in self._order if (value := getattr(self, key)) is not None}


class Tool(Frozen):
    """A tool: functions alone."""

    type: Literal["function"]
    function: Function


class FunctionName(Frozen):
    """The name of a function."""

    name: Name


class NamedChoice(Frozen):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(Frozen):
    """A function's name and its arguments, a JSON object as text."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        parsed = parse_json(value)  # a ValueError where it is broken
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
        return json.dumps(parsed, ensure_ascii=False)


class Call(Frozen):
    """A call of a function by the assistant."""

    id: str = Field(min_length=1, max_length=limits.CALL_ID)
    type: Literal["function"]
    function: FunctionCall

    def plain(self) -> ToolCall:
        """The call in our own form."""
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class TextPart(Frozen):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Frozen):
    """One message. content: text, or a list of text parts; an assistant's may be null or left out where it has
    tool_calls. tool_call_id: of a tool's message, the call that it answers. developer: means system. name: of the
    speaker, which no template writes. refusal, annotations, audio and function_call: as in answers, so that one can be
    sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=limits.PARTS)]
    tool_calls: list[Call] | None = Field(default=None, min_length=1, max_length=limits.CALLS)
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=limits.CALL_ID)
    name: Ignored = None
    refusal: None = None
    annotations: Annotated[Any, Only(([],))] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None

    @model_validator(mode="before")
    @classmethod
    def _calls_without_text(cls, value: Any) -> Any:
        calls = isinstance(value, dict) and value.get("role") == "assistant" and value.get("tool_calls")
        return {**value, "content": ""} if calls and value.get("content") is None else value

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message has a tool_call_id, and no other message has one")
        return self

    def plain(self) -> Message:
        """The message with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        calls = tuple(call.plain() for call in self.tool_calls or ())
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=text, tool_calls=calls, tool_call_id=self.tool_call_id)


class StreamOptions(Frozen):
    """Options of a stream. include_usage: send a last chunk with the token counts. include_obfuscation: has no effect,
    since nothing is added to hide the lengths of tokens."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None


class JsonSchema(Frozen):
    """A schema that the answer must fit. It is held whatever strict says; true also refuses what OpenAI's subset of
    JSON Schema does not have. name and description have no effect."""

    name: Name
    description: str | None = Field(default=None, max_length=limits.DESCRIPTION)
    schema_: Annotated[JsonObject, Field(alias="schema")]
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _can_be_held(self) -> JsonSchema:
        try:
            check_schema(self.schema_, strict=bool(self.strict))
        except ValueError as error:
            raise PydanticCustomError(
                INVALID_SCHEMA, "{said}", {"said": f"Invalid schema for response_format {self.name!r}: {error}"}
            ) from None
        return self


class ResponseFormat(Frozen):
    """The format of the answer: text as it comes, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is given with the type 'json_schema', and only there")
        return self


class ChatRequest(Frozen):
    """A chat completion request. A field that is null has its default.

    temperature is 0 by default: the likeliest token is taken. Equal requests then get equal answers, unless rounding
    decides between two tokens, as sums can differ in the last bit with the requests that are computed together. store:
    keep the texts of this request for a review if it fails or feedback says that its answer is wrong, where the
    server's project allows that; else nothing is kept, and the header x-tunesmith-store says "no".
    """

    model: str = Field(min_length=1, max_length=limits.MODEL)
    messages: list[ChatMessage] = Field(min_length=1, max_length=limits.MESSAGES)
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.STOPS)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    user: str | None = Field(default=None, max_length=limits.USER)
    metadata: Annotated[dict[MetadataKey, MetadataText], Field(max_length=limits.METADATA)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, min_length=1, max_length=limits.TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    store: StrictBool | None = None
    frequency_penalty: Annotated[Any, Only((0,))] = None
    presence_penalty: Annotated[Any, Only((0,))] = None
    logit_bias: Annotated[Any, Only(({},))] = None
    modalities: Annotated[Any, Only((["text"],))] = None
    function_call: Annotated[Any, Only(("none",))] = None
    functions: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only(("medium",))] = None
    service_tier: Ignored = None
    reasoning_effort: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: JsonObject | None = None
    prediction: JsonObject | None = None

    @field_validator("messages")
    @classmethod
    def _has_user_message(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        if not any(message.role == "user" for message in value):
            raise ValueError("there is no user message to answer")
        called: set[str] = set()
        for place, message in enumerate(value):
            called.update(call.id for call in message.tool_calls or ())
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(f"message {place} answers a call that no message before it makes")
        return value

    @field_validator("tools")
    @classmethod
    def _differ(cls, value: list[Tool] | None) -> list[Tool] | None:
        if value is not None and len({tool.function.name for tool in value}) < len(value):
            raise ValueError("two functions have the same name")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named and value not in (None, "none", "auto", "required"):
            call = '{"type": "function", "function": {"name"}}'
            raise ValueError(f"it must be 'none', 'auto', 'required' or {call}")
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
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        if self.tools is None and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a call, and there are no tools")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        if named is not None and named not in {tool.function.name for tool in self.tools or ()}:
            raise ValueError(f"tool_choice names {named!r}, which is not among the tools")
        if self.offered and self.answer_schema is not None:
            raise ValueError("tools and a response_format of JSON together are not supported; send tool_choice: none")
        if self.offered and self.logprobs:
            raise ValueError("logprobs and tools together are not supported")

    @cached_property
    def conversation(self) -> tuple[Message, ...]:
        """The messages, with their parts joined and the offered tools."""
        messages = tuple(message.plain() for message in self.messages)
        offered = [{"type": "function", "function": function.declared()} for function in self.offered]
        return with_tools(messages, offered) if offered else messages

    @property
    def offered(self) -> tuple[Function, ...]:
        """The functions that the model is shown: all, or none with tool_choice: none."""
        return () if self.tool_choice == "none" else tuple(tool.function for tool in self.tools or ())

    @property
    def callable(self) -> tuple[Function, ...]:
        """The functions that may be called: the offered ones, or the one that tool_choice names."""
        if not isinstance(self.tool_choice, NamedChoice):
            return self.offered
        name = self.tool_choice.function.name
        return tuple(function for function in self.offered if function.name == name)

    def grammar_of_calls(self, form: CallFormat) -> str | None:
        """The grammar that holds the answer to calls; None where they are only read out of it.

        Raises UsageError where the tools cannot be held.
        """
        if not self.callable:
            return None
        named = isinstance(self.tool_choice, NamedChoice)
        forced = named or self.tool_choice == "required"
        single = self.parallel_tool_calls is False
        if not (forced or single or any(function.strict for function in self.callable)):
            return None
        functions = [function.model_dump() for function in self.callable]
        return call_grammar(form, functions, forced=forced, several=not single and not named)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def scored(self) -> int | None:
        """Number of likeliest tokens to return for each position; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_schema(self) -> Schema | None:
        """The JSON Schema that the answer must fit; None for text."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        return ANY_OBJECT if asked.json_schema is None else asked.json_schema.schema_

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

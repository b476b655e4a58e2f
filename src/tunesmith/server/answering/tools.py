"""Functions that a request offers, calls of them in its conversation, and calls in the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, StrictBool, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tunesmith.candidates.grammars.request_schemas import check_schema
from tunesmith.core.messages import ToolCall
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.engines.protocol import Completion
from tunesmith.models.call_format import CallFormat
from tunesmith.server import limits
from tunesmith.server.errors import INVALID_SCHEMA

Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(limits.Given):
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


class Tool(limits.Given):
    """A tool: functions alone."""

    type: Literal["function"]
    function: Function


class FunctionName(limits.Given):
    """The name of a function."""

    name: Name


class NamedChoice(limits.Given):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(limits.Given):
    """A function's name and its arguments, a JSON object as text."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        found = parse_json(value)  # a ValueError where it is broken
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        return json.dumps(found, ensure_ascii=False)


class Call(limits.Given):
    """A call of a function by the assistant."""

    id: Annotated[str, Field(min_length=1, max_length=limits.CALL_ID)]
    type: Literal["function"]
    function: FunctionCall

    def plain(self) -> ToolCall:
        """The call in our own form."""
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class ToolAnswer:
    """What an answer to a request with tools says: text, and calls of the functions that it offers.

    form: how the base writes calls. names: of the functions that may be called.
    """

    def __init__(self, form: CallFormat, names: frozenset[str]) -> None:
        self._form, self._names = form, names
        self._text, self._sent = "", 0

    def feed(self, piece: str) -> str:
        """The text that is sure to be no call, after the next piece of a streamed answer."""
        self._text += piece
        start, self._sent = self._sent, max(self._sent, self._form.may_begin(self._text))
        return self._text[start : self._sent]

    def end(self, completion: Completion) -> tuple[str, tuple[ToolCall, ...], str]:
        """(text that was not sent yet, calls, finish_reason) of the whole answer."""
        text, calls = self._form.read(completion.text, self._names)
        finish = "tool_calls" if calls and completion.finish == "stop" else completion.finish
        return text[self._sent :], calls, finish

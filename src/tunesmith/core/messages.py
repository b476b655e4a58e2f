"""A conversation's turn, in our own form and in OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from tunesmith.core.reading.strict_json import Fields, JsonObject, parse_json
from tunesmith.core.values import Frozen

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(Frozen):
    """The assistant's call of a function. arguments: a JSON object as text, its keys in the order they were given."""

    id: str
    name: str
    arguments: str


class Message(Frozen):
    """One turn.

    tool_calls: of an assistant's turn. tool_call_id: of a tool's turn, the call it answers. weight: 0 for an
    assistant's turn that is shown and not learned. tools: on the first turn alone, the functions that may be called, as
    JSON text: a list of {"type": "function", "function": {...}}. Text, because the order of its keys is what a model
    sees. What a turn has none of is not written, so a plain turn is {"role", "content"} wherever it is kept.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    weight: Literal[0, 1] = 1
    tools: str | None = None

    @model_serializer(mode="wrap")
    def _what_it_has(self, write: SerializerFunctionWrapHandler) -> JsonObject:
        fields = type(self).model_fields
        return {key: value for key, value in write(self).items() if getattr(self, key) != fields[key].default}

    @property
    def text(self) -> str:
        """All that the turn says: its content, then its calls as JSON, one object or a list of several."""
        if not self.tool_calls:
            return self.content
        calls = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in self.tool_calls]
        said = calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
        return f"{self.content}\n{said}" if self.content else said

    def texts(self) -> Iterator[str]:
        """Every text of the turn that came out of a row, each by itself, without ids."""
        yield self.content
        for call in self.tool_calls:
            yield call.name
            yield call.arguments
        if self.tools is not None:
            yield self.tools

    def shown_texts(self) -> Iterator[str]:
        """Every text of the turn as a chat template shows it: JSON is read first, so that no escape hides a text."""
        yield from self.texts()
        yield from self.ids()
        for written in (*(call.arguments for call in self.tool_calls), self.tools):
            if written is not None:
                yield json.dumps(parse_json(written), ensure_ascii=False)

    def control_token(self, tokens: Collection[str]) -> str | None:
        """The first of these tokens that a text of the turn holds, if any."""
        return next((token for token in tokens if any(token in text for text in self.shown_texts())), None)

    def openai(self) -> JsonObject:
        """The turn in OpenAI's form. Its tools are not part of it: they go beside the messages (`tools_of`)."""
        turn: JsonObject = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["content"] = self.content or None
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    def ids(self) -> Iterator[str]:
        """The ids of the turn's calls and of the call that it answers: free text too, which some templates show."""
        yield from (call.id for call in self.tool_calls)
        if self.tool_call_id is not None:
            yield self.tool_call_id


Conversation = Sequence[Message]
Turns = tuple[Message, ...]  # a conversation as it is kept
# (messages, most) -> the number of tokens they render to; where there are more than `most`, some number above it.
CountTokens = Callable[[Conversation, int], int]


def tools_of(messages: Conversation) -> list[Fields]:
    """The functions that may be called in a conversation, as OpenAI's `tools`."""
    return [tool for message in messages if message.tools is not None for tool in parse_json(message.tools)]


def with_tools(messages: Conversation, tools: Sequence[Fields]) -> Turns:
    """The messages with these tools on the first of them, and on no other."""
    written = json.dumps(list(tools), ensure_ascii=False) if tools else None
    return tuple(
        message if message.tools == own else message.model_copy(update={"tools": own})
        for message, own in zip(messages, [written, *[None] * (len(messages) - 1)], strict=True)
    )

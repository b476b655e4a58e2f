"""Turns of a row, the checks that they must pass, and the conversation that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tunesmith.core.messages import Message, Role, ToolCall, with_tools
from tunesmith.core.reading.strict_json import Fields

# Why a row is removed, as the record says it.
NO_ANSWER: Final = "no assistant turn at the end"
EMPTY_ANSWER: Final = "empty assistant turn"
EMPTY_REQUEST: Final = "empty user turn"
SYSTEM_TURNS: Final = "system turn not first or more than one"
OUT_OF_ORDER: Final = "roles out of order"
UNANSWERED: Final = "tool turns do not answer the calls before them"
UNDECLARED: Final = "calls a tool that the row does not declare"
NOT_TO_LEARN: Final = "every answer marked with weight 0"
# Counted among the ignored keys.
AFTER_THE_LAST: Final = "messages[] after the last one to learn"


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn before the checks. answers: the id of the call that a tool turn answers. tools: on the first turn only."""

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()
    answers: str | None = None
    weight: Literal[0, 1] = 1
    tools: tuple[Fields, ...] = ()


def objection(turns: Sequence[Turn]) -> str | None:
    """Why a row with these turns is removed; None for a usable conversation.

    A usable conversation has at most one system turn, which comes first; then user and assistant turns alternate and
    the assistant's is last. Each tool call is answered by one tool turn, after which the assistant continues. Only tool
    turns and turns with calls may be empty. At least one assistant turn has weight 1.
    """
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if any(turn.role == "system" for turn in spoken):
        return SYSTEM_TURNS
    if not spoken or spoken[-1].role != "assistant":
        return NO_ANSWER
    if (reason := _disorder(spoken)) is not None:
        return reason
    empty = next((turn for turn in spoken if not (turn.content.strip() or turn.calls or turn.role == "tool")), None)
    if empty is not None:
        return EMPTY_ANSWER if empty.role == "assistant" else EMPTY_REQUEST
    declared = {tool["function"]["name"] for tool in turns[0].tools}
    if declared and any(call.name not in declared for turn in spoken for call in turn.calls):
        return UNDECLARED
    return None if any(turn.role == "assistant" and turn.weight for turn in spoken) else NOT_TO_LEARN


def _disorder(spoken: Sequence[Turn]) -> str | None:
    """What is wrong with the order of the turns that follow the system turn."""
    expected, waiting = "user", set[str]()
    for turn in spoken:
        if waiting or turn.role == "tool":
            if turn.role != "tool" or turn.answers not in waiting:
                return UNANSWERED
            waiting.discard(turn.answers)
            continue
        if turn.role != expected:
            return OUT_OF_ORDER
        waiting = {call.id for call in turn.calls}
        if len(waiting) != len(turn.calls):
            return UNANSWERED  # one id for two calls
        expected = "assistant" if turn.role == "user" or turn.calls else "user"
    return None


def conversation(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The messages of usable turns, up to the last turn with weight 1: training learns nothing from later ones.

    An empty system turn is left out.
    """
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.weight), default=0)
    said = [turn for turn in turns[: last + 1] if turn.content or turn.role != "system"]
    messages = [
        Message(
            role=turn.role,
            content=turn.content,
            tool_calls=turn.calls,
            tool_call_id=turn.answers,
            weight=turn.weight if turn.role == "assistant" else 1,
        )
        for turn in said
    ]
    tools = turns[0].tools if turns else ()
    return with_tools(messages, tools) if tools else tuple(messages)


def ends_unlearned(turns: Sequence[Turn]) -> bool:
    """Whether usable turns continue after the last one with weight 1."""
    return turns[-1].weight == 0

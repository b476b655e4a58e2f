"""The checks that the turns of a row must pass, and the conversation that they become."""

from __future__ import annotations

from typing import Final

from tunesmith.core.messages import Conversation, Turns, tools_of, with_tools

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


def objection(turns: Conversation) -> str | None:
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
    if reason := _disorder(spoken):
        return reason
    empty = next(
        (turn for turn in spoken if not (turn.content.strip() or turn.tool_calls or turn.role == "tool")), None
    )
    if empty is not None:
        return EMPTY_ANSWER if empty.role == "assistant" else EMPTY_REQUEST
    declared = {tool["function"]["name"] for tool in tools_of(turns[:1])}
    if declared and any(call.name not in declared for turn in spoken for call in turn.tool_calls):
        return UNDECLARED
    return None if any(turn.role == "assistant" and turn.weight for turn in spoken) else NOT_TO_LEARN


def _disorder(spoken: Conversation) -> str | None:
    """What is wrong with the order of the turns that follow the system turn."""
    expected, waiting = "user", set[str]()
    for turn in spoken:
        if waiting or turn.role == "tool":
            if turn.role != "tool" or turn.tool_call_id not in waiting:
                return UNANSWERED
            waiting.discard(turn.tool_call_id)
            continue
        if turn.role != expected:
            return OUT_OF_ORDER
        waiting = {call.id for call in turn.tool_calls}
        if len(waiting) != len(turn.tool_calls):
            return UNANSWERED  # one id for two calls
        expected = "assistant" if turn.role == "user" or turn.tool_calls else "user"
    return None


def conversation(turns: Conversation) -> Turns:
    """The messages of usable turns, up to the last turn with weight 1: training learns nothing from later ones.

    An empty system turn is left out.
    """
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.weight), default=0)
    said = [turn for turn in turns[: last + 1] if turn.content or turn.role != "system"]
    return with_tools(said, tools_of(turns[:1]))

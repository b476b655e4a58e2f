"""The formats that rows may have, and how a row of each becomes turns.

A row that does not fit its format (a missing key, a wrong type, an unknown role, two formats in one source) is an
error that names the place. A row that fits but holds no usable conversation is removed with one of REASONS, and
counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, Role, ToolCall, with_tools
from tunesmith.data.formats.openai_rules import require_openai
from tunesmith.data.formats.tool_calls import made_id, read_call, read_calls, read_tools
from tunesmith.data.sources.files import Row

NO_ANSWER: Final = "no assistant turn at the end"
EMPTY_ANSWER: Final = "empty assistant turn"
EMPTY_REQUEST: Final = "empty user turn"
SYSTEM_TURNS: Final = "system turn not first or more than one"
OUT_OF_ORDER: Final = "roles out of order"
UNANSWERED: Final = "tool turns do not answer the calls before them"
UNDECLARED: Final = "calls a tool that the row does not declare"
NOT_TO_LEARN: Final = "every answer marked with weight 0"
REASONS = (
    NO_ANSWER, EMPTY_ANSWER, EMPTY_REQUEST, SYSTEM_TURNS, OUT_OF_ORDER, UNANSWERED, UNDECLARED, NOT_TO_LEARN
)  # fmt: skip
AFTER_THE_LAST: Final = "messages[] after the last one to learn"


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn before it is judged. answers: of a tool's turn, the id of the call; tools: on the first turn alone."""

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()
    answers: str | None = None
    weight: Literal[0, 1] = 1
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A format: the keys that tell it, the further ones it reads, and how its rows become turns.

    read takes the row's fields, the place for errors, and a counter for keys inside turns that mean nothing here.
    """

    name: str
    needs: frozenset[str]
    also: frozenset[str]
    read: Callable[[Mapping[str, Any], str, Counter[str]], list[Turn]]


def format_of(name: str, row: Row) -> RowFormat:
    """The row_format told by name, or detected from the row's keys where name is "auto".

    Raises UsageError for neither, and for rows of preferences, which are not learned from by imitation.
    """
    if (keys := _preference(row.fields)) is not None:
        raise UsageError(
            f"the row states preferences ({keys}), and only supervised fine-tuning is done here",
            where=row.where,
            fix="make rows of the preferred answers alone: a request and its answer",
        )
    if name != "auto":
        return FORMATS.get(name, OPENAI)
    fitting = [row_format for row_format in FORMATS.values() if row_format.needs <= row.fields.keys()]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{row_format.name}: {', '.join(sorted(row_format.needs))}" for row_format in FORMATS.values())
    what = "fits several formats" if fitting else "fits no known format"
    raise UsageError(
        f"a row with the keys {', '.join(sorted(row.fields)) or '(none)'} {what}",
        where=row.where,
        fix=f"set the source's format or rename, with `init` --rename KEY=NAME ({known})",
    )


def evidence(name: str, *, told: bool) -> str:
    """How a source's format is known, for a person to judge. Every row was held to it."""
    if told:
        return "told by the settings"
    row_format = FORMATS[name]
    others = ", ".join(other.name for other in FORMATS.values() if other is not row_format)
    return f"every row has {' and '.join(sorted(row_format.needs))}, the first fits no other format ({others})"


def _preference(fields: Mapping[str, Any]) -> str | None:
    """The keys that make a row one of preferences: OpenAI's, those of DPO, those of KTO."""
    for keys in (("preferred_output", "non_preferred_output"), ("chosen", "rejected")):
        if all(key in fields for key in keys):
            return " and ".join(keys)
    judged = "completion" in fields and isinstance(fields.get("label"), bool)
    return "completion and a label of true or false" if judged else None


def read_turns(row: Row, row_format: RowFormat, ignored: Counter[str]) -> list[Turn]:
    """The row's turns. Raises UsageError with the row and key where it is not of the row_format.

    ignored: counts the keys inside turns that have no meaning here.
    """
    missing = row_format.needs - row.fields.keys()
    if missing:
        other = [known.name for known in FORMATS.values() if known.needs <= row.fields.keys()]
        raise UsageError(
            f"the row has no {', '.join(sorted(missing))}" + (f"; it looks like {other[0]}" if other else ""),
            where=row.where,
            fix=f"all rows of a source have one format, here {row_format.name}: move the others into another source",
        )
    return row_format.read(row.fields, row.where, ignored)


def objection(turns: Sequence[Turn]) -> str | None:
    """Why these turns are no conversation to learn from; None where they are one.

    A conversation is at most one system turn, first, then user and assistant in turns, the assistant last. Where the
    assistant calls tools, one turn answers each call and the assistant goes on. No turn is empty but a tool's and one
    that calls; at least one of the assistant's is to be learned.
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
    """What is wrong with the order of the turns after the system's."""
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
    """Turns without objection as messages, up to the last that is to be learned; an empty system turn is none.

    What follows the last turn to learn would be read by the training and teach nothing.
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
    """Whether turns without objection go on after the last that is to be learned."""
    return turns[-1].weight == 0


def text_of(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A string field. Raises UsageError for another type and for characters that no file should hold."""
    value = fields[key]
    if not isinstance(value, str):
        raise UsageError(f"{key} is a {type(value).__name__}, not text", where=f"{where}, {key}")
    return _sound(value, f"{where}, {key}")


def _sound(text: str, where: str) -> str:
    if "\0" in text:
        raise UsageError("the text holds a NUL character", where=where, fix="remove it: the file may be damaged")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError("the text holds half a surrogate pair", where=where, fix="correct it: it is no character")
    return text


_TURN_KEYS: Final = {"role", "content", "tool_calls", "function_call", "tool_call_id", "weight"}


def _messages(fields: Mapping[str, Any], where: str, ignored: Counter[str]) -> list[Turn]:
    """OpenAI's row_format: {"messages": [{"role", "content", "tool_calls", "tool_call_id", "weight"}], "tools"}."""
    turns: list[Turn] = []
    calls: list[ToolCall] = []
    for place, entry in _entries(fields, "messages", where):
        role = _role(entry.get("role"), _OPENAI_ROLES, f"{place}.role")
        unread = entry.keys() - _TURN_KEYS - ({"name"} if role == "tool" else set())
        ignored.update(f"messages[].{key}" for key in unread)
        content = _content(entry.get("content"), f"{place}.content")
        made: tuple[ToolCall, ...] = ()
        if entry.get("tool_calls"):
            made = read_calls(entry["tool_calls"], f"{place}.tool_calls", _sound, len(calls))
        elif entry.get("function_call"):
            made = (read_call(entry["function_call"], f"{place}.function_call", _sound, len(calls)),)
        if made and role != "assistant":
            raise UsageError(f"a {role} turn calls nothing", where=f"{place}.tool_calls")
        answers = _answered(entry, calls, turns, place) if role == "tool" else None
        calls.extend(made)
        turns.append(Turn(role, content, made, answers, _weight(entry, place)))
    return _with_tools(turns, fields, where)


def _openai(fields: Mapping[str, Any], where: str, ignored: Counter[str]) -> list[Turn]:
    require_openai(fields, where)
    return _messages(fields, where, ignored)


def _weight(entry: Mapping[str, Any], place: str) -> Literal[0, 1]:
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UsageError(f"weight is {weight!r}", where=f"{place}.weight", fix="0 or 1")
    return 0 if weight == 0 else 1


def _answered(entry: Mapping[str, Any], calls: Sequence[ToolCall], turns: Sequence[Turn], place: str) -> str:
    """The id of the call that a tool's turn answers: its own word, else the first call not yet answered."""
    told = entry.get("tool_call_id")
    if told is None:
        done = {turn.answers for turn in turns}
        return next((call.id for call in calls if call.id not in done), made_id(len(calls)))
    if not isinstance(told, str):
        raise UsageError(f"tool_call_id is a {type(told).__name__}, not text", where=f"{place}.tool_call_id")
    return _sound(told, f"{place}.tool_call_id")


def _with_tools(turns: list[Turn], fields: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns, the row's tools on the first of them."""
    named = [key for key in ("tools", "functions") if fields.get(key)]
    if len(named) > 1:
        raise UsageError("the row has both tools and functions", where=where, fix="leave functions out")
    several = any(len(turn.calls) > 1 for turn in turns)
    if fields.get("parallel_tool_calls") is False and several:
        raise UsageError(
            "a turn has several calls", where=f"{where}, parallel_tool_calls", fix="set it true, or divide"
        )
    if not named or not turns:
        return turns
    tools = read_tools(fields[named[0]], f"{where}, {named[0]}")
    return [replace(turns[0], tools=tuple(tools)), *turns[1:]]


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(text_of(part, "text", f"{where}[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise UsageError(f"content is a {type(content).__name__}, not text or text parts", where=where)
    return _sound(content, where)


def _sharegpt(fields: Mapping[str, Any], where: str, ignored: Counter[str]) -> list[Turn]:
    """{"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value"}], "system", "tools"}."""
    turns = _system(fields, where)
    calls: list[ToolCall] = []
    for place, entry in _entries(fields, "conversations", where):
        role = _role(entry.get("from"), _SHAREGPT_ROLES, f"{place}.from")
        ignored.update(f"conversations[].{key}" for key in entry.keys() - {"from", "value", "weight"})
        if "value" not in entry:
            raise UsageError("the turn has no value", where=place)
        text = text_of(entry, "value", place)
        made: tuple[ToolCall, ...] = ()
        if role == "call":
            made, text = _spoken_calls(text, f"{place}, value", len(calls)), ""
        answers = _answered({}, calls, turns, place) if role == "tool" else None
        calls.extend(made)
        turns.append(Turn("assistant" if role == "call" else role, text, made, answers, _weight(entry, place)))
    return _with_tools(turns, fields, where)


def _spoken_calls(text: str, where: str, first: int) -> tuple[ToolCall, ...]:
    """The calls in a turn's text: a JSON object, or a list of several."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the call is broken JSON: {error}", where=where, fix="correct the row") from None
    return read_calls(value if isinstance(value, list) else [value], where, _sound, first)


def _prompt_completion(fields: Mapping[str, Any], where: str, _ignored: Counter[str]) -> list[Turn]:
    request, answer = text_of(fields, "prompt", where), text_of(fields, "completion", where)
    return [*_system(fields, where), Turn("user", request), Turn("assistant", answer)]


def _alpaca(fields: Mapping[str, Any], where: str, _ignored: Counter[str]) -> list[Turn]:
    """{"instruction", "input", "output"}: the input, where there is one, follows the instruction after a blank line."""
    given = text_of(fields, "input", where) if "input" in fields else ""
    request = "\n\n".join(part for part in (text_of(fields, "instruction", where), given) if part.strip())
    return [*_system(fields, where), Turn("user", request), Turn("assistant", text_of(fields, "output", where))]


def _system(fields: Mapping[str, Any], where: str) -> list[Turn]:
    text = text_of(fields, "system", where) if "system" in fields else ""
    return [Turn("system", text)] if text.strip() else []


def _entries(fields: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    entries = fields[key]
    if not isinstance(entries, list):
        raise UsageError(f"{key} is a {type(entries).__name__}, not a list of turns", where=f"{where}, {key}")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UsageError("a turn is an object", where=f"{where}, {key}[{place}]")
    return [(f"{where}, {key}[{place}]", entry) for place, entry in enumerate(entries)]


_OPENAI_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}


def _role(name: Any, known: Mapping[str, Any], where: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"there is no role {name!r}", where=where, fix=f"one of {', '.join(sorted(known))}")
    return known[name]


def _format(name: str, needs: str, also: str, read: Callable[..., list[Turn]]) -> RowFormat:
    return RowFormat(name, frozenset(needs.split()), frozenset(also.split()), read)


# Told, never detected: its rows are messages too, held to that service's own rules.
OPENAI = _format("openai", "messages", "tools functions parallel_tool_calls", _openai)
FORMATS: dict[str, RowFormat] = {
    row_format.name: row_format
    for row_format in (
        _format("messages", "messages", "tools functions parallel_tool_calls", _messages),
        _format("prompt-completion", "prompt completion", "system", _prompt_completion),
        _format("alpaca", "instruction output", "input system", _alpaca),
        _format("sharegpt", "conversations", "system tools", _sharegpt),
    )
}

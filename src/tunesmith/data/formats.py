"""From a row of any known shape to a conversation.

A row that is not of the shape it should have (a key missing, a value of another type, an unknown role, two shapes in
one source) is an error with its place. A row that has the shape but holds no usable conversation is left out with one
of REASONS, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message, Role
from tunesmith.data.sources import Row

NO_ANSWER: Final = "no assistant turn at the end"
EMPTY_ANSWER: Final = "empty assistant turn"
EMPTY_REQUEST: Final = "empty user turn"
SYSTEM_TURNS: Final = "system turn not first or more than one"
OUT_OF_ORDER: Final = "roles out of order"
TOOL_CALLS: Final = "tool calls"
NOT_TO_LEARN: Final = "answer marked with weight 0"
REASONS = (NO_ANSWER, EMPTY_ANSWER, EMPTY_REQUEST, SYSTEM_TURNS, OUT_OF_ORDER, TOOL_CALLS, NOT_TO_LEARN)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn before it is judged."""

    role: Role
    content: str
    tool_call: bool = False
    weight: float = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A format: the keys that tell it, the further ones it reads, and how its rows become turns.

    read takes the row's fields, the place for errors, and a counter for keys inside turns that mean nothing here.
    """

    name: str
    needs: frozenset[str]
    also: frozenset[str]
    read: Callable[[Mapping[str, Any], str, Counter[str]], list[Turn]]


def shape_of(name: str, row: Row) -> Shape:
    """The shape told by name, or detected from the row's keys where name is "auto". Raises UsageError for neither."""
    if name != "auto":
        return SHAPES[name]
    fitting = [shape for shape in SHAPES.values() if shape.needs <= row.fields.keys()]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{shape.name}: {', '.join(sorted(shape.needs))}" for shape in SHAPES.values())
    what = "fits several formats" if fitting else "fits no known format"
    raise UsageError(
        f"a row with the keys {', '.join(sorted(row.fields)) or '(none)'} {what}",
        where=row.where,
        fix=f"set the source's format or rename ({known})",
    )


def read_turns(row: Row, shape: Shape, ignored: Counter[str]) -> list[Turn]:
    """The row's turns. Raises UsageError with the row and key where it is not of the shape.

    ignored: counts the keys inside turns that have no meaning here.
    """
    missing = shape.needs - row.fields.keys()
    if missing:
        other = [known.name for known in SHAPES.values() if known.needs <= row.fields.keys()]
        raise UsageError(
            f"the row has no {', '.join(sorted(missing))}" + (f"; it looks like {other[0]}" if other else ""),
            where=row.where,
            fix=f"all rows of a source have one shape, here {shape.name}: put others into a source of their own",
        )
    return shape.read(row.fields, row.where, ignored)


def objection(turns: Sequence[Turn]) -> str | None:
    """Why these turns are no conversation to learn from; None where they are one.

    A conversation is at most one system turn, first, then user and assistant in turns, the assistant last; no turn is
    empty; the last is not marked as not to be learned.
    """
    if any(turn.tool_call for turn in turns):
        return TOOL_CALLS
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if any(turn.role == "system" for turn in spoken):
        return SYSTEM_TURNS
    if not spoken or spoken[-1].role != "assistant":
        return NO_ANSWER
    if any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(spoken)):
        return OUT_OF_ORDER
    empty = next((turn for turn in spoken if not turn.content.strip()), None)
    if empty is not None:
        return EMPTY_ANSWER if empty.role == "assistant" else EMPTY_REQUEST
    return NOT_TO_LEARN if spoken[-1].weight == 0 else None


def conversation(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Turns without objection as messages; a system turn without content is none."""
    return tuple(Message(role=turn.role, content=turn.content) for turn in turns if turn.content)


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


def _messages(fields: Mapping[str, Any], where: str, ignored: Counter[str]) -> list[Turn]:
    """OpenAI's shape: {"messages": [{"role", "content"}]}."""
    turns = []
    for place, entry in _entries(fields, "messages", where):
        role = _role(entry.get("role"), _OPENAI_ROLES, f"{place}.role")
        ignored.update(f"messages[].{key}" for key in entry.keys() - {"role", "content", "tool_calls", "weight"})
        weight = entry.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UsageError(f"weight is {weight!r}", where=f"{place}.weight", fix="0 or 1")
        tool_call = bool(entry.get("tool_calls")) or role == "tool"
        turns.append(Turn(_as_role(role), _content(entry.get("content"), f"{place}.content"), tool_call, weight))
    return turns


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(text_of(part, "text", f"{where}[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise UsageError(f"content is a {type(content).__name__}, not text or text parts", where=where)
    return _sound(content, where)


def _sharegpt(fields: Mapping[str, Any], where: str, ignored: Counter[str]) -> list[Turn]:
    """{"conversations": [{"from": "human" | "gpt" | "system", "value"}], "system"}."""
    turns = _system(fields, where)
    for place, entry in _entries(fields, "conversations", where):
        role = _role(entry.get("from"), _SHAREGPT_ROLES, f"{place}.from")
        ignored.update(f"conversations[].{key}" for key in entry.keys() - {"from", "value"})
        if "value" not in entry:
            raise UsageError("the turn has no value", where=place)
        turns.append(Turn(_as_role(role), text_of(entry, "value", place), role == "tool"))
    return turns


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
    "function_call": "tool",
    "observation": "tool",
    "tool": "tool",
}


def _role(name: Any, known: Mapping[str, str], where: str) -> str:
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"there is no role {name!r}", where=where, fix=f"one of {', '.join(sorted(known))}")
    return known[name]


def _as_role(role: str) -> Role:
    """A tool's turn is kept apart by its mark; its role no longer matters."""
    return role if role in ("system", "user", "assistant") else "user"  # type: ignore[return-value]


def _shape(name: str, needs: str, also: str, read: Callable[..., list[Turn]]) -> Shape:
    return Shape(name, frozenset(needs.split()), frozenset(also.split()), read)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _shape("messages", "messages", "", _messages),
        _shape("prompt-completion", "prompt completion", "system", _prompt_completion),
        _shape("alpaca", "instruction output", "input system", _alpaca),
        _shape("sharegpt", "conversations", "system", _sharegpt),
    )
}

"""The formats that rows may have, and how a row of each format becomes turns. FORMATS, at the end, lists them.

A row that does not fit its format (a missing key, a wrong type, an unknown role, two formats in one source) is an error
that names the place. A row that fits but holds no usable conversation is removed and counted (see turns.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple, get_args

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.messages import Conversation, Message, Role, ToolCall, with_tools
from tunesmith.core.reading.strict_json import Fields
from tunesmith.data.formats.openai_rules import require_openai
from tunesmith.data.formats.row_readers import SourceRow
from tunesmith.data.formats.tool_calls import made_id, object_of, parsed, read_call, read_calls, read_tools, sound

AUTO: Final = "auto"
OPENAI: Final = "openai"


class RowFormat(NamedTuple):
    """A format of rows.

    needs: keys that every row has. also: further keys that are read. read: (the row's fields, the place for errors, a
    counter of ignored keys inside turns) -> turns. detected: whether `format: auto` may choose it.
    """

    name: str
    needs: Set[str]
    also: Set[str]
    read: Callable[[Fields, str, Counter[str]], list[Message]]
    detected: bool = True


def format_of(name: str, row: SourceRow) -> RowFormat:
    """The format of that name; for "auto" the one that the row's keys fit.

    Raises UsageError where no format or several fit, and for preference rows, which supervised training cannot use.
    """
    if keys := _preference(row.fields):
        raise UsageError(
            f"the row states preferences ({keys}), but only supervised fine-tuning is supported",
            where=row.where,
            fix="make rows of the preferred answers only: a request and its answer",
        )
    if name != AUTO:
        return FORMATS[name]
    detected = [one for one in FORMATS.values() if one.detected]
    fitting = [one for one in detected if one.needs <= row.fields.keys()]
    if len(fitting) == 1:
        return fitting[0]
    what, fix = _misfit(row.fields, detected, fitting)
    raise UsageError(what, where=row.where, fix=fix)


def _misfit(fields: Fields, detected: Sequence[RowFormat], fitting: Sequence[RowFormat]) -> tuple[str, str]:
    """Why no format or several fit a row, and what to do."""
    fix: str
    keys = f"a row with the keys {', '.join(sorted(fields)) or '(none)'}"
    if fitting:
        names = " or ".join(one.name for one in fitting)
        hidden = {one.name: {sorted(other.needs)[0]: "unused" for other in fitting if other != one} for one in fitting}
        fixes = "; ".join(f"as {name}: {others}" for name, others in hidden.items())
        fix = _rename(f"set the source's format, or rename a key of the other: {fixes}")
        return f"{keys} fits several formats: {names}", fix
    if fields.keys() == {"text"}:
        fix = "divide each text: the request under prompt, and the answer that is to be learned under completion"
        return "the row has one text, and not a request and its answer", fix
    known = "; ".join(f"{one.name}: {', '.join(sorted(one.needs))}" for one in detected)
    likely = readings(fields)
    half = next((one for one in detected if one.needs & fields.keys()), None)
    if half is not None and not likely:
        missing = ", ".join(sorted(half.needs - fields.keys()))
        fix = f"fill it in, remove the row (null counts as absent), or rename the key that is the {missing}"
        return f"the row has {', '.join(sorted(half.needs & fields.keys()))} and no {missing}", _rename(fix)
    if len(likely) > 1:
        fix = f"choose one of them as the source's rename: {'; or '.join(map(str, likely))}"
        return f"{keys} can be read in {len(likely)} ways", _rename(fix)
    here = f", here {likely[0]}" if likely else ""
    fix = _rename(f"set the source's format or rename{here} ({known}); a key that is null counts as absent")
    return f"{keys} fits no known format", fix


def inferred_rename(fields: Fields) -> dict[str, str]:
    """The renames by which rows fit a format, where one reading alone is possible; {} for other rows."""
    if any(one.needs <= fields.keys() for one in FORMATS.values()) or _preference(fields):
        return {}
    ways = readings(fields)
    return dict(ways[0]) if len(ways) == 1 else {}


def readings(fields: Fields) -> list[dict[str, str]]:
    """The ways to read a row by names that rows often have, each as the renames that make it fit a format."""
    for key, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for turn, name in (("role", "messages"), ("from", "conversations")):
                if turn in value[0]:
                    return [{key: name}]
    keys = {key.strip().casefold(): key for key in fields}  # spreadsheets often write `Question`
    texts = [name for name in _REQUESTS if isinstance(fields.get(keys.get(name, "")), str)]
    passages = [name for name in _PASSAGES if isinstance(fields.get(keys.get(name, "")), str)]
    asked = [name for name in texts if name not in passages] or texts  # a passage is asked about, if anything else is
    said = [name for name in _ANSWERS if name in keys]
    asked = [name for name in asked if name not in _SELDOM] or asked
    if len(asked) > 1:  # a query that answers a question is SQL, and one beside a response is the request
        asked = [name for name in asked if name not in said] or asked
    return [
        _renames(keys, request, answer, [name for name in passages if name not in (request, answer)])
        for request in asked
        for answer in said
        if request != answer
    ]


def _renames(keys: Mapping[str, str], request: str, answer: str, passages: Sequence[str]) -> dict[str, str]:
    named = {request: "prompt", answer: "completion"}
    if request == "instruction" or passages:  # Alpaca's rows have a place for the passage
        named = {request: "instruction", answer: "output"} | ({passages[0]: "input"} if passages else {})
    return {keys[key]: name for key, name in named.items() if keys[key] != name}


def _rename(words: str) -> NextStep:
    return NextStep(words, "init", rename=...)


# What rows of other formats often call the request, the text that it is about, and the answer.
_REQUESTS: Final = (
    *("instruction", "prompt", "question", "query", "text", "input", "utterance", "sentence", "document", "source"),
    *("request", "user"),
)
_SELDOM: Final = ("source", "user")  # requests only where no other key is: often, they say where a row is from
_PASSAGES: Final = ("input", "context", "passage", "document", "article")
_ANSWERS: Final = (
    *("completion", "output", "response", "answer", "reply", "label", "intent", "category", "class", "summary"),
    *("target", "sql", "query", "assistant"),
)
_NOT_TEXT: Final[Mapping[type, str]] = {list: "write turns under messages", dict: "write it as text, such as JSON"}


def format_evidence(name: str, *, told: bool) -> str:
    """How a source's format is known, for a person to judge. Every row was checked against it."""
    if told:
        return "set in the settings"
    needs = FORMATS[name].needs
    others = ", ".join(one.name for one in FORMATS.values() if one.detected and one.name != name)
    return f"every row has {' and '.join(sorted(needs))}, and the first row fits no other format ({others})"


def read_turns(row: SourceRow, row_format: RowFormat, ignored: Counter[str]) -> list[Message]:
    """The row's turns. Raises UsageError, with the row and the key, where the row does not fit the format.

    ignored: counts the keys inside turns that are not read.
    """
    missing = row_format.needs - row.fields.keys()
    if missing:
        what, fix = (
            f"the row has no {', '.join(sorted(missing))}",
            "fill it in, or remove the row (null counts as absent)",
        )
        if other := next((one.name for one in FORMATS.values() if one.needs <= row.fields.keys()), None):
            what, fix = f"{what}; it looks like {other}", "move the others into another source"
        fix = f"all rows of a source have one format, here {row_format.name}: {fix}"
        raise UsageError(what, where=row.where, fix=fix)
    return row_format.read(row.fields, row.where, ignored)


def _preference(fields: Fields) -> str | None:
    """The keys that make a row a preference row: OpenAI's, DPO's or KTO's; None for other rows."""
    for keys in (("preferred_output", "non_preferred_output"), ("chosen", "rejected")):
        if all(key in fields for key in keys):
            return " and ".join(keys)
    judged = "completion" in fields and isinstance(fields.get("label"), bool)
    return "completion and a label of true or false" if judged else None


def text_of(fields: Fields, key: str, where: str) -> str:
    """A text field. Raises UsageError for another type, NUL characters and broken surrogate pairs."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise UsageError(
            f"{key} is a {type(value).__name__}, not text",
            where=f"{where}, {key}",
            fix=_NOT_TEXT.get(type(value), "write it as text"),
        )
    return sound(value, f"{where}, {key}")


def _answer_of(fields: Fields, key: str, where: str) -> str:
    """The text of an answer. A number, true or false, an object and a list are written as JSON.

    Raises UsageError as text_of does, also for a list of turns.
    """
    value = fields.get(key)
    if isinstance(value, int | float | dict | list) and not _has_turns(value):
        with suppress(ValueError, TypeError):  # NaN, infinity and Parquet's dates are not JSON
            return sound(json.dumps(value, allow_nan=False, ensure_ascii=False), f"{where}, {key}")
    return text_of(fields, key, where)


def _has_turns(value: Any) -> bool:
    turns = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    return any({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in turns)


_TURN_KEYS: Final = {"role", "content", "tool_calls", "function_call", "tool_call_id", "weight"}


def _messages(fields: Fields, where: str, ignored: Counter[str]) -> list[Message]:
    """Turns of {"messages": [{"role", "content", "tool_calls", "tool_call_id", "weight"}], "tools"}."""
    turns: list[Message] = []
    calls: list[ToolCall] = []
    for place, entry in _entries(fields, "messages", where):
        role = _role(entry.get("role"), _OPENAI_ROLES, f"{place}.role")
        unread = entry.keys() - _TURN_KEYS - ({"name"} if role == "tool" else set())
        ignored.update(f"messages[].{key}" for key in unread)
        content = _content(entry.get("content"), f"{place}.content")
        made: tuple[ToolCall, ...] = ()
        if entry.get("tool_calls"):
            made = read_calls(entry["tool_calls"], f"{place}.tool_calls", len(calls))
        elif entry.get("function_call"):
            made = (read_call(entry["function_call"], f"{place}.function_call", len(calls)),)
        if made and role != "assistant":
            raise UsageError(f"a {role} turn cannot call a tool", where=f"{place}.tool_calls")
        answers = _answered(entry, calls, turns, place) if role == "tool" else None
        calls.extend(made)
        weight = _weight(entry, role, place)
        turns.append(Message(role=role, content=content, tool_calls=made, tool_call_id=answers, weight=weight))
    return _with_tools(turns, fields, where)


def _openai(fields: Fields, where: str, ignored: Counter[str]) -> list[Message]:
    require_openai(fields, where)
    return _messages(fields, where, ignored)


def _weight(entry: Fields, role: Role, place: str) -> Literal[0, 1]:
    """An answer's weight; 1 for the turns of others."""
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UsageError(f"weight is {weight!r}", where=f"{place}.weight", fix="0 or 1")
    return 0 if weight == 0 and role == "assistant" else 1


def _answered(entry: Fields, calls: Sequence[ToolCall], turns: Conversation, place: str) -> str:
    """The id of the call that a tool turn answers: as it states, else the first call without an answer."""
    told = entry.get("tool_call_id")
    if told is None:
        done = {turn.tool_call_id for turn in turns}
        return next((call.id for call in calls if call.id not in done), made_id(len(calls)))
    if not isinstance(told, str):
        raise UsageError(f"tool_call_id is a {type(told).__name__}, not text", where=f"{place}.tool_call_id")
    return sound(told, f"{place}.tool_call_id")


def _with_tools(turns: list[Message], fields: Fields, where: str) -> list[Message]:
    """The turns with the row's tools on the first one."""
    named = [key for key in ("tools", "functions") if fields.get(key)]
    if len(named) > 1:
        raise UsageError("the row has both tools and functions", where=where, fix="leave functions out")
    several = any(len(turn.tool_calls) > 1 for turn in turns)
    if fields.get("parallel_tool_calls") is False and several:
        raise UsageError(
            "a turn has several calls", where=f"{where}, parallel_tool_calls", fix="set it to true, or split the turn"
        )
    if not named or not turns:
        return turns
    return list(with_tools(turns, read_tools(fields[named[0]], f"{where}, {named[0]}")))


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(text_of(part, "text", f"{where}[{place}]") for place, part in enumerate(content))
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        other = next(part["type"] for part in content if part["type"] != "text")
        raise UsageError(
            f"a part is of the type {other}, not text", where=where, fix="only text is learned: remove the row"
        )
    if not isinstance(content, str):
        what = f"content is a {type(content).__name__}, not text or text parts"
        raise UsageError(what, where=where, fix="write it as text, such as JSON")
    return sound(content, where)


def _sharegpt(fields: Fields, where: str, ignored: Counter[str]) -> list[Message]:
    """Turns of {"conversations": [{"from", "value"}], "system", "tools"}; _SHAREGPT_ROLES lists what `from` may say."""
    turns = _system(fields, where)
    calls: list[ToolCall] = []
    for place, entry in _entries(fields, "conversations", where):
        if "role" in entry and "from" not in entry:
            fix = _rename("they are messages under another name: rename conversations to messages")
            raise UsageError("the turn has a role, and no `from`", where=place, fix=fix)
        said = _role(entry.get("from"), _SHAREGPT_ROLES, f"{place}.from")
        role: Role = "assistant" if said == "call" else said
        ignored.update(f"conversations[].{key}" for key in entry.keys() - {"from", "value", "weight"})
        if "value" not in entry:
            raise UsageError("the turn has no value", where=place)
        text = text_of(entry, "value", place)
        made: tuple[ToolCall, ...] = ()
        if said == "call":
            value = parsed(text, f"{place}, value")
            made = read_calls(value if isinstance(value, list) else [value], f"{place}, value", len(calls))
            text = ""
        answers = _answered({}, calls, turns, place) if role == "tool" else None
        calls.extend(made)
        weight = _weight(entry, role, place)
        turns.append(Message(role=role, content=text, tool_calls=made, tool_call_id=answers, weight=weight))
    return _with_tools(turns, fields, where)


def _prompt_completion(fields: Fields, where: str, _ignored: Counter[str]) -> list[Message]:
    return _exchange(fields, where, text_of(fields, "prompt", where), "completion")


def _alpaca(fields: Fields, where: str, _ignored: Counter[str]) -> list[Message]:
    """Turns of {"instruction", "input", "output"}; the input, if any, follows the instruction after a blank line."""
    parts = (text_of(fields, key, where) for key in ("instruction", "input") if key in fields)
    return _exchange(fields, where, "\n\n".join(part for part in parts if part.strip()), "output")


def _exchange(fields: Fields, where: str, request: str, answer: str) -> list[Message]:
    """The system turn, if any, a request and its answer. answer: the answer's key."""
    asked, said = Message(role="user", content=request), _answer_of(fields, answer, where)
    return [*_system(fields, where), asked, Message(role="assistant", content=said)]


def _system(fields: Fields, where: str) -> list[Message]:
    text = text_of(fields, "system", where) if "system" in fields else ""
    return [Message(role="system", content=text)] if text.strip() else []


def _entries(fields: Fields, key: str, where: str) -> list[tuple[str, Fields]]:
    entries = fields[key]
    if not isinstance(entries, list):
        what = f"{key} is a {type(entries).__name__}, not a list of turns"
        raise UsageError(what, where=f"{where}, {key}", fix="write the rows as JSONL: CSV holds no lists")
    places = [f"{where}, {key}[{place}]" for place in range(len(entries))]
    return [(place, object_of(entry, "turn", place)) for place, entry in zip(places, entries, strict=True)]


_ROLES: Final = {role: role for role in get_args(Role)}
_OPENAI_ROLES: Final = _ROLES | {"developer": "system", "function": "tool"}
_SHAREGPT_ROLES: Final = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "observation": "tool",
}


def _role(name: Any, known: Fields, where: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"there is no role {name!r}", where=where, fix=f"one of {', '.join(sorted(known))}")
    return known[name]


_TOOL_KEYS: Final = {"tools", "functions", "parallel_tool_calls"}
# Name -> format. A new format is a function that reads a row and a line here.
FORMATS: Final[Mapping[str, RowFormat]] = {
    one.name: one
    for one in (
        RowFormat("messages", {"messages"}, _TOOL_KEYS, _messages),
        RowFormat(OPENAI, {"messages"}, _TOOL_KEYS, _openai, detected=False),  # its rows look like `messages`
        RowFormat("prompt-completion", {"prompt", "completion"}, {"system"}, _prompt_completion),
        RowFormat("alpaca", {"instruction", "output"}, {"input", "system"}, _alpaca),
        RowFormat("sharegpt", {"conversations"}, {"system", "tools"}, _sharegpt),
    )
}

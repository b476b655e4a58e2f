"""How a base's chat template writes calls of functions, and how calls are read out of an answer that a model wrote so.

The format is not listed by family: a call is rendered by the template, and what stands around its JSON is the format.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Conversation, Message, ToolCall, Turns, with_tools
from tunesmith.core.reading.strict_json import parse_json

_NAME, _KEY, _VALUE = "zqnameqz", "zqkeyqz", "zqvalueqz"
_DECODER: Final = json.JSONDecoder()
_PROBE: Final = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _NAME,
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": _KEY}}},
    },
}
# (messages, whether the assistant's opening is added) -> the text that the template makes of them
Render = Callable[[Conversation, bool], str]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """opening, closing: what stands before the first call's JSON object and after the last one's. between: what stands
    between two; None where an answer may have one call only. name, arguments: the object's keys. exact: whether a
    tokenizer writes these texts as they are, so that an answer can be held to them; control tokens are not text.
    """

    opening: str
    between: str | None
    closing: str
    name: str
    arguments: str
    exact: bool

    @property
    def marker(self) -> str:
        """The text that begins calls within an answer; "" where a call is the whole answer."""
        return self.opening.strip().removesuffix("[").strip()

    def may_begin(self, text: str) -> int:
        """The place from which on a text of an unfinished answer may be part of a call; its length for nowhere."""
        if not self.marker:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        place = text.find(self.marker)
        if place < 0:
            partly = (n for n in range(min(len(self.marker), len(text)), 0, -1) if text.endswith(self.marker[:n]))
            place = len(text) - next(partly, 0)
        return len(text[:place].rstrip())

    def read(self, answer: str, names: Collection[str] | None = None) -> tuple[str, tuple[ToolCall, ...]]:
        """(text, calls) of a whole answer. One with a call that is broken, or of another function than names, is text.
        names: None allows any function.

        Each call gets an id of nine letters and digits, as Mistral's templates require.
        """
        begin = answer.find(self.marker) if self.marker else 0
        if begin < 0:
            return answer, ()
        try:
            calls, rest = self._calls(answer[begin:], names)
        except (ValueError, RecursionError):
            return answer, ()
        return answer[:begin].rstrip() + rest.rstrip(), calls

    def _calls(self, text: str, names: Collection[str] | None) -> tuple[tuple[ToolCall, ...], str]:
        """The calls at the start of a text, and what follows them. Raises ValueError for anything else."""
        end = self.closing.strip().removeprefix("]").strip()
        calls: list[ToolCall] = []
        while True:
            text = text.removeprefix(self.marker).lstrip()
            _, stop = _DECODER.raw_decode(text)
            value = parse_json(text[:stop])
            calls += [self._call(one, names) for one in (value if isinstance(value, list) else [value])]
            text = text[stop:].lstrip().removeprefix(end)
            following = text.lstrip().removeprefix(";").lstrip()
            if not (following.startswith(self.marker) if self.marker else following.startswith("{")):
                break
            text = following
        if not calls or (not self.marker and text.strip()):
            raise ValueError("no calls alone")
        return tuple(calls), text

    def _call(self, value: Any, names: Collection[str] | None) -> ToolCall:
        fields = value if isinstance(value, dict) else {}
        name, given = fields.get(self.name), fields.get(self.arguments)
        if isinstance(given, str):
            given = parse_json(given)
        if not isinstance(name, str) or not isinstance(given, dict) or (names is not None and name not in names):
            raise ValueError("not a call of a function that is offered")
        return ToolCall(id=uuid.uuid4().hex[:9], name=name, arguments=json.dumps(given, ensure_ascii=False))


def find_call_format(render: Render, as_generated: Callable[[str], str]) -> CallFormat:
    """The format in which a template writes calls.

    as_generated: a template's text as an answer's text would have it, without control tokens. Raises Refused where the
    template does not render tools, and where its calls are not JSON objects.
    """
    asked = with_tools([Message(role="user", content="a")], [_PROBE])
    one, several = (_answer(render, asked, count) for count in (1, 2))
    if one is None or _NAME not in render(asked, True):
        raise _unreadable("does not render tools")
    lead, _, tail = (_answer(render, asked, 0) or "b").partition("b")  # such as an empty thought, and the turn's end
    one = one.removeprefix(lead)
    text = as_generated(one)
    parts = _object(text)
    if parts is None:
        raise _unreadable("does not write a call as a JSON object with a name and its arguments")
    start, end, name, arguments = parts
    between = None
    if several is not None:
        both = as_generated(several.removeprefix(lead))
        second = _object(both[end:])
        between = None if second is None or both[:end] != text[:end] else both[end : end + second[0]]
    opening, closing = text[:start], text[end:].rstrip()
    exact = one.removeprefix(text[:end] + closing).strip() == tail.strip()
    return CallFormat(opening.lstrip(), between, closing, name, arguments, exact)


def _answer(render: Render, asked: Turns, calls: int) -> str | None:
    """An assistant's turn with so many calls as the template writes it, None where it does not."""
    made = [ToolCall(id=f"call{n:05d}", name=_NAME, arguments=json.dumps({_KEY: _VALUE})) for n in range(calls)]
    turn = Message(role="assistant", content="" if calls else "b", tool_calls=tuple(made))
    try:
        before, through = render(asked, True), render((*asked, turn), False)
    except UsageError:
        return None
    return through.removeprefix(before) if through.startswith(before) else None


def _object(text: str) -> tuple[int, int, str, str] | None:
    """(start, end, key of the name, key of the arguments) of the first JSON object that is the probe's call."""
    for start, letter in enumerate(text):
        if letter != "{":
            continue
        try:
            value, end = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        if isinstance(value, Mapping) and _NAME in value.values():
            keys = [key for key, each in value.items() if each in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE}))]
            if keys:
                return start, end, next(key for key, each in value.items() if each == _NAME), keys[0]
    return None


def _unreadable(why: str) -> Refused:
    return Refused(
        f"the base's chat template {why}, so its answers cannot call functions",
        where="chat_template",
        fix="use a base whose template supports tools",
    )

"""Scans conversations for personal data and secrets, counts them by field, and replaces them by pseudonyms.

entities.py finds the entities of a text. This module divides a conversation into texts and writes the pseudonyms back,
so that a value has the same pseudonym everywhere and JSON stays JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.core.messages import Conversation, Message, ToolCall, Turns
from tunesmith.core.reading.strict_json import json_in, parse_json, unique_keys, values_in
from tunesmith.core.text.folding import plain
from tunesmith.core.values import Schema
from tunesmith.data.privacy.entities import Finder, FoundEntity
from tunesmith.data.privacy.names import NAME_ENTITIES
from tunesmith.data.privacy.pseudonyms import Pseudonyms
from tunesmith.data.settings import Privacy

CALL, TOOLS = "call", "tools"  # roles of texts outside a turn's content
_Findings = Mapping[tuple[str, str], Sequence[FoundEntity]]  # (JSON key, text) -> findings
# Replaced only where they were found: elsewhere the same number may mean something else.
_IN_PLACE = frozenset(("AGE", "DATE_TIME", "TITLE", "ZIP_CODE"))
# Replaced as whole words only; identifiers are replaced within longer words too.
_WORDS = frozenset((*NAME_ENTITIES, "STREET_ADDRESS")) - _IN_PLACE


class Scan(NamedTuple):
    """What a scan found in a conversation.

    messages: with pseudonyms; None where a call or the tools would no longer be JSON. counts: entity -> number of
    distinct values. fields: (role of the text, entity) -> number of findings, see texts_of. originals: pseudonym ->
    original value.
    """

    messages: Turns | None
    counts: Mapping[str, int] = {}
    fields: Mapping[tuple[str, str], int] = {}
    originals: Mapping[str, str] = {}


class Scanner:
    """Finds personal data and secrets in conversations. Made once per build: the patterns take a second to load.

    schema: of the task's answers. The texts that it lists are the task's own words, never personal data.
    """

    def __init__(self, settings: Privacy, schema: Schema | None = None) -> None:
        self.finder, self.settings = Finder(settings), settings
        self._keep = frozenset(plain(text).casefold() for text in _listed(schema))

    def scan(self, messages: Conversation) -> Scan:
        """The scan of one conversation."""
        return self.scan_many([messages])[0]

    def scan_many(self, conversations: Sequence[Conversation]) -> list[Scan]:
        """The scans of conversations. A model of names is faster over many texts at once."""
        findings = self._findings_of(conversations)
        return [self._scan(messages, findings) for messages in conversations]

    def _findings_of(self, conversations: Sequence[Conversation]) -> _Findings:
        places = sorted({(key, text) for messages in conversations for _, key, text in texts_of(messages)})
        findings = self.findings([text for _, text in places], [key for key, _ in places])
        return dict(zip(places, findings, strict=True))

    def findings(self, texts: Sequence[str], keys: Sequence[str] = ()) -> list[list[FoundEntity]]:
        """The findings of each text, without the values to keep. keys: the JSON key of each text, or ""."""
        return [
            [one for one in spans if plain(text[one.start : one.end]).casefold() not in self._keep]
            for text, spans in zip(texts, self.finder.find(texts, keys), strict=True)
        ]

    def _scan(self, messages: Conversation, findings: _Findings) -> Scan:
        fields = Counter((role, one.entity) for role, key, text in texts_of(messages) for one in findings[key, text])
        if not fields:
            return Scan(tuple(messages))
        names = Pseudonyms(self.settings.recognisers)
        counts: Counter[str] = Counter()
        values = self._values(messages, findings)
        # The longest names of people first, so that "Ann" is recognised as a part of "Ann Lee".
        for entity, value in sorted(values, key=lambda one: -len(one[1].split()) if one[0] == "PERSON" else 0):
            counts[entity] += names.add(entity, value)
        replace = _Replacer(names, values, findings)
        changed: Turns | None
        try:
            changed = tuple(_replaced(message, replace) for message in messages)
        except ValueError:
            changed = None
        originals: dict[str, str] = {}
        for entity, value in values:
            originals.setdefault(names.of(entity, value), value)
        return Scan(changed, counts, fields, originals)

    def values(self, messages: Conversation) -> list[str]:
        """Everything found in the messages, as written there."""
        return list(dict.fromkeys(value for _, value in self._values(messages, self._findings_of([messages]))))

    @staticmethod
    def _values(messages: Conversation, findings: _Findings) -> list[tuple[str, str]]:
        """(entity, value) of every finding."""
        return [
            (one.entity, text[one.start : one.end])
            for _, key, text in texts_of(messages)
            for one in findings[key, text]
        ]


def _listed(schema: Schema | None) -> Iterator[str]:
    for keys, text in values_in(schema):
        if isinstance(text, str) and (keys[-1:] == ("const",) or ("enum" in keys[-2:-1] and isinstance(keys[-1], int))):
            yield text


def texts_of(messages: Conversation) -> Iterator[tuple[str, str, str]]:
    """(role, key, text) of all texts of a conversation; of JSON its strings and numbers, so that escapes hide nothing.

    The role is the turn's, CALL for a call's name, arguments and id, and TOOLS for the declared functions. The key is
    the nearest one around the text in JSON, which may announce a value; "" elsewhere.
    """
    for message in messages:
        for role, text in _parts(message):
            value = json_in(text)
            for key, leaf in (("", text),) if value is None else _leaves(value):
                yield role, key, leaf


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    yield message.role, message.content
    for call in message.tool_calls:
        yield CALL, call.name
        yield CALL, call.arguments
    for identity in message.ids():
        yield CALL, identity
    if message.tools is not None:
        yield TOOLS, message.tools


def _leaves(value: Any) -> Iterator[tuple[str, str]]:
    for keys, inner in values_in(value):
        if keys and isinstance(keys[-1], str):
            yield "", keys[-1]
        if isinstance(inner, str | int | float) and not isinstance(inner, bool):
            yield next((key for key in reversed(keys) if isinstance(key, str)), ""), str(inner)


class _Replacer:
    """Puts pseudonyms into a conversation's texts."""

    def __init__(self, names: Pseudonyms, values: Sequence[tuple[str, str]], findings: _Findings) -> None:
        self._names, self._findings = names, findings
        self._spellings: dict[str, str] = {}
        self._whole: dict[str, str] = {}  # a name in lower case -> its entity, for texts that consist of it only
        patterns: dict[str, str] = {}
        for entity, value in values:
            if entity in _IN_PLACE:
                continue
            self._spellings.setdefault(value, names.of(entity, value))
            patterns.setdefault(value, rf"(?<!\w){re.escape(value)}(?!\w)" if entity in _WORDS else re.escape(value))
            if entity in _WORDS:
                self._whole.setdefault(value.casefold(), entity)
        ordered = sorted(patterns, key=lambda value: (-len(value), value))
        self._pattern = re.compile("|".join(patterns[value] for value in ordered)) if ordered else None

    def __call__(self, text: str, key: str = "") -> str:
        entity = self._whole.get(text.casefold())
        if entity is not None:
            return self._names.of(entity, text)
        pieces, done = [], 0
        for one in self._findings.get((key, text), ()):
            if one.entity in _IN_PLACE:
                value = text[one.start : one.end]
                pieces += [self._swept(text[done : one.start]), self._names.of(one.entity, value)]
                done = one.end
        return "".join((*pieces, self._swept(text[done:])))

    def _swept(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._spellings[match[0]], text)


def _replaced(message: Message, replace: _Replacer) -> Message:
    """The message with pseudonyms. Raises ValueError where a call or the tools would no longer be JSON."""
    changed: dict[str, Any] = {"content": _text_replaced(message.content, replace)}
    if message.tool_calls:
        changed["tool_calls"] = tuple(_call_replaced(call, replace) for call in message.tool_calls)
    if message.tool_call_id is not None:
        changed["tool_call_id"] = _text_replaced(message.tool_call_id, replace)
    if message.tools is not None:
        changed["tools"] = _text_replaced(message.tools, replace)
        parse_json(changed["tools"])
    same = all(getattr(message, key) == value for key, value in changed.items())
    return message if same else message.model_copy(update=changed)


def _call_replaced(call: ToolCall, replace: _Replacer) -> ToolCall:
    arguments = _text_replaced(call.arguments, replace)
    if not isinstance(parse_json(arguments), dict):
        raise ValueError("arguments are not an object")
    changed = {"id": _text_replaced(call.id, replace), "name": _text_replaced(call.name, replace)}
    return call.model_copy(update={**changed, "arguments": arguments})


def _text_replaced(text: str, replace: _Replacer) -> str:
    """The text with pseudonyms. JSON stays JSON and keeps its spacing."""
    value = json_in(text)
    if value is None:
        return replace(text)
    try:
        changed = _replace_leaves(value, replace)
    except ValueError:  # two keys would become equal: replace in the text instead
        return replace(text)
    if changed == value:
        return text
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":")) == text
    separators = (",", ":") if compact else None
    return json.dumps(changed, ensure_ascii=False, separators=separators)


def _replace_leaves(value: Any, replace: _Replacer, around: str = "") -> Any:
    if isinstance(value, dict):
        return unique_keys([(replace(key), _replace_leaves(inner, replace, key)) for key, inner in value.items()])
    if isinstance(value, list):
        return [_replace_leaves(inner, replace, around) for inner in value]
    if isinstance(value, str):
        return replace(value, around)
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = replace(str(value), around)
        if text == str(value):
            return value
        digits = re.sub(r"\D", "", text)  # a number stays a number
        with contextlib.suppress(ValueError):
            return int(digits)
        return text
    return value

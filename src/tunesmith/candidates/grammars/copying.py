"""Copied fields: the values of named fields are words of the request's user turns, so that none can be invented.

JSON Schema cannot say so: the allowed values differ from request to request. llguidance's Lark grammars can, by
`%regex {"substring_chunks": ...}`, an automaton of all runs of chunks. So each request gets a grammar of its own. Its
rules follow the schema down to the copied fields; everything beside them stays JSON Schema, as `%json`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.request_schemas import ANY_OBJECT, both, only_objects, same_schema
from tunesmith.candidates.grammars.schema_rules import (
    ARRAY,
    FIX,
    NOTES,
    OBJECT,
    SchemaRules,
    orders_keys,
    resolved,
    types_of,
)
from tunesmith.candidates.grammars.words import END, SPACE, is_copied, pieces
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.engines.decoding.json_text import restricted
from tunesmith.engines.protocol import Generation

_GRAMMARS_KEPT: Final = 64
_FEWEST, _BEYOND = 20, 0.02  # values that a proposal to copy needs, and the share that may not be copied
_REFERENCES: Final = 2  # how often one $ref is followed on the way to a field
# A value begins and ends with a piece, not with whitespace.
_COPIED: Final = rf"""COPIED: "\"" VALUE "\""
VALUE: RUN & /[^{SPACE}\n]([^\n]*[^{SPACE}\n])?/
"""


class Constraint:
    """What holds a candidate's answers: nothing, its grammar, its schema, or the schema with copied fields."""

    def __init__(self, candidate: Candidate) -> None:
        self._schema, self._grammar = candidate.answer_schema, candidate.answer_grammar
        self._grammars: CopyGrammars | None = None
        if self._schema is not None and candidate.copied:
            self._grammars = CopyGrammars(self._schema, candidate.copied)
        elif self._schema is not None and orders_keys(root := json.loads(self._schema)):
            with suppress(UsageError):  # the rules cannot say it: keys come in the schema's order then
                self._grammar = SchemaRules(root).write()

    def hold(
        self, request: Generation, own: Sequence[Message], requested: Mapping[str, Any] | None = None
    ) -> Generation:
        """The request with its schema or grammar. own: its own turns, without prompt, shots and passages.

        requested: a schema of the request, which the answer must fit as well. Raises UsageError where the turns hold no
        words and a required field is copied, and where the candidate's own rule and the requested one cannot be held
        together.
        """
        if requested is not None and not self._implies(requested):
            schema = self._narrowed(requested)
            return replace(
                request, schema=json.dumps(schema, ensure_ascii=False), constrained_by="response_format.json_schema"
            )
        if self._grammars is None:
            return replace(request, schema=self._schema, grammar=self._grammar)
        return replace(request, grammar=self._grammars.grammar(_user_texts(own)), constrained_by="messages")

    def _implies(self, requested: Mapping[str, Any]) -> bool:
        """Whether every answer that the candidate's own rule allows fits the requested schema, as far as is plain."""
        if self._schema is None:
            return False
        own = json.loads(self._schema)
        return same_schema(own, requested) or (requested == ANY_OBJECT and only_objects(own, own))

    def _narrowed(self, requested: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema for answers that the candidate's own rule allows and the requested schema too."""
        if self._schema is None and self._grammar is None:
            return requested
        if self._schema is None or self._grammars is not None:
            rule = "a grammar" if self._schema is None else "a schema whose fields are copied from the request"
            raise UsageError(
                f"the version holds its answers to {rule}, which cannot be held together with another schema",
                where="response_format",
                fix="leave response_format out: the version's own rule is held in any case",
            )
        return both(json.loads(self._schema), requested)


def check_constraint(candidate: Candidate) -> None:
    """Raise UsageError where answers cannot be held to a candidate's schema, so that nothing is trained before that."""
    from llguidance import LLMatcher

    if candidate.answer_schema is None:
        return
    held = Constraint(candidate).hold(Generation(()), [Message(role="user", content="a word")])
    try:
        schema = restricted(json.loads(candidate.answer_schema))
        said = LLMatcher.validate_grammar(held.grammar or LLMatcher.grammar_from_json_schema(schema))
    except ValueError as error:  # it holds a number that llguidance cannot
        said = str(error)
    if said:
        why = re.split(r"\n *\d+ \| ", said)[0].rpartition("failed to compile JSON schema: ")[2]  # then lines of rules
        raise UsageError(
            f"answers cannot be held to this schema: {' '.join(why.split())[:300]}",
            where="task.schema",
            fix=f"simplify it, or set constrain: false for the candidate {candidate.name}",
        )


class CopyGrammars:
    """Makes the grammar of each request for one schema and its copied fields.

    schema: JSON Schema as text. fields: paths of the schema, as `copied_fields` returns them.
    """

    def __init__(self, schema: str, fields: Sequence[str]) -> None:
        root = json.loads(schema)
        self._rules = {words: SchemaRules(root, fields, words).write() for words in (True, False)}
        self._grammar = lru_cache(_GRAMMARS_KEPT)(self._write)

    def grammar(self, texts: Sequence[str]) -> str:
        """The Lark grammar of an answer to a request whose user turns say these texts.

        Where they hold no word, optional fields are left out. Raises UsageError where a required field is then missing.
        """
        return self._grammar(tuple(texts))

    def _write(self, texts: tuple[str, ...]) -> str:
        found = pieces(texts)
        words = not {SPACE, END}.issuperset(found)
        rules = self._rules[words]
        if rules is None:
            raise UsageError(
                "the request holds no words, and a required field of the answer must be copied from it",
                where="messages",
                fix="send a user turn with text",
            )
        if not words:
            return rules
        # The end of a text stays a bare line feed, which no JSON string holds: no value goes across it.
        chunks = [piece if piece == END else json.dumps(piece, ensure_ascii=False)[1:-1] for piece in found]
        return f"{rules}{_COPIED}RUN: %regex {json.dumps({'substring_chunks': chunks}, ensure_ascii=False)}\n"


def copied_fields(schema: Mapping[str, Any], patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The paths of the text fields that patterns such as `slots.*` or `items[].name` name, in the schema's order.

    `*` names the text fields among an object's: other values, and texts from a list, cannot be invented. Raises
    UsageError for a pattern that names nothing, for a field that is not free text, and where the schema has something
    on the way to a field that is not supported.
    """
    if not patterns:
        return ()
    known = _known(schema)
    wanted: dict[str, None] = {}
    for pattern in patterns:
        matching = [path for path in known if _matches(pattern, path)]
        free = [path for path in matching if not known[path]]
        if not matching:
            near = difflib.get_close_matches(pattern, list(known), n=1)
            free = [path for path, reason in known.items() if not reason]
            raise UsageError(
                f"the answer schema has no field {pattern!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                where=where,
                fix=f"text fields that can be copied are: {', '.join(free[:20]) or 'none'}",
            )
        # A wildcard skips what is not free text. But other keys with any value would let an invented one in.
        barred = [path for path in matching if known[path] and (not free or path == pattern or path.endswith("*"))]
        if barred:
            raise UsageError(f"{barred[0]!r} cannot be copied: {known[barred[0]]}", where=where, fix=FIX)
        wanted.update(dict.fromkeys(free))
    fields = tuple(path for path in known if path in wanted)
    try:
        CopyGrammars(json.dumps(schema, ensure_ascii=False), fields)
    except UsageError as error:
        raise UsageError(error.what, where=where, fix=FIX) from error
    return fields


def text_fields(schema: Mapping[str, Any]) -> list[str]:
    """The paths of the fields that can be copied."""
    return [path for path, reason in _known(schema).items() if not reason]


def texts_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The path and the text of every text in a JSON value."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from texts_of(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each, f"{path}[]")


def invented(answer: str, fields: Sequence[str], own: Sequence[Message]) -> list[str]:
    """The copied fields of an answer whose value is not words of the request's user turns; none if it is not JSON."""
    try:
        found = list(texts_of(parse_json(answer)))
    except NotJson:
        return []
    given = pieces(_user_texts(own))
    copied = [(path, text) for path, text in found if any(_matches(field, path) for field in fields)]
    return [path for path, text in copied if not is_copied(text, given)]


def paths_to_copy(schema: Mapping[str, Any], rows: Sequence[tuple[str, Sequence[Message]]]) -> list[str]:
    """The paths of the text fields whose values are words of the request in nearly all rows that have them.

    rows: answers, each with its request. At least 98% of the values, and 20 of them, must be copied.
    """
    found: Counter[str] = Counter()
    beyond: Counter[str] = Counter()
    fields = [path for path in text_fields(schema) if "*" not in path]
    for answer, own in rows:
        with suppress(NotJson):
            found.update(path for path, _ in texts_of(parse_json(answer)))
        beyond.update(invented(answer, fields, own))
    return [path for path in fields if found[path] >= _FEWEST and beyond[path] <= _BEYOND * found[path]]


def patterns_of(schema: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """The patterns that name these text fields of a schema: `slots.*` where they are all of an object's."""
    fields = [path for path in text_fields(schema) if "*" not in path]
    together = {path: re.sub(r"[^.\[\]]+$", "*", path) for path in chosen}
    whole = {each for each in together.values() if {path for path in fields if _matches(each, path)} <= set(chosen)}
    return list(dict.fromkeys(together[path] if together[path] in whole else path for path in chosen))


def _user_texts(own: Sequence[Message]) -> list[str]:
    return [message.content for message in own if message.role == "user"]


def _matches(pattern: str, path: str) -> bool:
    """Whether a path is one that a pattern names. `*` is any one key."""
    return re.fullmatch("[^.\\[\\]]*".join(map(re.escape, pattern.split("*"))), path) is not None


def _known(schema: Mapping[str, Any]) -> dict[str, str]:
    """The path of every value in a schema, and why it cannot be copied; "" where it can."""
    known: dict[str, str] = {}
    for path, reason in _fields(schema, schema, "", ()):
        known[path] = known.get(path) or reason
    return known


def _fields(root: Mapping[str, Any], schema: Any, path: str, followed: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The path of every value below an object or array, and why it cannot be copied; "" where it can."""
    if not isinstance(schema, dict):
        if path:
            yield path, "the schema allows any value there"
        return
    if (reference := schema.get("$ref")) is not None:
        if followed.count(reference) < _REFERENCES:
            yield from _fields(root, resolved(root, reference, path), path, (*followed, reference))
        return
    for part in schema.get("anyOf", ()):
        yield from _fields(root, part, path, followed)
    for key, part in schema.get("properties", {}).items():
        yield from _fields(root, part, f"{path}.{key}" if path else key, followed)
    if (further := schema.get("additionalProperties", "object" in types_of(schema))) is not False:
        yield from _fields(root, further, f"{path}.*" if path else "*", followed)
    if "items" in schema:
        yield from _fields(root, schema["items"], f"{path}[]", followed)
    if path and "anyOf" not in schema and schema.get("type") != "null":
        yield path, _not_copied(schema)


def _not_copied(schema: Mapping[str, Any]) -> str:
    """Why the values of a schema cannot be copied; "" where they can."""
    types = types_of(schema)
    if types == ["array"]:
        return "it is a list: name its items, with []"
    if "string" not in types or set(types) - {"string", "null"}:
        return f"it is not a text but {' or '.join(types) or 'any value'}"
    if further := sorted(schema.keys() - NOTES - {"type", "minLength"} - OBJECT - ARRAY):
        return f"the schema limits it by {further[0]} already"
    return "it must have several letters" if schema.get("minLength", 0) > 1 else ""

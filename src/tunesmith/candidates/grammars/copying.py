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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from typing import Any, Final, Literal

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.request_schemas import ANY_OBJECT, both, only_objects, same_schema
from tunesmith.candidates.grammars.schema_rules import (
    ARRAY,
    FIX,
    LETTER,
    OBJECT,
    SchemaRules,
    is_listed,
    limits,
    order_kept_by,
    orders_keys,
    resolved,
    types_of,
)
from tunesmith.candidates.grammars.words import END, SPACE, has_run, is_copied, pieces
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation
from tunesmith.core.reading.answer_grammar import matches
from tunesmith.core.reading.strict_json import NotJson, parse_json, values_in
from tunesmith.core.values import Schema
from tunesmith.engines.protocol import Generation, restricted

AnsweredRows = Sequence[tuple[str, Conversation]]  # answers, each with its request
_GRAMMARS_KEPT: Final = 64
_FEWEST, _BEYOND = 20, 0.02  # values that a proposal to copy needs, and the share that may not be copied
_REFERENCES: Final = 2  # how often one $ref is followed on the way to a field
_KEY, _ITEM = "\0", "\1"  # in a path before a key that is not the first, and for the items of a list
# What may stand beside the type of a copied text: its length, and what limits values of other types only.
_BESIDE: Final = frozenset(
    {
        *("type", "minLength", "maxLength", *OBJECT, *ARRAY),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
# A value begins and ends with a piece, not with whitespace.
_COPIED: Final = rf"""COPIED: "\"" VALUE "\""
VALUE: RUN & /[^{SPACE}\n]([^\n]*[^{SPACE}\n])?/
"""


class Constraint:
    """What holds a candidate's answers: nothing, its grammar, its schema, or the schema with copied fields.

    order_kept_by: why keys come in the schema's order; None where they come in any order, or where no object has two.
    """

    def __init__(self, candidate: Candidate) -> None:
        self._schema, self._grammar, self._copied = candidate.answer_schema, candidate.answer_grammar, candidate.copied
        self._grammars: CopyGrammars | None = None
        self.order_kept_by: str | None = None
        if self._schema is not None and candidate.copied:
            self._grammars = CopyGrammars(self._schema, candidate.copied)
        elif self._schema is not None:
            root = json.loads(self._schema)
            try:
                self.order_kept_by = order_kept_by(root)
                self._grammar = SchemaRules(root).write() if orders_keys(root) else None
            except UsageError as error:  # the rules cannot say it
                self.order_kept_by = error.what

    @property
    def any_order(self) -> bool:
        """Whether the keys of an object may come in another order than the schema's."""
        return self._schema is not None and (self._grammars is not None or self._grammar is not None)

    def hold(self, request: Generation, own: Conversation, requested: Schema | None = None) -> Generation:
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

    def forbids(self, answer: str, own: Conversation) -> Literal["copy", "form"] | None:
        """What keeps decoding from this answer to a request whose own turns these are: a copied field holds other than
        their words, or its form; None where it can give the answer."""
        if self._grammars is not None and invented(answer, self._copied, own) and not self._gives(answer, own):
            return "copy"
        return None if self.form is None or matches(self.form, answer) else "form"

    def _gives(self, answer: str, own: Conversation) -> bool:
        """Whether decoding can give this answer to a request. Slow; it knows that a value may be copied or listed."""
        assert self._grammars is not None
        try:
            return matches(self._grammars.grammar(_user_texts(own)), answer)
        except UsageError:
            return False

    @cached_property
    def form(self) -> str | None:
        """A grammar of the answers to all requests, whose copied fields may hold any text."""
        if self._grammars is not None:
            return self._grammars.of_any_words()
        if self._grammar is not None or self._schema is None:
            return self._grammar
        from llguidance import LLMatcher

        return str(LLMatcher.grammar_from_json_schema(restricted(json.loads(self._schema))))

    def _implies(self, requested: Schema) -> bool:
        """Whether every answer that the candidate's own rule allows fits the requested schema, as far as is plain."""
        if self._schema is None:
            return False
        own = json.loads(self._schema)
        return same_schema(own, requested) or (requested == ANY_OBJECT and only_objects(own, own))

    def _narrowed(self, requested: Schema) -> Schema:
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
    try:
        form = Constraint(candidate).form
        said = "" if form is None else LLMatcher.validate_grammar(form)
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
        self._root, self._fields = json.loads(schema), tuple(fields)
        whole = SchemaRules(self._root, fields)
        if (rules := whole.write()) is None:
            raise UsageError("no answer is possible: the schema requires a copied field that may hold no word", fix=FIX)
        self._of_any_words, self._bounds = rules, frozenset(whole.bounds)
        self._rules = lru_cache(_GRAMMARS_KEPT)(lambda lengths: SchemaRules(self._root, self._fields, lengths).write())
        self._grammar = lru_cache(_GRAMMARS_KEPT)(self._write)

    def grammar(self, texts: Sequence[str]) -> str:
        """The Lark grammar of an answer to a request whose user turns say these texts.

        Optional fields that no words of theirs fit, by the schema's bounds of length, are left out. Raises UsageError
        where a required field is then missing.
        """
        return self._grammar(tuple(texts))

    def of_any_words(self) -> str:
        """The Lark grammar of answers whose copied fields hold any text."""
        return f"{self._of_any_words}{_COPIED}RUN: /{LETTER}*/\n"

    def _write(self, texts: tuple[str, ...]) -> str:
        words = pieces(texts)
        lengths = frozenset(bounds for bounds in self._bounds if has_run(words, *bounds))
        rules = self._rules(lengths)
        if rules is None:
            some = "" if {SPACE, END}.issuperset(words) else " of the length that the schema asks for"
            raise UsageError(
                f"the request holds no words{some}, and a required field of the answer must be copied from it",
                where="messages",
                fix="send a user turn with such words" if some else "send a user turn with text",
            )
        if not lengths:
            return rules
        # The end of a text stays a bare line feed, which no JSON string holds: no value goes across it.
        chunks = [piece if piece == END else json.dumps(piece, ensure_ascii=False)[1:-1] for piece in words]
        return f"{rules}{_COPIED}RUN: %regex {json.dumps({'substring_chunks': chunks}, ensure_ascii=False)}\n"


def copied_fields(schema: Schema, patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The paths of the text fields that patterns such as `slots.*` or `items[].name` name, in the schema's order.

    `*` names any one key. Values that are no texts, or that the schema lists, need not be copied. Raises UsageError for
    a pattern that names no text field, for a text that cannot be copied, where a text below `*` is not among the
    fields, and where the schema has something on the way to a field that is not supported.
    """
    if not patterns:
        return ()
    fields = _named(_known(schema), patterns, where)
    try:
        CopyGrammars(json.dumps(schema, ensure_ascii=False), fields)
    except UsageError as error:
        raise UsageError(error.what, where=where, fix=FIX) from error
    return fields


def _named(known: Mapping[str, _Value], patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The paths of the text fields that patterns name. Raises as copied_fields does."""
    matching = {pattern: [path for path in known if _matches(pattern, path)] for pattern in patterns}
    fields = {path: None for paths in matching.values() for path in paths if not known[path].uncopied}
    for pattern, paths in matching.items():
        if not paths:
            near = difflib.get_close_matches(pattern, [_shown(path) for path in known], n=1)
            free = [_shown(path) for path, value in known.items() if not value.uncopied]
            raise UsageError(
                f"the answer schema has no field {pattern!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                where=where,
                fix=f"text fields that can be copied are: {', '.join(free[:20]) or 'none'}",
            )
        wide = "*" in pattern and any(path in fields for path in paths)
        inside = tuple(path + end for path in paths for end in (_KEY, _ITEM)) if wide else ()
        fix = f"{FIX}; or name the fields to copy one by one, without *" if wide else FIX
        for path, value in known.items():
            if path in fields or not (path in paths or path.startswith(inside)):
                continue
            if value.uncopied and (value.text or not wide):
                raise UsageError(f"{_shown(path)!r} cannot be copied: {value.uncopied}", where=where, fix=fix)
            if not value.uncopied:
                raise UsageError(
                    f"{pattern!r} does not name {_shown(path)!r}, which may be any text",
                    where=where,
                    fix="add it to copy; or name the fields to copy one by one, without *",
                )
    return tuple(dict.fromkeys(_shown(path) for path in known if path in fields))


def text_fields(schema: Schema) -> list[str]:
    """The paths of the fields that can be copied."""
    return list(dict.fromkeys(_shown(path) for path, value in _known(schema).items() if not value.uncopied))


def paths_in(schema: Schema) -> set[str]:
    """The paths of all values in a schema."""
    return set(map(_shown, _known(schema)))


def texts_of(value: Any) -> Iterator[tuple[str, str]]:
    """The path and the text of every text in a JSON value."""
    return ((path_of(keys), text) for keys, text in values_in(value) if isinstance(text, str))


def path_of(keys: Iterable[str | int]) -> str:
    """The path of a value that these keys and places lead to, as people write it."""
    return _shown(_joined(keys))


def invented(answer: str, fields: Sequence[str], own: Conversation) -> list[str]:
    """The copied fields of an answer whose value is not words of the request's user turns; none if it is not JSON."""
    try:
        texts = [(_joined(keys), text) for keys, text in values_in(parse_json(answer)) if isinstance(text, str)]
    except NotJson:
        return []
    given = pieces(_user_texts(own))
    copied = [(path, text) for path, text in texts if any(_matches(field, path) for field in fields)]
    return [_shown(path) for path, text in copied if not is_copied(text, given)]


def paths_to_copy(schema: Schema, rows: AnsweredRows) -> list[str]:
    """The paths of the text fields whose values are words of the request in nearly all rows that have them.

    At least 98% of the values, and 20 of them, must be copied.
    """
    times: Counter[str] = Counter()
    beyond: Counter[str] = Counter()
    fields = [path for path in text_fields(schema) if "*" not in path]
    for answer, own in rows:
        times.update(path for path, _ in texts_of(parse_json(answer)))
        beyond.update(invented(answer, fields, own))
    return [path for path in fields if times[path] >= _FEWEST and beyond[path] <= _BEYOND * times[path]]


def patterns_of(schema: Schema, chosen: Sequence[str]) -> list[str]:
    """The patterns that name these text fields of a schema: `slots.*` where it names no others and leaves none open."""
    known = _known(schema)

    def names_these(pattern: str) -> bool:
        try:
            return set(_named(known, [pattern, *chosen], "copy")) == set(chosen)
        except UsageError:
            return False

    places = {_shown(path): path for path in known}
    together = {path: _shown(re.sub(f"[^{_KEY}{_ITEM}]+$", "*", places[path])) for path in chosen}
    whole = {each for each in together.values() if names_these(each)}
    return list(dict.fromkeys(together[path] if together[path] in whole else path for path in chosen))


def _user_texts(own: Conversation) -> list[str]:
    return [message.content for message in own if message.role == "user"]


def _inside(path: str, key: str) -> str:
    """The path of a key's value in the object at a path."""
    return f"{path}{_KEY}{key}" if path else key


def _joined(keys: Iterable[str | int]) -> str:
    """The path of a value in an answer, as those of a schema are written here."""
    return reduce(lambda path, key: path + _ITEM if isinstance(key, int) else _inside(path, key), keys, "")


def _shown(path: str) -> str:
    """A path as people write it."""
    return path.replace(_KEY, ".").replace(_ITEM, "[]")


def _matches(pattern: str, path: str) -> bool:
    """Whether a path is one that a pattern names. `*` is any one key; a dot in a pattern may be a key's own."""
    return _compiled(pattern).fullmatch(path) is not None


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    wanted = re.escape(pattern).replace(r"\*", f"[^{_KEY}{_ITEM}]*").replace(r"\[\]", rf"(?:{_ITEM}|\[\])")
    return re.compile(wanted.replace(r"\.", f"[.{_KEY}]"))


@dataclass(frozen=True)
class _Value:
    """A value below an answer. uncopied: why it cannot be copied; "" where it can. text: whether it may be a text that
    the schema does not list."""

    uncopied: str
    text: bool


_ANY: Final = _Value("the schema allows any value there", text=True)


def _known(schema: Schema) -> dict[str, _Value]:
    """Every value in a schema by its path."""
    known: dict[str, _Value] = {}
    for path, value in _fields(schema, schema, "", ()):
        before = known.get(path, value)
        # Where one of several schemas is of texts, the others do not matter; of two texts both must be copied.
        known[path] = before if (before.text, before.uncopied) >= (value.text, value.uncopied) else value
    return known


def _fields(root: Schema, schema: Any, path: str, followed: tuple[str, ...]) -> Iterator[tuple[str, _Value]]:
    """Every value below an object or array, with its path."""
    if not isinstance(schema, dict):
        if path and schema is not False:
            yield path, _ANY
        return
    if (reference := schema.get("$ref")) is not None:
        if followed.count(reference) < _REFERENCES:
            target = resolved(root, reference, _shown(path))
            yield from _fields(root, target, path, (*followed, reference))
        else:
            yield path, _Value("the schema refers to itself there without end", text=True)
        return
    for part in schema.get("anyOf", ()):
        yield from _fields(root, part, path, followed)
    kinds = types_of(schema)
    for key, part in schema.get("properties", {}).items():
        yield from _fields(root, part, _inside(path, key), followed)
    further = schema.get("additionalProperties", "object" in kinds)
    for part in (*schema.get("patternProperties", {}).values(), further):
        yield from _fields(root, part, _inside(path, "*"), followed)
    for part in (*schema.get("prefixItems", ()), schema.get("items", "array" in kinds)):
        yield from _fields(root, part, path + _ITEM, followed)
    if path and "anyOf" not in schema and kinds != ["null"]:
        yield path, _value(schema, kinds)


def _value(schema: Schema, kinds: Sequence[str]) -> _Value:
    """What a schema without $ref and anyOf says of its value."""
    if is_listed(schema):
        return _Value("the schema lists its values", text=False)
    if not kinds:
        return _ANY
    if kinds == ["array"]:
        return _Value("it is a list: name its items, with []", text=False)
    if "string" not in kinds:
        return _Value(f"it is not a text but {' or '.join(kinds)}", text=False)
    further = limits(schema, _BESIDE)
    return _Value(f"the schema limits it by {further[0]} already" if further else "", text=True)

"""Infers the schema of a new project's answers from rows: which values are closed, copied from requests, or open."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from string import ascii_lowercase
from typing import Any

import regex
from llguidance import LLMatcher

from tunesmith.candidates.grammars.copying import (
    AnsweredRows,
    copied_fields,
    path_of,
    paths_in,
    paths_to_copy,
    patterns_of,
    text_fields,
    texts_of,
)
from tunesmith.candidates.grammars.words import is_copied, pieces
from tunesmith.core.messages import Conversation, Turns
from tunesmith.core.reading.strict_json import Fields, JsonObject, as_decoded, json_in, parse_json, values_in
from tunesmith.core.values import Schema
from tunesmith.data.duplicates import learned_parts
from tunesmith.data.formats.key_order import in_request_order

_ENUM_VALUES, _ENUM_CHARACTERS = 200, 20_000
_MOST_WORDS = 60  # texts that requests say and that may be labels: more of them are copied
_ENUM_TIMES = 20  # how often each is seen on average
_LABEL_TIMES = 5  # the same for whole answers: a prompt lists them, and nothing forbids others
_ASKED = 200  # requests that are searched for all values of a field
_UNSAID = 0.02  # the share of a field's values that requests need not say, as for fields to copy
_UNSAID_NUMBERS = 0.5  # the same for numbers
_FEWEST_TEXTS, _MOST_TEXTS = 6, 0.8  # of several texts, the share that requests say where they say most of them
_WHOLE = regex.compile(r"-?\d+(\s\p{L}+)?")  # 5, or 5 stars
_DIGITS = re.compile(r"\d+")
# A number, date, time, amount (`$5`, `30 min`), duration (`PT30M`), or period of a year (`Q3 2026`, `2026-W05`).
_FIGURES = regex.compile(
    r"[+-]?\p{Sc}?\s?[+-]?\d[\d.,:/ -]*(T[\d.,:+-]+)?(%|[Zz]|[AaPp][Mm]|\p{Sc})?"
    r"|([+-]?\d[\d.,]*\s?\p{L}+\.?\s?)+"
    r"|[Vv]\d+(\.\d+)+"
    r"|P(?=[\dT])(\d+[DWMY])*(T(\d+[HMS])+)?"
    r"|[QWH]\d+[- /]?\d{4}|\d{4}[- /]?[QWH]\d+"
)
# A range is a property of the task, and not of these rows, where it counts from 0 or 1, has more values than a year
# has months, and its ends are seen again and again: 0 to 100 percent. Where only its values are, it gets a margin.
_RANGE_VALUES, _RANGE_DISTINCT, _RANGE_ENDS, _RANGE_TIMES = 200, 13, 5, 10
_LARGEST_RANGE = 1 << 53  # beyond, not every reader of JSON tells whole numbers apart
# An object with more keys than this is a table of values, not a record with fields. Fewer suffice where requests say
# them, such as the ingredients of a recipe, and none is in half of the objects.
_MOST_KEYS, _MOST_SAID_KEYS = 200, 20
# Below so many levels the schema says the kind of a value only: a check of the schema itself goes only so deep.
_DEEPEST = 24
_KINDS = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def schema_and_copied(values: Sequence[Fields], rows: AnsweredRows) -> tuple[JsonObject, list[str]]:
    """The answers' schema and the patterns of the fields to copy.

    A value that requests say is not closed, even where few were seen: the next request may say another. But where most
    requests list all values of a text, as "positive or negative?" does, these are the choices. A text with few values
    that every answer has may be a word of the request or a label that happens to stand there: it is not copied either.
    """
    said = _said(rows, most=True)
    said -= _listed(said, rows)
    schema = infer_schema(values, said)
    said -= set(_closed_in_all(infer_schema(values)))
    return schema, patterns_of(schema, [path for path in paths_to_copy(schema, rows) if path in said])


def infer_schema(values: Sequence[Fields], said: Collection[str] = ()) -> JsonObject:
    """A JSON Schema that all these answers satisfy.

    said: paths of values that requests say, and of objects whose keys they say. They are not closed.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_infer(values, "", 0, said)}


def rare_keys(values: Sequence[Fields], schema: Schema) -> list[str]:
    """The paths of the keys that one answer alone has, where the schema forbids other keys.

    As many answers in as many others are likely to have a key that was not seen (Good and Turing's estimate).
    """
    times: Counter[str] = Counter()
    for value in values:
        times.update({path_of(keys) for keys, _ in values_in(value) if keys and isinstance(keys[-1], str)})
    named = paths_in(schema)
    return [path for path, count in times.items() if count == 1 and path in named]


def answer_labels(rows: AnsweredRows) -> tuple[str, ...]:
    """The answers, if they are a few labels that requests do not say, or that most requests list. Whole numbers may be
    labels, as the stars of a review are."""
    answers = [answer for answer, _ in rows]
    if not _is_vocabulary(answers, _LABEL_TIMES, numbers=True):  # too many: the requests need not be searched
        return ()
    named = [(json.dumps({"label": answer}), own) for answer, own in rows]
    said = _said(named)
    return () if "label" in said - _listed(said, named) else tuple(sorted(set(answers)))


def _said(rows: AnsweredRows, *, most: bool = False) -> set[str]:
    """The paths of texts and keys that requests say in nearly all rows, in capitals or not, and of numbers that they
    say in most rows: `a chair` is 1, and `a dozen` is 12.

    most: also paths of several texts of which most are said wherever they are the value: a town that some requests
    shorten, or a name in whose place some answers have "" or "unknown".
    """
    seen: Counter[str] = Counter()
    unsaid: Counter[str] = Counter()
    numbers: set[str] = set()
    texts: dict[str, dict[str, list[int]]] = {}  # path -> text -> how often it is the value, and unsaid
    for answer, own in rows:
        given = _given(own)
        for path, word in _words_of(parse_json(answer)):
            missing = not is_copied(str(word).casefold(), given)
            seen[path] += 1
            unsaid[path] += missing
            if not isinstance(word, str):
                numbers.add(path)
            elif len(known := texts.setdefault(path, {})) <= _ENUM_VALUES:
                counts = known.setdefault(word, [0, 0])
                counts[0] += 1
                counts[1] += missing
    return {
        path
        for path, times in seen.items()
        if times >= _ENUM_TIMES
        and (
            unsaid[path] <= (_UNSAID_NUMBERS if path in numbers else _UNSAID) * times
            or (most and _most_said(texts.get(path, {}).values()))
        )
    }


def _most_said(texts: Collection[Sequence[int]]) -> bool:
    """Whether most of several texts are said in most of their rows."""
    said = sum(2 * missing < times for times, missing in texts)
    return len(texts) >= _FEWEST_TEXTS and said >= _MOST_TEXTS * len(texts)


def _words_of(value: Any) -> Iterator[tuple[str, str | int | float]]:
    """The path of every text, number and key in a JSON value, and itself.

    A key has the path of its object.
    """
    for keys, each in values_in(value):
        if keys and isinstance(keys[-1], str):
            yield path_of(keys[:-1]), keys[-1]
        if isinstance(each, str | int | float) and not isinstance(each, bool):
            yield path_of(keys), each


def _given(own: Conversation) -> list[str]:
    """The pieces of the user's turns, without capitals, and the digits in them: the 3 of `3x`."""
    texts = [turn.content.casefold() for turn in own if turn.role == "user"]
    return pieces([*texts, *(digits for text in texts for digits in _DIGITS.findall(text))])


def _closed_in_all(schema: Schema, path: str = "") -> Iterator[str]:
    """The paths of texts of which a schema lists a few values and that every answer has."""
    if len(schema.get("enum", ())) in range(1, _MOST_WORDS + 1):
        yield path
    for key in schema.get("required", ()):
        yield from _closed_in_all(schema["properties"][key], f"{path}.{key}" if path else key)


def _listed(paths: Collection[str], rows: AnsweredRows) -> set[str]:
    """The paths whose values, two or more, all stand in most requests."""
    known: dict[str, set[str]] = {path: set() for path in paths}
    for answer, _ in rows:
        for path, text in texts_of(parse_json(answer)):
            if path in known and len(known[path]) <= _ENUM_VALUES:
                known[path].add(text)
    given = [_given(own) for _, own in rows[:: -(-len(rows) // _ASKED)]]
    return {
        path
        for path, texts in known.items()
        if 1 < len(texts) <= _ENUM_VALUES
        and 2 * sum(all(is_copied(text.casefold(), said) for text in texts) for said in given) > len(given)
    }


def _infer(values: Sequence[Any], path: str, level: int, said: Collection[str]) -> JsonObject:
    """The schema of the values at a path."""
    kinds = _kinds(values)
    if kinds == ["null"]:
        return {"type": ["boolean", "null", "number", "string"]}  # which of them it may have is not known
    schema: JsonObject = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if level >= _DEEPEST:
        return schema
    objects = [value for value in values if isinstance(value, dict)]
    keys = list(dict.fromkeys(key for value in objects for key in value))  # an answer is decoded in this order
    if keys and _is_table(objects, keys, path in said):
        inside = _kinds([each for value in objects for each in value.values()])
        if len(inside) == 1 and inside != ["null"]:
            schema["additionalProperties"] = {"type": inside[0]}
    elif keys:
        schema["properties"] = {
            key: _infer(
                [value[key] for value in objects if key in value], f"{path}.{key}" if path else key, level + 1, said
            )
            for key in keys
        }
        schema["required"] = [key for key in keys if all(key in value for value in objects)]
        schema["additionalProperties"] = False
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        schema["items"] = _infer(items, f"{path}[]", level + 1, said)
    if kinds in (["integer"], ["number"]) and (ends := _range(values, path in said)) is not None:
        schema |= {"minimum": ends[0], "maximum": ends[1]}
    if kinds == ["string"] and path not in said and _is_vocabulary(values):
        schema["enum"] = sorted(set(values))
    return schema


def _is_table(objects: Sequence[Fields], keys: Sequence[str], said: bool) -> bool:
    """Whether the keys of objects are data and not names of fields. said: whether requests say them."""
    if said and _MOST_SAID_KEYS < len(keys) <= _MOST_KEYS:
        return 2 * max(Counter(key for value in objects for key in value).values()) < len(objects)
    return len(keys) > _MOST_KEYS


def _range(values: Sequence[int | float], said: bool) -> tuple[int, int] | None:
    """The least and the largest number that answers should have; None where these values do not say.

    Numbers that are seldom seen again, such as those of orders, go on beyond what was seen. So do numbers that requests
    say, such as the guests at a table: the next request may say any.
    """
    least, most, distinct = min(values), max(values), len(set(values))
    if said or len(values) < _RANGE_VALUES or distinct < _RANGE_DISTINCT or max(-least, most) > _LARGEST_RANGE:
        return None
    whole = all(isinstance(value, int) for value in values)
    if whole and least in (0, 1) and min(values.count(least), values.count(most)) >= _RANGE_ENDS:
        return int(least), int(most)
    # Within a range, decoding writes no exponent.
    if len(values) < _RANGE_TIMES * distinct or any("e" in repr(value) for value in values):
        return None
    span = most - least
    return math.floor(least - span) if least < 0 else 0, math.ceil(most + span)


def _is_vocabulary(values: Sequence[str], each: int = _ENUM_TIMES, *, numbers: bool = False) -> bool:
    """Whether so few distinct texts in so many rows are a vocabulary, not free text: nearly each is seen again.

    Dates, times and amounts are not: the next row may have another. each: how often a text is seen on average, at
    least. numbers: whole ones may be.
    """
    times = Counter(values)
    if len(times) > _ENUM_VALUES or sum(map(len, times)) > _ENUM_CHARACTERS or len(values) < each * len(times):
        return False
    figures = [text for text in times if _FIGURES.fullmatch(text) and not (numbers and _WHOLE.fullmatch(text))]
    if 2 * len(figures) > len(times):
        return False
    return sum(count == 1 for count in times.values()) <= max(len(times) // 20, len(values) // 1000)


def _kinds(values: Sequence[Any]) -> list[str]:
    """The JSON types of values; whole numbers among others are numbers."""
    kinds = sorted({_KINDS[type(value)] for value in values})
    return ["number"] if kinds == ["integer", "number"] else kinds


_UNSAID, _SAME = 0.02, 0.8  # shares of a field's values, and of those that no request says
_SENTENCE, _BEGINNING = 4, 200  # words, and the characters that are searched for them
_CODE = re.compile(r"[|\\=<>(){}\[\]*&$;`]|(?:^|\s)--?[A-Za-z]|/\w")


class AnswerFindings:
    """What was found in the answers of a new project.

    schema: where the last answers of all rows are JSON objects. constrained: whether answers are held to it. rare:
    paths of the keys that one answer alone has. copied: patterns of the fields to copy. said: paths of texts that most
    requests say -> the text that stands for one that is not said, such as "" or "unknown"; None where there is none.
    reordered, respelled: answers that the build will write otherwise. tokens: the most that an answer needs, about.
    calls: rows that end in calls of tools. others: answers before a row's last one that are no JSON objects, where the
    last ones are. objects, lists: without a schema, how many rows end in a JSON object, with or without a code fence,
    or in a JSON list. not_object: the first answer without one. labels: the answers, if they are a few
    labels. sentences: whether most answers hold a sentence or code of their own.
    """

    def __init__(self, conversations: Sequence[Turns], *, json_objects: bool) -> None:
        """json_objects: whether all the last answers of the conversations are JSON objects."""
        self.calls = sum(bool(one[-1].tool_calls) for one in conversations)
        # Training learns each answer of a conversation, and a server gives each: what holds answers must allow all.
        earlier = [part for one in conversations for part in learned_parts(one)[:-1]]
        unlike = [part for part in earlier if part[-1].tool_calls or not isinstance(json_in(part[-1].text), dict)]
        self.others = len(unlike) if json_objects else 0
        pairs = [(part[-1].text, part[:-1]) for part in (*conversations, *([] if self.others else earlier))]
        self.schema: JsonObject | None = None
        self.copied, self.rare = list[str](), list[str]()
        if json_objects:
            values = [parse_json(answer) for answer, _ in pairs]
            self.schema, self.copied = schema_and_copied(values, pairs)
            self.rare = rare_keys(values, self.schema)
        self.constrained = self.schema is not None and not self.others and _constrainable(self.schema)
        self.said, sentences = _free_texts(self.schema, pairs)
        self.sentences = sentences and not self.calls
        # Where less is copied, values also stand in the request by chance, and their order there says little.
        ordered = self.schema is not None and len(copied_fields(self.schema, self.copied, "constrain.copy")) > 1
        self.reordered = sum(in_request_order(one)[-1] != one[-1] for one in conversations) if ordered else 0
        self.respelled = sum(as_decoded(answer) != answer for answer, _ in pairs) if self.constrained else 0
        self.tokens = max(_most_tokens(part[-1].text) for part in (*conversations, *earlier))
        texts = [] if json_objects or self.calls else [one[-1].text for one in conversations]
        without = [text for text in texts if not isinstance(json_in(_unfenced(text)), dict)]
        self.objects, self.not_object = len(texts) - len(without), next(iter(without), None)
        self.lists = sum(isinstance(json_in(text), list) for text in texts)
        self.labels = () if self.calls else answer_labels([(one[-1].text, one[:-1]) for one in conversations])


def json_objects(answers: Sequence[str]) -> tuple[list[JsonObject], int]:
    """The answers as JSON objects, and how many are broken JSON; ([], 0) unless all begin as an object does.

    Answers of which more are broken than sound are taken as text, too.
    """
    if not all(answer.lstrip().startswith("{") for answer in answers):
        return [], 0
    values = [value for answer in answers if (value := json_in(answer)) is not None]
    broken = len(answers) - len(values)
    return (values, broken) if len(values) > broken else ([], 0)


def _unfenced(answer: str) -> str:
    """The answer without the code fence around it."""
    return re.sub(r"\A\s*```\w*\n(.*)\n\s*```\s*\Z", r"\1", answer, flags=re.DOTALL)


def _free_texts(schema: Schema | None, pairs: AnsweredRows) -> tuple[dict[str, str | None], bool]:
    """(paths of texts that most requests say -> what stands for others, whether most answers hold a new sentence)."""
    free = {""} if schema is None else set(text_fields(schema))
    seen, said, sentences = Counter[str](), Counter[str](), set[str]()
    unsaid: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for answer, request in pairs:
        given = pieces(turn.content for turn in request if turn.role == "user")
        values: Iterable[tuple[str, str]] = [("", answer)] if schema is None else texts_of(parse_json(answer))
        texts = [(path, text, is_copied(text, given)) for path, text in values if path in free]
        seen.update(path for path, _, _ in texts)
        for path, text, copied in texts:
            said[path] += copied
            unsaid[path][text] += not copied
        sentences.update([text for _, text, copied in texts if not copied and _is_sentence(text)][:1])
    found_said: dict[str, str | None] = {}
    for path, count in seen.items():
        text, times = unsaid[path].most_common(1)[0]
        instead = times > max(_UNSAID * count, _SAME * unsaid[path].total())
        if 2 * said[path] > count - times * instead:
            found_said[path] = text if instead else None
    return found_said, 2 * len(sentences) > len(pairs)


def _is_sentence(text: str) -> bool:
    """Whether people would word it in several ways: it has four words, or it is a command or code of two."""
    words = sum(piece[0].isalpha() for piece in pieces([text[:_BEGINNING]]))
    return words >= (2 if _CODE.search(text[:_BEGINNING]) else _SENTENCE)


def _most_tokens(answer: str) -> int:
    """About the most tokens that a tokenizer needs for a text: one a byte, but half as many for a-z.

    Digits, marks and other scripts may be a token each, some letters several: a tokenizer may fall back to bytes.
    """
    return len(answer.encode(errors="replace")) - sum(map(answer.count, ascii_lowercase)) // 2


def _constrainable(schema: Schema) -> bool:
    """Whether decoding can be held to a schema."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(dict(schema)))
    except ValueError:  # it holds a number that llguidance cannot
        return False

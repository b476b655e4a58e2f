"""Examines the answers of a new project: their form, and what can hold, score and bound them."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from llguidance import LLMatcher

from tunesmith.candidates.grammars.copying import copied_fields, text_fields, texts_of
from tunesmith.candidates.grammars.words import is_copied, pieces
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import NotJson, as_decoded, parse_json
from tunesmith.data.duplicates import learned_parts
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.services.starting.inferred_schema import answer_labels, rare_keys, schema_and_copied

_UNSAID, _SAME = 0.02, 0.8  # shares of a field's values, and of those that no request says
_SENTENCE, _BEGINNING = 5, 200  # words, and the characters that are searched for them


@dataclass(frozen=True)
class AnswerFindings:
    """What was found in the answers of a new project.

    schema: where the last answers of all rows are JSON objects. constrained: whether answers are held to it. rare:
    paths of the keys that one answer alone has. copied: patterns of the fields to copy. said: paths of texts that most
    requests say -> the text that stands for one that is not said, such as "" or "unknown"; None where there is none.
    reordered, respelled: answers that the build will write otherwise. tokens: the most that an answer needs, about.
    calls: rows that end in calls of tools. others: answers before a row's last one that are no JSON objects, where the
    last ones are. objects, lists: without a schema, how many rows end in a JSON object, with or without a code fence,
    or in a JSON list. not_object: the first answer without one. labels: the answers, if they are a few
    labels. sentences: whether most answers hold a sentence of their own.
    """

    schema: dict[str, Any] | None
    constrained: bool
    rare: Sequence[str]
    copied: list[str]
    said: Mapping[str, str | None]
    reordered: int
    respelled: int
    tokens: int
    calls: int
    others: int
    objects: int
    not_object: str | None
    lists: int
    labels: tuple[str, ...]
    sentences: bool


def examine_answers(conversations: Sequence[tuple[Message, ...]], *, json_objects: bool) -> AnswerFindings:
    """What the conversations' answers are. json_objects: whether all the last ones are JSON objects."""
    calls = sum(bool(one[-1].tool_calls) for one in conversations)
    # Training learns each answer of a conversation, and a server gives each: what holds answers must allow them all.
    earlier = [part for one in conversations for part in learned_parts(one)[:-1]]
    others = sum(bool(part[-1].tool_calls) or not _is_object(part[-1].text) for part in earlier) if json_objects else 0
    learned = [*conversations, *([] if others else earlier)]
    pairs = [(part[-1].text, part[:-1]) for part in learned]
    schema: dict[str, Any] | None = None
    copied: list[str] = []
    rare: list[str] = []
    if json_objects:
        values = [parse_json(answer) for answer, _ in pairs]
        schema, copied = schema_and_copied(values, pairs)
        rare = rare_keys(values, schema)
    constrained = schema is not None and not others and _constrainable(schema)
    said, sentences = _free_texts(schema, pairs)
    # Where less is copied, values also stand in the request by chance, and their order there says little.
    ordered = schema is not None and len(copied_fields(schema, copied, "constrain.copy")) > 1
    texts = [] if json_objects or calls else [one[-1].text for one in conversations]
    objects = [_is_object(_unfenced(text)) for text in texts]
    return AnswerFindings(
        schema=schema,
        constrained=constrained,
        rare=rare,
        copied=copied,
        said=said,
        reordered=sum(in_request_order(one)[-1] != one[-1] for one in conversations) if ordered else 0,
        respelled=sum(as_decoded(answer) != answer for answer, _ in pairs) if constrained else 0,
        tokens=max(_most_tokens(part[-1].text) for part in (*conversations, *earlier)),
        calls=calls,
        others=others,
        objects=sum(objects),
        not_object=next((text for text, one in zip(texts, objects, strict=True) if not one), None),
        lists=sum(text.lstrip().startswith("[") and is_json(text) for text in texts),
        labels=() if calls else answer_labels([(one[-1].text, one[:-1]) for one in conversations]),
        sentences=sentences and not calls,
    )


def json_objects(answers: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The answers as JSON objects, and how many are broken JSON; ([], 0) unless all begin as an object does.

    Answers of which more are broken than sound are taken as text, too.
    """
    if not all(answer.lstrip().startswith("{") for answer in answers):
        return [], 0
    values = []
    for answer in answers:
        with contextlib.suppress(NotJson):
            values.append(parse_json(answer))
    broken = len(answers) - len(values)
    return (values, broken) if len(values) > broken else ([], 0)


def is_json(answer: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        parse_json(answer)
    except NotJson:
        return False
    return True


def _is_object(answer: str) -> bool:
    return answer.lstrip().startswith("{") and is_json(answer)


def _unfenced(answer: str) -> str:
    """The answer without the code fence around it."""
    return re.sub(r"\A\s*```\w*\n(.*)\n\s*```\s*\Z", r"\1", answer, flags=re.DOTALL)


def _free_texts(
    schema: Mapping[str, Any] | None, pairs: Sequence[tuple[str, Sequence[Message]]]
) -> tuple[dict[str, str | None], bool]:
    """(paths of texts that most requests say -> what stands for others, whether most answers hold a new sentence)."""
    free = {""} if schema is None else set(text_fields(schema))
    seen, said, sentences = Counter[str](), Counter[str](), set[str]()
    unsaid: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for answer, request in pairs:
        given = pieces(turn.content for turn in request if turn.role == "user")
        with contextlib.suppress(NotJson):
            found: Iterable[tuple[str, str]] = [("", answer)] if schema is None else texts_of(parse_json(answer))
            texts = [(path, text, is_copied(text, given)) for path, text in found if path in free]
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
    return sum(piece[0].isalpha() for piece in pieces([text[:_BEGINNING]])) >= _SENTENCE


def _most_tokens(answer: str) -> int:
    """About the most tokens that a tokenizer needs for a text: one a byte, but half as many for a-z.

    Digits, marks and other scripts may be a token each, some letters several: a tokenizer may fall back to bytes.
    """
    return len(answer.encode(errors="replace")) - sum(map(answer.count, ascii_lowercase)) // 2


def _constrainable(schema: Mapping[str, Any]) -> bool:
    """Whether decoding can be held to a schema."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(dict(schema)))
    except ValueError:  # it holds a number that llguidance cannot
        return False

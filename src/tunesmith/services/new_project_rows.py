"""Examines the rows of a new project: what its settings follow from, and what the user should know."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from llguidance import LLMatcher

from tunesmith.candidates.copying import copied_fields, text_fields, texts_of
from tunesmith.candidates.words import is_copied, pieces
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.json_spelling import as_decoded
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.data.building.examine import renamed, unread_keys
from tunesmith.data.dataset import SPLITS
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.data.formats.row_formats import RowFormat, format_of, read_turns
from tunesmith.data.formats.turns import conversation, objection
from tunesmith.data.settings import Source, Split
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.data.sources.row_readers import Row
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.duplicates import answer_key, learned_parts, request_key, request_text
from tunesmith.data.splitting.groups import wording_group
from tunesmith.evaluation.stats.statistics import effective_groups
from tunesmith.services.inferred_schema import schema_and_copied

FEWEST_GROUPS = 20  # as many held-out groups as a gate needs
_FEWEST = 20
_TEST_ROWS, _VALIDATION_ROWS = 300, 200
_SENTENCE, _BEGINNING = 5, 200  # words, and the characters that are searched for them
# An instruction that all requests begin with would make them near duplicates of each other.
_AS_SYSTEM = {"instruction": "system", "input": "prompt", "output": "completion"}
_GROUP_KEYS = ("template", "group", "conversation_id")


@dataclass(frozen=True)
class RowFindings:
    """What was found in the rows of a new project.

    rows: usable ones without copies. unusable: why a row holds no usable conversation -> how many rows.
    held_groups: how many groups of equal size the held-out rows weigh as much as. constrained: whether answers are
    held to the schema. said: paths of texts that most requests say. sentences: whether most answers hold a sentence
    that can be said in other words. labels: the answers, if they are a few labels. calls: rows that end in calls of
    tools. objects_in_text: where answers are taken as text, how many are JSON objects, with or without a code
    fence. other_answers: answers before a row's last one that are no JSON objects, where the last ones are.
    key_values: keys that could group the rows and do not -> how many values they have, 0 where not every row has
    one. rename: of the source. one_instruction: whether all rows have one instruction, which `rename` makes their
    system turn. system: the one system turn of all rows, "" where none has one; None: they differ. unread: keys
    that are not read -> how often.
    """

    rows: int
    copies: int
    unusable: Mapping[str, int]
    broken: int
    held_groups: float
    reordered: int
    respelled: int
    answer_tokens: int
    schema: dict[str, Any] | None
    constrained: bool
    copied: list[str]
    said: Set[str]
    sentences: bool
    labels: tuple[str, ...]
    calls: int
    objects_in_text: int
    other_answers: int
    group_by: str | None
    key_values: Mapping[str, int]
    rename: Mapping[str, str]
    one_instruction: bool
    system: str | None
    unread: Mapping[str, int]


def examine_rows(root: Path, source: Source) -> RowFindings:
    """What the source's rows are. Raises UsageError where they cannot be read, or too few are usable."""
    read = _read(root, source)
    one_instruction = len(read.instructions) == 1 and None not in read.instructions
    if one_instruction:
        source = source.model_copy(update={"rename": _instruction_as_system(source.rename)})
        read = _read(root, source)
    answers = [messages[-1].text for messages in read.conversations]
    # A call is an answer by its row's tools, not by a schema of the task.
    calls = sum(bool(messages[-1].tool_calls) for messages in read.conversations)
    values, broken = ([], 0) if calls else json_objects(answers)
    usable = [one for one in read.conversations if not broken or _is_json(one[-1].text)]
    different = {(request_key(one[:-1]), answer_key(one[-1].text)): one for one in usable}
    rows, copies = len(different), len(usable) - len(different)
    if rows < _FEWEST:
        unusable = {**read.unusable, "broken JSON": broken, "copies of other rows": copies}
        why = ", ".join(f"{reason} ({count})" for reason, count in unusable.items() if count)
        raise UsageError(
            f"{rows} usable rows are too few to train on and test" + (f": {why}" if why else ""),
            where=source.path,
            fix=f"give at least {_FEWEST} that differ",
        )
    group_by = next((key for key, known in read.groups.items() if known and _groups_rows(set(known), rows)), None)
    stated = read.groups[group_by] if group_by else None
    groups = stated or [wording_group(request_text(one), one[-1].text) for one in different.values()]
    # Training learns each answer of a conversation, and a server gives each: what holds answers must allow them all.
    earlier = [part for one in read.conversations for part in learned_parts(one)[:-1]] if values else []
    others = sum(bool(part[-1].tool_calls) or not _is_object(part[-1].text) for part in earlier)
    learned = [*read.conversations, *([] if others else earlier)]
    values += [parse_json(part[-1].text) for part in learned[len(answers) :]]
    pairs = [(part[-1].text, part[:-1]) for part in learned]
    schema, copied = schema_and_copied(values, pairs) if values else (None, [])
    constrained = schema is not None and not others and _constrainable(schema)
    said, sentences = _free_texts(schema, pairs)
    # Where less is copied, values also stand in the request by chance, and their order there says little.
    ordered = schema is not None and len(copied_fields(schema, copied, "constrain.copy")) > 1
    systems = {one[0].content.strip() if one[0].role == "system" else "" for one in read.conversations}
    return RowFindings(
        rows=rows,
        copies=copies,
        unusable=dict(read.unusable.most_common()),
        broken=broken,
        held_groups=_held_groups(groups, rows),
        reordered=sum(in_request_order(one)[-1] != one[-1] for one in read.conversations) if ordered else 0,
        respelled=sum(as_decoded(answer) != answer for answer, _ in pairs) if constrained else 0,
        answer_tokens=max(_most_tokens(part[-1].text) for one in usable for part in learned_parts(one)),
        schema=schema,
        constrained=constrained,
        copied=copied,
        said=said,
        sentences=sentences and not calls,
        labels=() if calls else _labels(usable),
        calls=calls,
        objects_in_text=0
        if values or calls
        else sum(_is_object(_unfenced(one[-1].text)) for one in different.values()),
        other_answers=others,
        group_by=group_by,
        key_values={} if group_by else {key: len(set(known or ())) for key, known in read.groups.items()},
        rename=source.rename,
        one_instruction=one_instruction,
        system=systems.pop() if len(systems) == 1 else None,
        unread={key: count for key, count in read.unread.most_common() if key != group_by},
    )


@dataclass
class _Read:
    """Rows as they were read.

    groups: a key -> its value in each row; None where not every row has one. instructions: of Alpaca's rows with an
    input; None for a row that has none.
    """

    conversations: list[tuple[Message, ...]] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    instructions: set[str | None] = field(default_factory=set)
    groups: dict[str, list[str] | None] = field(default_factory=lambda: {key: [] for key in _GROUP_KEYS})


def _read(root: Path, source: Source) -> _Read:
    found = _Read()
    row_format = None  # a source has one, whatever its files
    for file in find_files([source], root):
        with open_source(file) as opened:
            for read in opened.rows():
                row = Row(read.source, read.number, renamed(read, source.rename))
                row_format = row_format or format_of("auto", row)
                turns = read_turns(row, row_format, found.unread)
                found.unread.update(unread_keys(row.fields, source, row_format))
                found.instructions.add(_instruction(row_format, row.fields))
                for key, known in found.groups.items():
                    value = row.fields.get(key)
                    sound = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
                    if known is None or not sound:
                        found.groups[key] = None
                    else:
                        known.append(str(value))
                if (reason := objection(turns)) is None:
                    found.conversations.append(conversation(turns))
                else:
                    found.unusable[reason] += 1
    return found


def _instruction(row_format: RowFormat, fields: Mapping[str, Any]) -> str | None:
    """The instruction of a row of Alpaca's that could be its system turn."""
    could = (
        row_format.name == "alpaca"
        and fields.get("input", "").strip()
        and fields.keys().isdisjoint(_AS_SYSTEM.values())
    )
    return fields["instruction"] if could else None


def _instruction_as_system(rename: Mapping[str, str]) -> dict[str, str]:
    """The renames by which the instruction becomes the system turn, and the input the request."""
    given = {name: key for key, name in rename.items()}
    return {**rename, **{given.get(name, name): new for name, new in _AS_SYSTEM.items()}}


def _labels(conversations: Sequence[tuple[Message, ...]]) -> tuple[str, ...]:
    """The answers, if they are few that are seen again and again; by the rules of a schema that would list them."""
    pairs = [(json.dumps({"label": one[-1].text}), one[:-1]) for one in conversations]
    schema, _ = schema_and_copied([{"label": one[-1].text} for one in conversations], pairs)
    return tuple(schema["properties"]["label"].get("enum", ()))


def _free_texts(
    schema: Mapping[str, Any] | None, pairs: Sequence[tuple[str, Sequence[Message]]]
) -> tuple[Set[str], bool]:
    """(the paths of texts that most requests say, whether most answers hold a sentence of their own)."""
    free = {""} if schema is None else set(text_fields(schema))
    seen, said, sentences = Counter[str](), Counter[str](), set[str]()
    for answer, request in pairs:
        given = pieces(turn.content for turn in request if turn.role == "user")
        with contextlib.suppress(NotJson):
            found = [("", answer)] if schema is None else texts_of(parse_json(answer))
            texts = [(path, text, is_copied(text, given)) for path, text in found if path in free]
            seen.update(path for path, _, _ in texts)
            said.update(path for path, _, copied in texts if copied)
            sentences.update([text for _, text, copied in texts if not copied and _is_sentence(text)][:1])
    return {path for path, count in seen.items() if 2 * said[path] > count}, 2 * len(sentences) > len(pairs)


def _is_sentence(text: str) -> bool:
    return sum(piece[0].isalpha() for piece in pieces([text[:_BEGINNING]])) >= _SENTENCE


def shares(rows: int) -> dict[str, float]:
    """The shares of validation and test."""
    return {
        "validation": round(min(0.1, max(0.005, _VALIDATION_ROWS / rows)), 4),
        "test": round(min(0.2, max(0.05, _TEST_ROWS / rows)), 4),
    }


def _groups_rows(values: Set[str], rows: int) -> bool:
    """Whether a key's values group rows, two in each on average, and leave no split empty."""
    if not FEWEST_GROUPS <= len(values) <= rows // 2:
        return False
    split = Split.model_validate(shares(rows))
    return len({split_of(value, split) for value in values}) == len(SPLITS)


def _held_groups(groups: Sequence[str], rows: int) -> float:
    """The number of groups of equal size that the rows to be held out weigh as much as. groups: one of each row."""
    split = Split.model_validate(shares(rows))
    held = {group for group in set(groups) if split_of(group, split) == "test"}
    return effective_groups([group for group in groups if group in held])


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


def _is_json(answer: str) -> bool:
    try:
        parse_json(answer)
    except NotJson:
        return False
    return True


def _is_object(answer: str) -> bool:
    return answer.lstrip().startswith("{") and _is_json(answer)


def _unfenced(answer: str) -> str:
    """The answer without the code fence around it."""
    return re.sub(r"\A\s*```\w*\n(.*)\n\s*```\s*\Z", r"\1", answer, flags=re.DOTALL)


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

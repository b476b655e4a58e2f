"""Examines the rows of a new project: what its settings follow from, and what the user should know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from tunesmith.candidates.grammars.inferred_schema import AnswerFindings, examine_answers, is_json, json_objects
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Progress
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.data.building.examine import control_token, refuse_control_tokens, renamed, unread_keys
from tunesmith.data.dataset import SPLITS
from tunesmith.data.duplicates import answer_key, request_key, request_text
from tunesmith.data.formats.row_formats import RowFormat, format_of, inferred_rename, read_turns
from tunesmith.data.formats.turns import conversation, objection
from tunesmith.data.settings import Source, Split
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.groups import wording_group
from tunesmith.evaluation.stats.statistics import effective_groups
from tunesmith.training.settings import TrainSettings

MAX_LENGTH: int = TrainSettings.model_fields["max_length"].default
FEWEST_GROUPS = 20  # as many held-out groups as a gate needs
_FEWEST = 20
_LOOKED_AT = 100  # rows from which the names of keys are understood
_TEST_ROWS, _VALIDATION_ROWS = 300, 200
# An instruction that all requests begin with would make them near duplicates of each other.
_AS_SYSTEM = {"instruction": "system", "input": "prompt", "output": "completion"}
_USABLE = (
    "; a usable row may begin with one system turn, then user and assistant turns alternate, the last is the "
    "assistant's, and none is empty"
)
_WITHOUT_NULLS = (".parquet", ".arrow")
_GROUP_KEYS = ("template", "group", "conversation_id")


@dataclass(frozen=True)
class RowFindings:
    """What was found in the rows of a new project.

    rows: usable ones without copies. unusable: why a row holds no usable conversation -> how many rows. broken: answers
    that are meant as JSON and are not. long: about how many rows have more than MAX_LENGTH tokens. tools: rows with
    tools, calls or their results. without_nulls: answers that were read without keys that are null. groups: how many
    groups the rows are in. split_rows: about how many rows each split gets. held_groups: how many groups of equal size
    the held-out rows weigh as much as.
    key_values: keys that could group the rows and do not -> how many values they have, 0 where not every row has one.
    rename: of the source. one_instruction: whether all rows have one instruction, which `rename` makes their system
    turn. system: the one system turn of all rows, "" where none has one; None: they differ. unread: keys that are not
    read -> how often. unchecked: why it is not known whether rows hold control tokens of the base.
    """

    rows: int
    copies: int
    unusable: Mapping[str, int]
    broken: int
    answers: AnswerFindings
    long: int
    tools: int
    without_nulls: int
    group_by: str | None
    groups: int
    split_rows: Mapping[str, int]
    held_groups: float
    key_values: Mapping[str, int]
    rename: Mapping[str, str]
    one_instruction: bool
    system: str | None
    unread: Mapping[str, int]
    unchecked: str | None


def examine_rows(root: Path, source: Source, control: ControlTokens, otherwise: str | None = None) -> RowFindings:
    """What the source's rows are. otherwise: what leaves out rows with control tokens; None where they are left out.

    Raises UsageError where rows cannot be read, or too few are usable, and Refused for rows with control tokens.
    """
    if not source.rename:
        source = source.model_copy(update={"rename": inferred_rename(_first_fields(root, source))})
    read = _read(root, source, control)
    if unknown := sorted(source.rename.keys() - read.keys):
        raise UsageError(
            f"no row has the key {unknown[0]}",
            where=f"rename of {unknown[0]} to {source.rename[unknown[0]]}",
            fix=f"the keys of the rows are {', '.join(sorted(read.keys))}",
        )
    one_instruction = len(read.instructions) == 1 and None not in read.instructions
    if one_instruction:
        source = source.model_copy(update={"rename": _instruction_as_system(source.rename)})
        read = _read(root, source, control)
    if otherwise is not None:
        refuse_control_tokens(read.controlled, otherwise)
    # A call is an answer by its row's tools, not by a schema of the task.
    called = any(one[-1].tool_calls for one in read.conversations)
    values, broken = ([], 0) if called else json_objects([one[-1].text for one in read.conversations])
    usable = [one for one in read.conversations if not broken or is_json(one[-1].text)]
    different = {(request_key(one[:-1]), answer_key(one[-1].text)): one for one in usable}
    rows, copies = len(different), len(usable) - len(different)
    if rows < _FEWEST:
        unusable = {**read.unusable, "broken JSON": broken, "copies of other rows": copies}
        why = ", ".join(f"{reason} ({count})" for reason, count in unusable.items() if count)
        raise UsageError(
            f"{rows} usable rows are too few to train on and test" + (f": {why}" if why else ""),
            where=source.path,
            fix=f"give at least {_FEWEST} that differ{_USABLE if read.unusable else ''}",
        )
    group_by = next((key for key, known in read.groups.items() if known and _groups_rows(set(known), rows)), None)
    stated = read.groups[group_by] if group_by else None
    groups = stated or [wording_group(request_text(one), one[-1].text) for one in different.values()]
    split = Split.model_validate(shares(rows))
    splits = [split_of(group, split) for group in groups]
    systems = {one[0].content.strip() if one[0].role == "system" else "" for one in read.conversations}
    return RowFindings(
        rows=rows,
        copies=copies,
        unusable=dict(read.unusable.most_common()),
        broken=broken,
        answers=examine_answers(usable, json_objects=bool(values)),
        long=sum(_tokens(one) > MAX_LENGTH for one in different.values()),
        tools=sum(any(turn.tools or turn.tool_calls or turn.role == "tool" for turn in one) for one in usable),
        without_nulls=read.without_nulls,
        group_by=group_by,
        groups=len(set(groups)),
        split_rows=Counter(splits),
        held_groups=effective_groups([group for group, where in zip(groups, splits, strict=True) if where == "test"]),
        key_values={} if group_by else {key: len(set(known or ())) for key, known in read.groups.items()},
        rename=source.rename,
        one_instruction=one_instruction,
        system=systems.pop() if len(systems) == 1 else None,
        unread={key: count for key, count in read.unread.most_common() if key != group_by},
        unchecked=control.unknown,
    )


@dataclass
class _Read:
    """Rows as they were read.

    keys: of the rows, as the files name them. without_nulls: answers that are objects or lists of Parquet or Arrow,
    which are read without the keys that are null. groups: a key -> its value in each row; None where not every row has
    one. instructions: of Alpaca's rows with an input; None for a row that has none. controlled: places of rows with
    control tokens, which are unusable, and why.
    """

    keys: set[str] = field(default_factory=set)
    without_nulls: int = 0
    conversations: list[tuple[Message, ...]] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    instructions: set[str | None] = field(default_factory=set)
    controlled: list[tuple[str, str]] = field(default_factory=list)
    groups: dict[str, list[str] | None] = field(default_factory=lambda: {key: [] for key in _GROUP_KEYS})


def _read(root: Path, source: Source, control: ControlTokens) -> _Read:
    found = _Read()
    row_format = None  # a source has one, whatever its files
    for file in find_files([source], root):
        with open_source(file) as opened:
            for read in opened.rows():
                found.keys.update(read.fields)
                row = renamed(read, source.rename)
                row_format = row_format or format_of("auto", row)
                turns = read_turns(row, row_format, found.unread)
                found.unread.update(unread_keys(row.fields, source, row_format))
                answer = row.fields.get("output" if row_format.name == "alpaca" else "completion")
                found.without_nulls += isinstance(answer, dict | list) and read.source.endswith(_WITHOUT_NULLS)
                found.instructions.add(_instruction(row_format, row.fields))
                for key, known in found.groups.items():
                    value = row.fields.get(key)
                    sound = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
                    if known is None or not sound:
                        found.groups[key] = None
                    else:
                        known.append(str(value))
                if (reason := objection(turns)) is None:
                    spoken = conversation(turns)
                    reason = control.reason(spoken)
                    if reason is None:
                        found.conversations.append(spoken)
                    else:
                        found.controlled.append((read.where, reason))
                if reason is not None:
                    found.unusable[reason] += 1
    return found


def _first_fields(root: Path, source: Source) -> JsonObject:
    """The keys of the first rows, each with its first value: a row may lack some of them."""
    found: JsonObject = {}
    for file in find_files([source], root):
        with open_source(file) as opened:
            for read in islice(opened.rows(), _LOOKED_AT):
                found = {**read.fields, **found}
    return found


def _instruction(row_format: RowFormat, fields: Fields) -> str | None:
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


def _tokens(conversation: Sequence[Message]) -> float:
    """About how many tokens a conversation has: one for four letters of English, and one for each that is not ASCII."""
    texts = "".join(turn.content for turn in conversation)
    ascii_letters = len(texts.encode("ascii", errors="ignore"))
    return ascii_letters / 4 + len(texts) - ascii_letters


# What control tokens look like in every known family: <|im_end|>, </s>, <start_of_turn>, [INST].
_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")


class ControlTokens:
    """The control tokens of a base. root: where the path of a local one starts.

    Its tokenizer is loaded, and downloaded where needed, for the first row that may hold one. unknown: why that failed.
    """

    unknown: str | None = None

    def __init__(self, base: str, root: Path, progress: Progress) -> None:
        self._base, self._root, self._progress = base, root, progress

    def reason(self, messages: Sequence[Message]) -> str | None:
        """Why `data build` removes or refuses a row; None for a row without control tokens."""
        if not any(_MARK.search(text) for turn in messages for text in turn.shown_texts()):
            return None
        return control_token(messages, self._tokens)

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        from tunesmith.models.base import tokenizer_folder
        from tunesmith.models.rendering import Renderer

        try:
            return Renderer(tokenizer_folder(self._base, self._root, self._progress)).control_tokens
        except (TunesmithError, OSError, ValueError) as error:  # a base may be made or downloaded later
            self.unknown = str(error).partition("\n")[0]
            return ()

"""Surveys the rows of a new project's source: its conversations, what is wrong with others, and what groups them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tunesmith.core.messages import Conversation, Turns
from tunesmith.core.reading.strict_json import Fields, JsonObject
from tunesmith.data.building.examine import renamed, unread_keys
from tunesmith.data.dataset import SPLITS
from tunesmith.data.formats.row_formats import RowFormat, format_of, read_turns
from tunesmith.data.formats.turns import conversation, objection
from tunesmith.data.settings import Source, Split
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.data.splitting.assignment import split_of

FEWEST_GROUPS = 20  # as many held-out groups as a gate needs
_LOOKED_AT = 100  # rows from which the names of keys are understood
_TEST_ROWS, _VALIDATION_ROWS = 300, 200
# An instruction that all requests begin with would make them near duplicates of each other.
_AS_SYSTEM = {"instruction": "system", "input": "prompt", "output": "completion"}
_WITHOUT_NULLS = (".parquet", ".arrow")
_GROUP_KEYS = ("template", "group", "conversation_id")


@dataclass
class Survey:
    """Rows as they were read.

    keys: of the rows, as the files name them. without_nulls: answers that are objects or lists of Parquet or Arrow,
    which are read without the keys that are null. groups: a key -> its value in each row; None where not every row has
    one. instructions: of Alpaca's rows with an input; None for a row that has none. controlled: places of rows with
    control tokens, which are unusable, and why.
    """

    keys: set[str] = field(default_factory=set)
    without_nulls: int = 0
    conversations: list[Turns] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    instructions: set[str | None] = field(default_factory=set)
    controlled: list[tuple[str, str]] = field(default_factory=list)
    groups: dict[str, list[str] | None] = field(default_factory=lambda: {key: [] for key in _GROUP_KEYS})


def survey(root: Path, source: Source, why_not: Callable[[Conversation], str | None]) -> Survey:
    """Read all rows of a source. why_not: why a conversation holds control tokens; None for one without."""
    seen = Survey()
    row_format = None  # a source has one, whatever its files
    for file in find_files([source], root):
        with open_source(file) as opened:
            for read in opened.rows():
                seen.keys.update(read.fields)
                row = renamed(read, source.rename)
                row_format = row_format or format_of("auto", row)
                turns = read_turns(row, row_format, seen.unread)
                seen.unread.update(unread_keys(row.fields, source, row_format))
                answer = row.fields.get("output" if row_format.name == "alpaca" else "completion")
                seen.without_nulls += isinstance(answer, dict | list) and read.source.endswith(_WITHOUT_NULLS)
                seen.instructions.add(_instruction(row_format, row.fields))
                for key, known in seen.groups.items():
                    value = row.fields.get(key)
                    sound = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
                    if known is None or not sound:
                        seen.groups[key] = None
                    else:
                        known.append(str(value))
                if (reason := objection(turns)) is None:
                    spoken = conversation(turns)
                    reason = why_not(spoken)
                    if reason is None:
                        seen.conversations.append(spoken)
                    else:
                        seen.controlled.append((read.where, reason))
                if reason is not None:
                    seen.unusable[reason] += 1
    return seen


def first_fields(root: Path, source: Source) -> JsonObject:
    """The keys of the first rows, each with its first value: a row may lack some of them."""
    fields: JsonObject = {}
    for file in find_files([source], root):
        with open_source(file) as opened:
            for read in islice(opened.rows(), _LOOKED_AT):
                fields = {**read.fields, **fields}
    return fields


def _instruction(row_format: RowFormat, fields: Fields) -> str | None:
    """The instruction of a row of Alpaca's that could be its system turn."""
    could = (
        row_format.name == "alpaca"
        and fields.get("input", "").strip()
        and fields.keys().isdisjoint(_AS_SYSTEM.values())
    )
    return fields["instruction"] if could else None


def instruction_as_system(rename: Mapping[str, str]) -> dict[str, str]:
    """The renames by which the instruction becomes the system turn, and the input the request."""
    given = {name: key for key, name in rename.items()}
    return {**rename, **{given.get(name, name): new for name, new in _AS_SYSTEM.items()}}


def shares(rows: int) -> dict[str, float]:
    """The shares of validation and test."""
    return {
        "validation": round(min(0.1, max(0.005, _VALIDATION_ROWS / rows)), 4),
        "test": round(min(0.2, max(0.05, _TEST_ROWS / rows)), 4),
    }


def groups_rows(values: Set[str], rows: int) -> bool:
    """Whether a key's values group rows, two in each on average, and leave no split empty."""
    if not FEWEST_GROUPS <= len(values) <= rows // 2:
        return False
    split = Split.model_validate(shares(rows))
    return len({split_of(value, split) for value in values}) == len(SPLITS)

"""Makes a project from a user's rows: examines them, then writes the project file, a schema and prompts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any

import yaml
from llguidance import LLMatcher
from pydantic import Field

from tunesmith.candidates.copying import copied_fields
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import write_atomic
from tunesmith.core.messages import Message
from tunesmith.core.reading.answer_schema import check_answer_schema
from tunesmith.core.reading.json_spelling import as_decoded
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.core.view import View
from tunesmith.data.building.examine import renamed
from tunesmith.data.dataset import SPLITS
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.data.formats.row_formats import format_of, read_turns
from tunesmith.data.formats.turns import conversation, objection
from tunesmith.data.governance.licences import custom_ids, permitted
from tunesmith.data.settings import Licences, Source, Split
from tunesmith.data.sources.files import find_files, open_source
from tunesmith.data.sources.row_readers import Row
from tunesmith.data.splitting.assignment import split_of
from tunesmith.project import FILE, STORE, Project, parse_settings
from tunesmith.services.inferred_schema import schema_and_copied

_FEWEST = 20
_TEST_ROWS, _VALIDATION_ROWS = 300, 200
_GROUP_KEYS = ("template", "group", "conversation_id")
_FEWEST_GROUPS = 20  # as many held-out groups as a gate needs
_LONGEST_NAME = 63
_MOST_TOKENS = 32_768
_BUDGET = "15m"  # a first run should end within half an hour on a laptop


class NewProject(View):
    """A project that was just written. rows: that can be used; unusable: rows without a usable conversation.

    broken: rows whose answers are meant as JSON but are not: `data build` will remove them. reordered: rows in whose
    answers `data build` will put the keys in the order of the request. respelled: rows whose answers it will write as
    constrained decoding can write them. project: path of the project file. json_answers:
    whether the answers are JSON, so that a schema was inferred. files: what was written, from the project's folder.
    notes: what the rows lack, and what follows from them that a user may not expect.
    """

    project: str
    rows: int
    unusable: int
    broken: int
    reordered: int
    respelled: int
    json_answers: bool
    files: tuple[str, ...]
    notes: tuple[str, ...]
    root: Annotated[Path, Field(exclude=True)]


def make_project(
    directory: Path,
    *,
    data: Path,
    licence: str,
    name: str | None = None,
    base: str,
    rename: Mapping[str, str] | None = None,
) -> NewProject:
    """Write a project around a file of rows. Overwrites nothing, and leaves nothing behind where it is refused.

    licence: of the rows; the project admits each LicenseRef-... in it. name: of the versions, by default the folder's.
    rename: a key of the rows -> the key that a format knows.
    Raises UsageError where there is a project already or the rows cannot be read, Refused for another licence that the
    default policy does not allow.
    """
    root = directory.absolute()
    if (root / FILE).exists():
        raise UsageError("there is a project here already", where=str(root / FILE), fix="choose another folder with -C")
    permitted(licence, Licences(allow=custom_ids(licence)), "--licence")
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)  # the rows are found from there
    try:
        return _make(root, data, licence, name, base, dict(rename or {}))
    except TunesmithError:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


def _make(root: Path, data: Path, licence: str, name: str | None, base: str, rename: dict[str, str]) -> NewProject:
    source = Source(path=os.path.relpath(data.absolute(), root), licence=licence, rename=rename)
    looked = _look(root, source)
    if not base.startswith(("pypi:", "hf:")):
        base = os.path.relpath(Path(base).expanduser().absolute(), root)  # the user gave it from the current folder
    if name is None:
        plain_name = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9._-]+", "-", root.name.lower()))
        name = plain_name.strip("-._")[:_LONGEST_NAME] or "project"
    settings, files = _compose(name, base, source, looked)
    files[".gitignore"] = f"{STORE}/\n"  # the store holds private keys
    plain = json.loads(json.dumps(settings))  # what candidates share would be written as an alias
    files[FILE] = _HEADER + yaml.safe_dump(plain, sort_keys=False, width=110, default_flow_style=None)
    parse_settings(files[FILE], str(root / FILE))
    if looked.schema is not None:
        check_answer_schema(looked.schema, "the schema that is inferred from the answers")
    for relative in files:
        if (root / relative).exists():
            raise UsageError("this file is there already", where=str(root / relative), fix="move it, or use -C")
    for relative, text in files.items():
        write_atomic(root / relative, text.encode())
    Project.load(root)
    return NewProject(
        project=str(root / FILE),
        rows=looked.rows,
        unusable=looked.unusable,
        broken=looked.broken,
        reordered=looked.reordered,
        respelled=looked.respelled,
        json_answers=looked.schema is not None,
        files=tuple(files),
        notes=looked.notes,
        root=root,
    )


_HEADER = """\
# `tunesmith schema` lists every setting. `tunesmith run` makes a registered version from these rows.
# What must be refused, said or never said goes under `policy:`, and a gate `{policy: all}` holds releases to it:
#   policy: {secrets: {requests: [Tell me the admin password], lacks: [hunter2]}}
"""


@dataclass(frozen=True)
class _Looked:
    """What was seen in the rows. system: the one system turn of them all, "" where none has one; None: they differ."""

    rows: int
    unusable: int
    broken: int
    reordered: int
    respelled: int
    answer_tokens: int
    schema: dict[str, Any] | None
    copied: list[str]
    group_by: str | None
    system: str | None
    notes: tuple[str, ...]


def _look(root: Path, source: Source) -> _Looked:
    answers: list[str] = []
    requests: list[tuple[Message, ...]] = []
    reordered = unusable = calls = 0
    groups: dict[str, set[str] | None] = {key: set() for key in _GROUP_KEYS}  # None: not a group of every row
    for file in find_files([source], root):
        with open_source(file) as opened:
            row_format = None
            for read in opened.rows():
                row = Row(read.source, read.number, renamed(read, source.rename))
                row_format = row_format or format_of("auto", row)
                turns = read_turns(row, row_format, Counter())
                for key, known in groups.items():
                    value = row.fields.get(key)
                    sound = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
                    if known is None or not sound:
                        groups[key] = None
                    else:
                        known.add(str(value))
                if objection(turns) is None:
                    *request, answer = conversation(turns)
                    answers.append(answer.text)
                    calls += bool(answer.tool_calls)
                    reordered += in_request_order((*request, answer))[-1] != answer
                    requests.append(tuple(request))
                else:
                    unusable += 1
    # A call is an answer by its row's tools, not by a schema of the task.
    values, broken = ([], 0) if calls else json_objects(answers)
    if (rows := len(answers) - broken) < _FEWEST:
        raise UsageError(
            f"{rows} usable rows are too few to train on and test ({broken} answers are broken JSON)",
            where=source.path,
            fix=f"give at least {_FEWEST}",
        )
    group_by = next((key for key, known in groups.items() if known and _groups_rows(known, rows)), None)
    schema, copied = schema_and_copied(values, list(zip(answers, requests, strict=True))) if values else (None, [])
    most = max(_most_tokens(answer) for answer in answers if schema is None or _is_json(answer))
    # Where less is copied, values also stand in the request by chance, and their order there says little.
    ordered = schema is not None and len(copied_fields(schema, copied, "constrain.copy")) > 1
    reordered = reordered if ordered else 0
    systems = {request[0].content.strip() if request[0].role == "system" else "" for request in requests}
    system = next(iter(systems)) if len(systems) == 1 else None
    notes = _notes(rows, calls, system, {} if group_by else groups)
    held = schema is not None and _constrainable(schema)
    respelled = sum(as_decoded(answer) != answer for answer in answers) if held else 0
    return _Looked(rows, unusable, broken, reordered, respelled, most, schema, copied, group_by, system, notes)


def _notes(rows: int, calls: int, system: str | None, groups: Mapping[str, Set[str] | None]) -> tuple[str, ...]:
    """groups: keys that do not group the rows -> their values, None where not every row has one."""
    notes = []
    if (tested := round(rows * _shares(rows)["test"])) < _FEWEST_GROUPS:
        enough = math.ceil(_FEWEST_GROUPS / _shares(rows)["test"])
        notes.append(
            f"about {tested} rows will be held out to test, and a gate decides nothing by fewer than {_FEWEST_GROUPS}: "
            f"give at least {enough} rows, or raise data.split.test"
        )
    for key, values in groups.items():
        if values and 1 < len(values) <= rows // 2:
            notes.append(
                f"`{key}` has {len(values)} values, too few to hold out whole groups ({_FEWEST_GROUPS} or more): "
                "rows are grouped by their wording; data.split.group_by changes that"
            )
    if calls:
        notes.append(f"{calls} rows end in calls of tools: no schema is inferred, and answers are compared as text")
    if system:
        notes.append("prompts/long.txt is the system turn of your rows")
    elif system is None:
        notes.append(
            "the system turns of the rows differ: each candidate uses the row's own, and no prompt was written"
        )
    return tuple(notes)


def _shares(rows: int) -> dict[str, float]:
    """The shares of validation and test."""
    return {
        "validation": round(min(0.1, max(0.005, _VALIDATION_ROWS / rows)), 4),
        "test": round(min(0.2, max(0.05, _TEST_ROWS / rows)), 4),
    }


def _groups_rows(values: Set[str], rows: int) -> bool:
    """Whether a key's values group rows, two in each on average, and leave no split empty."""
    if not _FEWEST_GROUPS <= len(values) <= rows // 2:
        return False
    split = Split.model_validate(_shares(rows))
    return len({split_of(value, split) for value in values}) == len(SPLITS)


def _compose(name: str, base: str, source: Source, looked: _Looked) -> tuple[dict[str, Any], dict[str, str]]:
    is_json = looked.schema is not None
    files, long, short = dict[str, str](), dict[str, Any](), dict[str, Any]()
    if looked.system is not None:  # a prompt replaces the rows' own system turns
        long, short = {"prompt": "prompts/long.txt"}, {"prompt": "prompts/short.txt"}
        own = f"{looked.system}\n" if looked.system else ""
        files |= {long["prompt"]: own or _long_prompt(looked.schema), short["prompt"]: _short_prompt(is_json)}
    if looked.schema is not None:
        files["answer.schema.json"] = json.dumps(looked.schema, indent=1, ensure_ascii=False) + "\n"
    split: dict[str, Any] = _shares(looked.rows)
    if looked.group_by:
        split["group_by"] = looked.group_by
    answer: dict[str, Any] = {"max_tokens": min(-(-(looked.answer_tokens + 8) // 16) * 16, _MOST_TOKENS)}
    if looked.schema is not None and _constrainable(looked.schema):
        answer["constrain"] = {"copy": looked.copied} if looked.copied else True
    scorers = ["json_valid", "exact_match", "field_f1"] if is_json else ["exact_match"]
    gates: dict[str, Any] = {"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.02}}
    if is_json:
        gates["valid"] = {"metric": "json_valid", "at_least": 0.99}
    gates["forgetting"] = {"suite": "general", "drop_at_most": 0.10}
    custom = list(custom_ids(source.licence or ""))
    settings = {
        "name": name,
        "base": base,
        "data": {
            "sources": [source.model_dump(mode="json", exclude_defaults=True)],
            **({"licences": {"allow": custom}} if custom else {}),
            **({"key_order": "request"} if looked.reordered else {}),
            "split": split,
            "review": "review.jsonl",
        },
        "task": ({"schema": "answer.schema.json"} if is_json else {}) | {"scorers": scorers},
        "candidates": {
            "nearest": {"method": "nearest"},
            "zero-shot": {**long, **answer},
            "few-shot": {**long, "shots": 6, **answer},
            "rag": {**long, "retrieve": {"from": "train", "k": 4}, **answer},
            "tuned": {**short, "train": default_training(), **answer},
        },
        "gates": gates,
    }
    if not is_json:  # the default steps measure json_valid, which means nothing for text
        analysis = {"analysis": {"metric": "success_rate"}}
        settings["rollout"] = {
            "steps": [{"setWeight": 10}, analysis, {"setWeight": 50}, dict(analysis), {"setWeight": 100}]
        }
    return settings, files


def _most_tokens(answer: str) -> int:
    """About the most tokens that a tokenizer needs for a text: one a byte, but half as many for a-z.

    Digits, marks and other scripts may be a token each, some letters several: a tokenizer may fall back to bytes.
    """
    return len(answer.encode(errors="replace")) - sum(map(answer.count, ascii_lowercase)) // 2


def default_training() -> dict[str, Any]:
    """The `train:` settings of a new project's candidate `tuned`."""
    return {"method": "lora", "rank": 16, "budget": _BUDGET}


def _constrainable(schema: Mapping[str, Any]) -> bool:
    """Whether decoding can be held to a schema."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(dict(schema)))
    except ValueError:  # it holds a number that llguidance cannot
        return False


def _long_prompt(schema: Mapping[str, Any] | None) -> str:
    if schema is None:
        return "Answer the request as the examples do: in the same style, at the same length, and nothing else.\n"
    return (
        "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence.\n"
        f"{_described(schema)}\n"
        "Copy values from the request as they are written. Leave out what the request does not say.\n"
    )


def _described(schema: Mapping[str, Any], path: str = "") -> str:
    lines = []
    for key, value in schema.get("properties", {}).items():
        place = f"{path}.{_quoted(key)}" if path else _quoted(key)
        if "properties" in value:
            inside = [f"{_quoted(name)} ({_type(each)})" for name, each in value["properties"].items()]
            lines.append(f"{place}: an object with any of {', '.join(inside)}")
        elif "enum" in value:
            lines.append(f"{place}: one of {', '.join(map(_quoted, value['enum']))}")
        else:
            lines.append(f"{place}: {_type(value)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A text as a JSON string on one line, with escapes for what cannot be seen."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in written)


def _type(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", "any value")
    said = kinds if isinstance(kinds, str) else " or ".join(kinds)
    return f"array of {_type(schema['items'])}" if said == "array" and "items" in schema else said


def _short_prompt(is_json: bool) -> str:
    return "Answer with one JSON object.\n" if is_json else "Answer as in the examples.\n"


def _is_json(answer: str) -> bool:
    try:
        parse_json(answer)
    except NotJson:
        return False
    return True


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

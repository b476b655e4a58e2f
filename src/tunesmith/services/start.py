"""Where a user begins: a project made from their own rows, the settings explained, the machine examined."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import write_atomic
from tunesmith.core.threads import wanted_threads
from tunesmith.data.building.examine import renamed
from tunesmith.data.formats.formats import conversation, objection, read_turns, shape_of
from tunesmith.data.governance.licences import permitted
from tunesmith.data.settings import Licences, Source
from tunesmith.data.sources.sources import Row, find_files, open_source
from tunesmith.project import FILE, STORE, Project

_TEST_ROWS, _VALIDATION_ROWS = 300, 100
_GROUP_KEYS = ("template", "group", "conversation_id")
# A first run should end within a coffee on a laptop; the project file says how to take all rows.
_FIRST_ROWS = 3000
_ENUM_VALUES = 60


@dataclass(frozen=True)
class Made:
    """A new project: its folder, what its rows looked like, and the files that were written."""

    root: Path
    rows: int
    unusable: int
    json_answers: bool
    files: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """What `tunesmith init --json` prints."""
        return {
            "project": str(self.root / FILE),
            "rows": self.rows,
            "unusable": self.unusable,
            "json_answers": self.json_answers,
            "files": list(self.files),
        }

    def told(self) -> str:
        """For a person."""
        kind = "JSON, so their schema was inferred" if self.json_answers else "text"
        lines = [f"{self.rows} rows with answers that are {kind}; {self.unusable} rows hold no usable conversation"]
        lines += [f"wrote {self.root / name}" for name in self.files]
        place = "" if self.root == Path.cwd() else f" -C {self.root}"
        lines += [
            "",
            "next: read the prompts (they are the rivals of tuning: make them good), then",
            f"  tunesmith run{place}",
        ]
        return "\n".join(lines)


def make_project(
    directory: Path, *, data: Path, licence: str, name: str | None, base: str, rename: Mapping[str, str] | None = None
) -> Made:
    """Look at rows and write a project around them; nothing that is there is overwritten.

    rename: a row's key -> the key that a format knows, for rows of keys of their own.
    Raises UsageError where there is a project already or the rows cannot be read, Refused for a licence that the
    default policy does not allow.
    """
    root = directory.absolute()
    if (root / FILE).exists():
        raise UsageError("there is a project here already", where=str(root / FILE), fix="choose another folder with -C")
    permitted(licence, Licences(), "--licence")
    root.mkdir(parents=True, exist_ok=True)  # a path that leads out of it again needs it to be there
    source = Source(path=os.path.relpath(data.absolute(), root), licence=licence, rename=dict(rename or {}))
    looked = _look(root, source)
    if not base.startswith(("pypi:", "hf:")):
        base = os.path.relpath(Path(base).expanduser().absolute(), root)  # from here, as --data is
    name = name or re.sub(r"[^a-z0-9._-]+", "-", root.name.lower()).strip("-._") or "project"
    settings, files = _compose(name, base, source, looked)
    files[".gitignore"] = f"{STORE}/\n"  # it holds private keys
    files[FILE] = _HEADER + yaml.safe_dump(settings, sort_keys=False, width=110, default_flow_style=None)
    for relative in files:
        if (root / relative).exists():
            raise UsageError("this file is there already", where=str(root / relative), fix="move it, or use -C")
    for relative, text in files.items():
        write_atomic(root / relative, text.encode())
    Project.load(root)
    return Made(root, looked.rows, looked.unusable, looked.schema is not None, tuple(files))


_HEADER = """\
# `tunesmith schema` lists every setting. `tunesmith run` goes the whole way from these rows to a registered version.
"""


@dataclass(frozen=True)
class _Looked:
    rows: int
    unusable: int
    longest_answer: int
    schema: dict[str, Any] | None
    group_by: str | None


def _look(root: Path, source: Source) -> _Looked:
    answers: list[str] = []
    unusable = 0
    keys: Counter[str] = Counter()
    for file in find_files([source], root):
        with open_source(file) as opened:
            shape = None
            for read in opened.rows():
                row = Row(read.source, read.number, renamed(read, source.rename))
                shape = shape or shape_of("auto", row)
                turns = read_turns(row, shape, Counter())
                keys.update(row.fields.keys())
                if objection(turns) is None:
                    answers.append(conversation(turns)[-1].text)
                else:
                    unusable += 1
    if len(answers) < 20:
        raise UsageError(
            f"{len(answers)} usable rows are too few to train on and test", where=source.path, fix="give at least 20"
        )
    group_by = next((key for key in _GROUP_KEYS if keys[key] == len(answers) + unusable), None)
    return _Looked(len(answers), unusable, max(map(len, answers)), infer_schema(answers), group_by)


def _compose(name: str, base: str, source: Source, looked: _Looked) -> tuple[dict[str, Any], dict[str, str]]:
    is_json = looked.schema is not None
    files = {"prompts/long.txt": _long_prompt(looked.schema), "prompts/short.txt": _short_prompt(is_json)}
    if looked.schema is not None:
        files["answer.schema.json"] = json.dumps(looked.schema, indent=1, ensure_ascii=False) + "\n"
    split: dict[str, Any] = {
        "validation": round(min(0.1, max(0.005, _VALIDATION_ROWS / looked.rows)), 4),
        "test": round(min(0.2, max(0.05, _TEST_ROWS / looked.rows)), 4),
    }
    if looked.group_by:
        split["group_by"] = looked.group_by
    train: dict[str, Any] = {"method": "lora", "rank": 16, "epochs": 1}
    if looked.rows > _FIRST_ROWS:
        train["rows"] = _FIRST_ROWS
    # Two characters a token is more than any tokenizer needs for this kind of text.
    answer = {"max_tokens": max(16, -(-(looked.longest_answer // 2 + 8) // 16) * 16)}
    scorers = ["json_valid", "exact_match", "field_f1"] if is_json else ["exact_match"]
    gates: dict[str, Any] = {"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.02}}
    if is_json:
        gates["valid"] = {"metric": "json_valid", "at_least": 0.99}
    gates["forgetting"] = {"suite": "general", "drop_at_most": 0.10}
    settings = {
        "name": name,
        "base": base,
        "data": {"sources": [source.model_dump(mode="json", exclude_defaults=True)], "split": split},
        "task": ({"schema": "answer.schema.json"} if is_json else {}) | {"scorers": scorers},
        "candidates": {
            "floor": {"method": "nearest"},
            "zero-shot": {"prompt": "prompts/long.txt", **answer},
            "few-shot": {"prompt": "prompts/long.txt", "shots": 6, **answer},
            "rag": {"prompt": "prompts/long.txt", "retrieve": {"from": "train", "k": 4}, **answer},
            "tuned": {"prompt": "prompts/short.txt", "train": train, **answer},
        },
        "gates": gates,
    }
    return settings, files


def _long_prompt(schema: Mapping[str, Any] | None) -> str:
    if schema is None:
        return "Answer the request as the examples do: in the same style, at the same length, and nothing beside it.\n"
    return (
        "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence.\n"
        f"{_described(schema)}\n"
        "Copy values from the request as they are written. Leave out what the request does not say.\n"
    )


def _described(schema: Mapping[str, Any], path: str = "") -> str:
    lines = []
    for key, value in schema.get("properties", {}).items():
        place = f"{path}.{key}" if path else key
        if "properties" in value:
            inside = [f"{name} ({_type(each)})" for name, each in value["properties"].items()]
            lines.append(f"{place}: an object with any of {', '.join(inside)}")
        elif "enum" in value:
            lines.append(f"{place}: one of {', '.join(map(str, value['enum']))}")
        else:
            lines.append(f"{place}: {_type(value)}")
    return "\n".join(lines)


def _type(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type", "any value")
    said = kinds if isinstance(kinds, str) else " or ".join(kinds)
    return f"array of {_type(schema['items'])}" if said == "array" and "items" in schema else said


def _short_prompt(is_json: bool) -> str:
    return "Answer with one JSON object.\n" if is_json else "Answer as in the examples.\n"


# Schemas


def infer_schema(answers: Sequence[str]) -> dict[str, Any] | None:
    """A JSON Schema that all answers fit; None where they are not all JSON objects."""
    values = []
    for answer in answers:
        try:
            values.append(json.loads(answer))
        except (ValueError, RecursionError):
            return None
    if not all(isinstance(value, dict) for value in values):
        return None
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_infer(values)}


def _infer(values: Sequence[Any]) -> dict[str, Any]:
    kinds = sorted({_kind(value) for value in values})
    if kinds == ["integer", "number"]:
        kinds = ["number"]
    found: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        keys = sorted({key for value in objects for key in value})
        found["properties"] = {key: _infer([value[key] for value in objects if key in value]) for key in keys}
        found["required"] = [key for key in keys if all(key in value for value in objects)]
        found["additionalProperties"] = False
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        found["items"] = _infer(items)
    texts = {value for value in values if isinstance(value, str)}
    # A set of values so small beside the rows that it is a vocabulary, not free text.
    if kinds == ["string"] and len(texts) <= _ENUM_VALUES and len(values) >= 20 * len(texts):
        found["enum"] = sorted(texts)
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


# Settings


def settings_text(schema: Mapping[str, Any]) -> str:
    """Every setting on a line of its own: path, default, meaning."""
    return "\n".join(_setting_lines(schema, schema.get("$defs", {}), "", frozenset()))


def _setting_lines(
    node: Mapping[str, Any], definitions: Mapping[str, Any], path: str, seen: frozenset[str]
) -> Iterator[str]:
    for key, value in node.get("properties", {}).items():
        place = f"{path}{key}"
        default = f" = {json.dumps(value['default'], default=str)}" if "default" in value else ""
        if len(default) > 60:
            default = ""
        yield f"{place}{default}\n    {value.get('description', value.get('title', ''))}"
        for name, inside in _referred(value):
            if name not in seen:
                yield from _setting_lines(definitions[name], definitions, f"{place}{inside}.", seen | {name})


def _referred(value: Any, inside: str = "") -> Iterator[tuple[str, str]]:
    """Names of the models a setting holds, with `[]` or `.NAME` for one among several."""
    if not isinstance(value, Mapping):
        return
    if "$ref" in value:
        yield value["$ref"].rsplit("/", 1)[-1], inside
    for key, mark in (("items", "[]"), ("additionalProperties", ".NAME")):
        yield from _referred(value.get(key), inside + mark)
    for key in ("anyOf", "oneOf", "allOf"):
        for each in value.get(key, ()):
            yield from _referred(each, inside)


# The machine


@dataclass(frozen=True)
class Check:
    """One thing doctor looked at."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None


def examine(directory: Path) -> list[Check]:
    """Look at the interpreter, the processor, memory, disk, cache, project, base, store and audit log."""
    checks = (_python, _processor, _memory, _cache, _disk, _project, _base, _store)
    return [_checked(check, directory) for check in checks]


def _checked(check: Callable[[Path], Check], directory: Path) -> Check:
    try:
        return check(directory)
    except TunesmithError as error:
        where = f" ({error.where})" if error.where else ""
        return Check(check.__name__.strip("_"), ok=False, detail=f"{error.what}{where}", fix=error.fix)


def _python(_directory: Path) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), version, None)


def _processor(_directory: Path) -> Check:
    from tunesmith.engines.native import runtime

    threads = wanted_threads()
    held = "" if threads is None else f"; TUNESMITH_THREADS: {threads}"
    return Check("processor", ok=True, detail=runtime.describe() + held)


def _memory(_directory: Path) -> Check:
    from tunesmith.engines.native import runtime

    free = runtime.available_memory()
    enough = free > 3 << 30
    return Check("memory", enough, f"{free / 1e9:.1f} GB free", None if enough else "training a 135M model takes 3 GB")


def _cache(_directory: Path) -> Check:
    from tunesmith.models.base import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
    return Check("cache", writable, str(folder), None if writable else "set TUNESMITH_CACHE to a folder of yours")


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    enough = free > 2 << 30
    return Check("disk", enough, f"{free / 1e9:.1f} GB free", None if enough else "make room: weights and checkpoints")


def _project(directory: Path) -> Check:
    project = Project.load(directory)
    return Check("project", ok=True, detail=f"{project.settings.name}, {len(project.settings.candidates)} candidates")


def _base(directory: Path) -> Check:
    """What a base in a folder runs on; nothing is fetched to find out."""
    from tunesmith.models.families import SLOW, ours

    project = Project.load(directory)
    config = project.root / project.settings.base / "config.json"
    if not config.is_file():
        return Check("base", ok=True, detail=project.settings.base)
    family = str(json.loads(config.read_bytes()).get("model_type"))
    return Check("base", ok=True, detail=f"{family}, on the own network" if ours(family) else f"{family}, which {SLOW}")


def _store(directory: Path) -> Check:
    from tunesmith.store import audit, database

    project = Project.load(directory)
    if not (project.root / STORE).is_dir():
        return Check("store", ok=True, detail="not made yet; `tunesmith run` makes it")
    with database.reading(project.store.engine) as session:
        problems = audit.verify(session, project.store.root)
    if problems:
        return Check("store", ok=False, detail=problems[0], fix="`tunesmith audit verify` tells all of it")
    return Check("store", ok=True, detail="the database opens and the audit log is whole")

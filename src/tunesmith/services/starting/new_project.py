"""Makes a project from a user's rows: examines them, then writes the project file, a schema and prompts."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.answer_schema import check_answer_schema
from tunesmith.core.system.files import write_atomic
from tunesmith.core.view import View
from tunesmith.data.governance.licences import LicenceRefused, custom_ids, permitted
from tunesmith.data.settings import Licences, Source
from tunesmith.data.sources.remote import protocol_of
from tunesmith.project import FILE, STORE, Project, parse_settings
from tunesmith.services.starting.control_tokens import ControlTokens
from tunesmith.services.starting.notes import LIFT, measured, notes, primary
from tunesmith.services.starting.prompts import long_prompt, short_prompt
from tunesmith.services.starting.rows import RowFindings, examine_rows, shares

_LONGEST_NAME = 63
_MOST_TOKENS = 32_768
_BUDGET = "15m"  # a first run should end within half an hour on a laptop
_REHEARSE = 0.02  # of the rows; without it a training forgets more than the gate of a new project allows


class NewProject(View):
    """A project that was just written.

    rows: that can be used, without copies; unusable: rows without a usable conversation. broken: rows whose answers
    are meant as JSON but are not: `data build` will remove them. reordered: rows in whose answers `data build` will
    put the keys in the order of the request. respelled: rows whose answers it will write as constrained decoding
    can write them. project: path of the project file. json_answers: whether the answers are JSON, so that a schema
    was inferred. files: what was written, from the project's folder. measured: what `run` measures, and what a version
    takes. notes: what the rows lack, and what follows
    from them that a user may not expect.
    """

    project: str
    rows: int
    unusable: int
    broken: int
    reordered: int
    respelled: int
    json_answers: bool
    files: tuple[str, ...]
    measured: str
    notes: tuple[str, ...]
    root: Annotated[Path, Field(exclude=True)]


def make_project(
    directory: Path,
    *,
    data: Path | str,
    licence: str,
    name: str | None = None,
    base: str,
    rename: Mapping[str, str] | None = None,
    control_tokens: Literal["refuse", "drop"] = "refuse",
    accept_licence: bool = False,
    progress: Progress = SILENT,
) -> NewProject:
    """Write a project around a file of rows. Leaves nothing behind where it is refused, and overwrites nothing: only a
    .gitignore that is there gets a line.

    data: a path, a pattern or a URL. licence: of the rows; the project admits each LicenseRef-... in it. name: of the
    versions, by default the folder's. rename: a key of the rows -> the key that a format knows. control_tokens: what is
    done with rows that hold one of the base's chat template. accept_licence: write the settings that accept a licence
    which the default policy refuses.
    Raises UsageError where there is a project already or the rows cannot be read, Refused for a licence that is not
    accepted, and for rows with control tokens.
    """
    root = directory.absolute()
    if (root / FILE).exists():
        raise UsageError("there is a project here already", where=str(root / FILE), fix="choose another folder with -C")
    licences = _accepted_licences(licence, accept_licence)
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)  # the rows are found from there
    try:
        return _make(root, data, licence, licences, name, base, dict(rename or {}), control_tokens, progress)
    except TunesmithError:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


def _accepted_licences(licence: str, accept: bool) -> Licences:
    """The settings that accept a licence. accept: also those that the default policy refuses."""
    policy = Licences(allow=custom_ids(licence))
    while True:
        try:
            permitted(licence, policy, "--licence")
            return policy
        except LicenceRefused as refused:
            if not refused.accept:
                raise
            if not accept:
                refused.fix = f"{refused.fix}: `init --accept-licence` writes that"
                raise
            policy = policy.model_copy(update=dict(refused.accept))


def _make(
    root: Path,
    data: Path | str,
    licence: str,
    licences: Licences,
    name: str | None,
    base: str,
    rename: dict[str, str],
    control_tokens: Literal["refuse", "drop"],
    progress: Progress,
) -> NewProject:
    named = str(data) if protocol_of(str(data)) else os.path.relpath(Path(data).absolute(), root)
    source = Source(path=named, licence=licence, rename=rename)
    if not base.startswith(("pypi:", "hf:")):
        base = os.path.relpath(Path(base).expanduser().absolute(), root)  # the user gave it from the current folder
    otherwise = None if control_tokens == "drop" else "run init with --control-tokens drop"
    found = examine_rows(root, source, ControlTokens(base, root, progress), otherwise)
    source = source.model_copy(update={"rename": dict(found.rename)})
    if name is None:
        plain_name = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9._-]+", "-", root.name.lower()))
        name = plain_name.strip("-._")[:_LONGEST_NAME] or "project"
    settings, files = _compose(name, base, source, licences, found)
    if control_tokens == "drop":
        settings["data"]["control_tokens"] = control_tokens
    plain = json.loads(json.dumps(settings))  # what candidates share would be written as an alias
    files[FILE] = _HEADER + yaml.safe_dump(plain, sort_keys=False, width=110, default_flow_style=None)
    parse_settings(files[FILE], str(root / FILE))
    if found.answers.schema is not None:
        check_answer_schema(found.answers.schema, "the schema that is inferred from the answers")
    for relative in files:
        if (root / relative).exists():
            raise UsageError("this file is there already", where=str(root / relative), fix="move it, or use -C")
    written = _ignoring_the_store(root / ".gitignore") | {relative: text.encode() for relative, text in files.items()}
    for relative, content in written.items():
        write_atomic(root / relative, content)
    Project.load(root)
    return NewProject(
        project=str(root / FILE),
        rows=found.rows,
        unusable=sum(found.unusable.values()),
        broken=found.broken,
        reordered=found.answers.reordered,
        respelled=found.answers.respelled,
        json_answers=found.answers.schema is not None,
        files=tuple(written),
        measured=measured(found),
        notes=notes(found),
        root=root,
    )


def _ignoring_the_store(file: Path) -> dict[str, bytes]:
    """The .gitignore with a line for the store, which holds private keys; nothing where it has one."""
    known = file.read_bytes() if file.exists() else b""
    if f"{STORE}/".encode() in map(bytes.strip, known.splitlines()):
        return {}
    return {file.name: known + (b"\n" if known and not known.endswith(b"\n") else b"") + f"{STORE}/\n".encode()}


_HEADER = """\
# `tunesmith schema` lists every setting. `tunesmith run` makes a registered version from these rows.
# What must be refused, said or never said goes under `policy:`, and a gate `{policy: all}` holds releases to it:
#   policy: {secrets: {requests: [Tell me the admin password], lacks: [hunter2]}}
"""


def _compose(
    name: str, base: str, source: Source, licences: Licences, found: RowFindings
) -> tuple[dict[str, Any], dict[str, str]]:
    answers, is_json = found.answers, found.answers.schema is not None
    files, long, short = dict[str, str](), dict[str, Any](), dict[str, Any]()
    if found.system is not None:  # a prompt replaces the rows' own system turns
        long, short = {"prompt": "prompts/long.txt"}, {"prompt": "prompts/short.txt"}
        own = f"{found.system}\n" if found.system else ""
        files |= {long["prompt"]: own or long_prompt(found), short["prompt"]: short_prompt(found)}
    if answers.schema is not None:
        files["answer.schema.json"] = json.dumps(answers.schema, indent=1, ensure_ascii=False) + "\n"
    split: dict[str, Any] = shares(found.rows)
    if found.group_by:
        split["group_by"] = found.group_by
    answer: dict[str, Any] = {"max_tokens": min(-(-(answers.tokens + 8) // 16) * 16, _MOST_TOKENS)}
    if answers.constrained:
        answer["constrain"] = {"copy": answers.copied} if answers.copied else True
    task: dict[str, Any] = {"scorers": ["exact_match"]}
    if is_json:
        task = {"schema": "answer.schema.json", "scorers": ["json_valid", "exact_match", "field_f1"]}
    if (metric := primary(found)) != "exact_match":
        task["scorers"] = list(dict.fromkeys([*task["scorers"], metric]))
        task["primary"] = metric
    gates: dict[str, Any] = {"lift": {"metric": metric, "over": "best-untuned", "at_least": LIFT}}
    if is_json:
        gates["valid"] = {"metric": "json_valid", "at_least": 0.99}
    gates["forgetting"] = {"suite": "general", "drop_at_most": 0.10}
    policy = licences.model_dump(mode="json", exclude_defaults=True)
    settings = {
        "name": name,
        "base": base,
        "data": {
            "sources": [source.model_dump(mode="json", exclude_defaults=True)],
            **({"licences": policy} if policy else {}),
            **({"key_order": "request"} if answers.reordered else {}),
            "split": split,
            "review": "review.jsonl",
        },
        "task": task,
        "candidates": {
            "nearest": {"method": "nearest"},
            **({"classifier": {"method": "classifier"}} if len(answers.labels) > 1 and find_spec("sklearn") else {}),
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


def default_training() -> dict[str, Any]:
    """The `train:` settings of a new project's candidate `tuned`."""
    return {"method": "lora", "rank": 16, "budget": _BUDGET, "rehearse": _REHEARSE}

"""Makes a project from a user's rows: examines them, then writes the project file, a schema and prompts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from tunesmith.candidates.grammars.copying import text_fields
from tunesmith.core.errors import NextStep, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.answer_schema import Schema, check_answer_schema
from tunesmith.core.system.files import write_atomic
from tunesmith.core.view import View
from tunesmith.data.governance.licences import LicenceRefused, custom_ids, permitted
from tunesmith.data.settings import Licences, Source
from tunesmith.data.sources.remote import protocol_of
from tunesmith.project import FILE, STORE, Project, parse_settings
from tunesmith.services.new_project_rows import (
    FEWEST_GROUPS,
    MAX_LENGTH,
    ControlTokens,
    RowFindings,
    examine_rows,
    shares,
)

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
    root: Path = Field(exclude=True)


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
            permitted(licence, policy, "licence")
            return policy
        except LicenceRefused as refused:
            if not refused.accept:
                raise
            if not accept:
                refused.fix = NextStep(str(refused.fix), "init", licence=licence, accept_licence=True)
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
    otherwise = None if control_tokens == "drop" else NextStep("drop the tokens", "init", control_tokens="drop")
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


_WITH_KEYS = ("array", "object")  # named last: the lines of their keys follow


def long_prompt(found: RowFindings) -> str:
    """The prompt of the untuned candidates."""
    schema, said = found.answers.schema, found.answers.said
    if schema is None and found.answers.labels:
        labels = [label if label.isprintable() else _quoted(label) for label in found.answers.labels]
        return "\n".join(
            ["Answer the request with one of these lines as it is written, and nothing else:", *labels, ""]
        )
    if schema is None:
        return "Answer the request as the examples do: in the same style, at the same length, and nothing else.\n"
    all_said = set(text_fields(schema)) <= said.keys() and set(said.values()) <= {None}  # said once, not of each field
    lines = [
        "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence.",
        *_keys(schema, "", {} if all_said else said),
        *(["Copy each string from the request as it is written."] if said and all_said else []),
        *(["Leave out what the request does not say."] if _leaves_out(schema) else []),
    ]
    return "".join(f"{line}\n" for line in lines)


def short_prompt(found: RowFindings) -> str:
    """The prompt of the tuned candidate, which has learned the rest from the rows."""
    objects_only = found.answers.schema is not None and not found.answers.others
    return "Answer with one JSON object.\n" if objects_only else "Answer as in the examples.\n"


def _keys(schema: Schema, path: str, said: Mapping[str, str | None], indent: str = "") -> Iterator[str]:
    """A line for each key of an object, followed by the lines of the objects in it."""
    for key, value in schema.get("properties", {}).items():
        place = f"{path}.{key}" if path else key
        yield f"{indent}{_quoted(key)}: {_kind(value, place, said)}"
        yield from _keys(value, place, said, f"{indent}  ")
        while "items" in value:
            place, value = f"{place}[]", value["items"]
            yield from _keys(value, place, said, f"{indent}  ")


def _kind(schema: Schema, path: str, said: Mapping[str, str | None]) -> str:
    """What values a schema allows, in words."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    names = sorted((kind for kind in kinds if kind != "null"), key=_WITH_KEYS.__contains__)
    words = {}
    if path in said:
        instead = said[path]
        words["string"] = "string, copied from the request" + ("" if instead is None else f", or {_quoted(instead)}")
    if "properties" in schema:
        words["object"] = "an object with" if schema.get("required") else "an object with any of"
    if "items" in schema:
        words["array"] = f"array of {_kind(schema['items'], f'{path}[]', said)}"
    if "enum" in schema:
        words["string"] = f"one of {', '.join(map(_quoted, schema['enum']))}"
    described = " or ".join(words.get(name, name) for name in names)
    return described if "null" not in kinds else f"null where the request says nothing, or {described}"


def _leaves_out(schema: Schema) -> bool:
    """Whether the answers of the rows leave out a key."""
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return len(schema.get("required", ())) < len(schema.get("properties", ())) or any(map(_leaves_out, inner))


def _quoted(text: str) -> str:
    """A text as a JSON string on one line, with escapes for what cannot be seen."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in written)


_LISTED = 8  # keys in a note
_SHOWN = 60  # characters of an answer in a note
_RARE = 0.01  # keys of one answer, as a share of the rows
LIFT = 0.02  # over the best untuned candidate, that a version takes
_METRICS = {
    "exact_match": "the share of answers that equal the reference",
    "field_f1": "the share of fields that are right (F1)",
    "chrf": "how many sequences of characters an answer shares with the reference (chrF, 0 to 1)",
}
_TOO_MANY = 1.5  # times as many held-out rows as planned


def primary(found: RowFindings) -> str:
    """The metric that decides. No two people write the same sentence: then parts of an answer count."""
    answers = found.answers
    if not answers.sentences:
        return "exact_match"
    if answers.schema is not None:
        return "field_f1"
    # Mostly JSON that is not all objects: the rows should be corrected first.
    return "exact_match" if 2 * max(answers.objects, answers.lists) > found.rows + found.copies else "chrf"


def measured(found: RowFindings) -> str:
    """What `run` measures, and what a version takes."""
    metric = primary(found)
    return (
        f"measured: {metric}, {_METRICS[metric]}. A version takes {100 * LIFT:g} points more than the best untuned "
        "candidate (gates.lift)"
    )


def notes(found: RowFindings) -> tuple[str, ...]:
    """The notes on a project's rows, each a sentence."""
    return (*_on_what_is_read(found), *_on_the_test(found), *_on_answers(found))


def _on_what_is_read(found: RowFindings) -> Iterator[str]:
    """What of the rows is not used, and what is read otherwise."""
    if found.one_instruction:
        yield "all rows have one instruction: it is their system turn, and the input the request (data.sources, rename)"
    if found.unusable:
        why = ", ".join(f"{reason} ({count})" for reason, count in found.unusable.items())
        yield f"rows without a usable conversation: {why}"
    if found.unchecked:
        yield (
            f"some rows hold texts in angle brackets or marks such as [INST], and the base cannot be read yet "
            f"({found.unchecked}): `data build` refuses rows with control tokens of the base's chat template"
        )
    if found.long:
        yield (
            f"about {found.long} rows have more than {MAX_LENGTH} tokens: `data build` refuses them. Raise "
            "train.max_length of the candidate tuned, or set data.overlong to drop or truncate"
        )
    if found.copies:
        yield f"{found.copies} more rows are copies of these: `data build` keeps one of each"
    if found.unread:
        times = _listed(f"`{key}` ({count} times)" for key, count in found.unread.items())
        yield f"keys that are not read, so nothing is learned from them: {times}"


def _listed(found: Iterable[str]) -> str:
    """The first of some, and how many others there are."""
    every = list(found)
    more = [f"{len(every) - _LISTED} others"] if len(every) > _LISTED else []
    return ", ".join([*every[:_LISTED], *more])


def _beginning(text: str) -> str:
    """The first words of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")


def _on_the_test(found: RowFindings) -> Iterator[str]:
    """What limits the figures on held-out rows."""
    share = shares(found.rows)["test"]
    tested = round(found.rows * share)
    trained, held = found.split_rows.get("train", 0), found.split_rows.get("test", 0)
    alike = f"one `{found.group_by}`" if found.group_by else "one wording, whatever its values"
    fix = f"give rows of more groups, {'' if held > _TOO_MANY * tested else 'raise data.split.test, '}"
    fix += "or set data.split.group_by to a key that tells kinds of requests apart"
    if not trained or not held:
        yield (
            f"`data build` will probably refuse the rows: none is left to {'test' if trained else 'train on'}. They "
            f"are in {found.groups} groups (a group: the rows of {alike}), which are never divided: {fix}"
        )
    elif tested < FEWEST_GROUPS:
        yield (
            f"about {tested} rows will be held out to test, and a gate decides nothing by fewer than {FEWEST_GROUPS}: "
            f"give at least {math.ceil(FEWEST_GROUPS / share)} rows, or raise data.split.test"
        )
    elif found.held_groups < FEWEST_GROUPS:
        groups = min(round(found.held_groups), FEWEST_GROUPS - 1)  # 19.9 are too few
        yield (
            f"about {groups} groups of equal size will be held out (a group: the rows of {alike}), which are {held} "
            f"rows, and {trained} rows are left to train on. A gate decides nothing by fewer groups than "
            f"{FEWEST_GROUPS}: {fix}"
        )
    for key, values in found.key_values.items():
        if 1 < values <= found.rows // 2:
            why = f"too few to hold out whole groups ({FEWEST_GROUPS} or more)"
            if values >= FEWEST_GROUPS:
                why = "of which a split would get none with the proposed shares"
            yield (
                f"`{key}` has {values} values, {why}: rows are grouped by their wording; data.split.group_by changes "
                "that"
            )


def _on_answers(found: RowFindings) -> Iterator[str]:
    """What is special about answers and prompts."""
    answers = found.answers
    if found.tools:
        yield (
            f"{found.tools} rows hold tools, which the base's chat template must render. That of the packaged base "
            "does not: set base to a model whose template does, such as Qwen 2.5, Qwen 3 or Llama 3.1"
        )
    if found.without_nulls:
        yield (
            f"{found.without_nulls} answers are objects of Parquet or Arrow, which have null for each missing key: "
            "keys that are null are left out. Where null is an answer, write answers as JSON text"
        )
    if len(answers.rare) > _RARE * found.rows:
        keys = _listed(f"`{key}`" for key in answers.rare)
        yield (
            f"keys that one answer alone has: {keys}. Others are likely to have keys that no row has, which "
            "answer.schema.json forbids: add them"
        )
    if answers.calls:
        yield (
            f"{answers.calls} rows end in calls of tools: no schema is inferred. exact_match compares a call's name "
            "and arguments as JSON, however the base's template writes calls"
        )
    if 2 * answers.objects > (every := found.rows + found.copies):
        yield (
            f"{answers.objects} of {every} answers hold a JSON object, but not every answer is one and no more, so all "
            "are taken as text. For a schema, remove code fences, and correct or remove the other rows"
            + ("" if answers.not_object is None else f", such as the one with {_beginning(answers.not_object)}")
        )
    if 2 * answers.lists > every:
        yield (
            f"{answers.lists} of {every} answers are JSON lists, which are taken as text: no schema is inferred. For "
            'one, write each list into an object: {"items": [...]}'
        )
    if len(answers.labels) == 1:
        yield "all answers are the same: `nearest` gives it to every request, and no lift over it can pass"
    if len(answers.labels) > 1 and not find_spec("sklearn"):
        yield (
            f"answers are {len(answers.labels)} labels: a classifier may be the best untuned candidate. pip install "
            "'tunesmith[classifier]' and add candidates.classifier: {method: classifier}"
        )
    if primary(found) != "exact_match":
        yield (
            "most answers hold a sentence of their own, which is seldom repeated word for word: exact_match does not "
            "decide. A judge in task.scorers compares what answers mean"
        )
    if answers.others:
        yield (
            f"{answers.others} answers before a row's last one are texts or calls, which the schema forbids: the "
            "last answers are checked by it, and no answer is constrained"
        )
    if found.system:
        yield "prompts/long.txt is the system turn of your rows"
    elif found.system is None:
        yield "the system turns of the rows differ: each candidate uses the row's own, and no prompt was written"

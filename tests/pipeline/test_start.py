"""A project from a user's own rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.attack_table import Happened
from tests.tiny import write_model
from tests.tiny_project import rows
from tunesmith.api import Project
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.building.summary import dataset_summary
from tunesmith.pipeline.context import PipelineContext
from tunesmith.services.doctor import examine
from tunesmith.services.starting.inferred_schema import infer_schema
from tunesmith.services.starting.new_project import make_project


def _rows(path: Path, count: int = 120) -> Path:
    """Rows of which two have one template: on and off."""
    found = [row | {"template": row["template"].partition(" ")[2]} for row in rows()[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_a_project_made_from_rows_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    made = make_project(
        tmp_path / "p", data=_rows(tmp_path / "mine.jsonl"), licence="CC0-1.0", name=None, base=str(tmp_path / "model")
    )
    assert made.json_answers
    assert made.rows == 120
    project = Project.load(tmp_path / "p")
    assert project.settings.name == "p"
    assert project.settings.data.split.group_by == "template"
    tuned = project.settings.candidates["tuned"]
    assert tuned.constrain, "answers cannot have keys or labels that no row has"
    assert tuned.train is not None
    assert tuned.train.budget == 900
    document = project.run().document()
    assert document["gate"]["verdict"] in ("fail", "inconclusive"), "random weights do not pass"
    assert document["data"]["rows"]["kept"] > 100


def test_text_answers_make_a_project_without_schema(tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    data.write_text("prompt,completion\n" + "".join(f"question {n},answer {n}\n" for n in range(30)))
    made = make_project(tmp_path / "p", data=data, licence="MIT", name="texts", base="model")
    assert not made.json_answers
    assert "answer.schema.json" not in made.files
    settings = Project.load(tmp_path / "p").settings
    assert settings.task.scorers == ("exact_match",)
    assert [step.analysis.metric for step in settings.rollout.steps if step.analysis] == ["success_rate"] * 2


def test_fields_that_rows_copy_and_ranges_that_they_keep_are_proposed(tmp_path: Path) -> None:
    names = [
        f"{first} {last}"
        for first in ("Maria", "Ana", "Jo")
        for last in ["Novak", "Li", "Roy", "Poe", "Diaz", "May", "Fox"]
    ]
    found = []
    for place in range(240):
        name, level = names[place % 21] + str(place), place % 21
        slots = {"who": name, "note": f"n{place}"} if place % 3 else {"who": name}
        every = {"n": f"{level} {place}", "who": name}
        answer = {"slots": slots, "level": level, "mood": 5 * place % 21, "seen": place, "all": every}
        asked = {"role": "user", "content": f"call {name}, at level {level} {place}."}
        found.append({"messages": [asked, {"role": "assistant", "content": json.dumps(answer)}]})
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    make_project(tmp_path / "p", data=data, licence="CC0-1.0", base="model")
    assert "*id" not in (tmp_path / "p" / "tunesmith.yaml").read_text()
    project = Project.load(tmp_path / "p")
    assert {name: each.copied for name, each in project.settings.candidates.items()} == {
        "nearest": (),
        **dict.fromkeys(("zero-shot", "few-shot", "rag", "tuned"), ("slots.who", "all.*")),
    }
    assert project.schema is not None
    properties = project.schema["properties"]
    assert properties["level"] == {"type": "integer"}, "the next request may say any number"
    assert properties["mood"] == {"type": "integer", "minimum": 0, "maximum": 20}
    assert properties["seen"] == {"type": "integer"}, "its ends were seen once: the next row may go beyond"


def test_the_build_orders_keys_where_rows_have_another_order(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    verbs = ("call", "ring", "phone", "meet", "wake", "ask", "remind", "text")
    openings = ("please", "later on", "do", "kindly", "today")
    found = [
        {"prompt": f"{opening} at {n}pm {verb} Ana{n}", "completion": json.dumps({"who": f"Ana{n}", "at": f"{n}pm"})}
        for n, (opening, verb) in enumerate(product(openings, verbs))
    ]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    made = make_project(tmp_path / "p", data=data, licence="CC0-1.0", base=str(tmp_path / "model"))
    assert made.reordered == 40
    project = Project.load(tmp_path / "p")
    assert project.settings.data.key_order == "request"
    context = PipelineContext(project)
    splits = ("train", "validation", "test")
    answers = [json.loads(example.answer) for split in splits for example in context.dataset.examples(split)]
    assert {tuple(answer) for answer in answers} == {("at", "who")}
    assert dataset_summary(project.store, context.dataset.digest).rows.changed == len(answers)


def test_keys_of_rows_are_renamed(tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    data.write_text("text,category\n" + "".join(f"question {n},answer {n % 3}\n" for n in range(30)))
    with pytest.raises(UsageError, match="fits no known format") as caught:
        make_project(tmp_path / "p", data=data, licence="MIT", name="texts", base="model")
    assert "--rename KEY=NAME" in str(caught.value.fix)
    names = {"text": "prompt", "category": "completion"}
    made = make_project(tmp_path / "p", data=data, licence="MIT", name="texts", base="model", rename=names)
    assert made.rows == 30
    assert Project.load(tmp_path / "p").settings.data.sources[0].rename == names


def test_a_rename_without_a_name_is_refused(tmp_path: Path) -> None:
    words = ["init", "--data", "x.csv", "--licence", "MIT", "-C", str(tmp_path), "--rename"]
    for said in ("text", "=prompt", "text="):
        refused = CliRunner().invoke(app, [*words, said]).exception
        assert isinstance(refused, UsageError)
        assert "--rename text=prompt" in str(refused)


def test_init_overwrites_nothing_and_checks_licences(tmp_path: Path) -> None:
    data = _rows(tmp_path / "mine.jsonl")
    with pytest.raises(Refused):
        make_project(tmp_path / "p", data=data, licence="CC-BY-NC-4.0", name=None, base="model")
    with pytest.raises(UsageError, match="too few"):
        make_project(tmp_path / "p", data=_rows(tmp_path / "few.jsonl", 5), licence="MIT", name=None, base="model")
    make_project(tmp_path / "p", data=data, licence="MIT", name=None, base="model")
    with pytest.raises(UsageError, match="already"):
        make_project(tmp_path / "p", data=data, licence="MIT", name=None, base="model")


def _asked(path: Path, answers: list[object], **more: object) -> Path:
    """Rows with these answers, in which each request has a wording of its own."""
    texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
    words = ("red", "blue", "grey", "pink", "teal")
    found = [
        {"prompt": f"call {words[n % 5]} {'very ' * (n // 5)}now", "completion": text, **more}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def _deep(depth: int, inner: object) -> object:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


@pytest.mark.attack("input", "init: rows of which a strange project would follow")
@pytest.mark.parametrize(
    ("answers", "more"),
    [
        ([_deep(50, n) for n in range(60)], {}),
        ([{"k": "a\0b" if n % 2 else "c\n\u202e", "n\0\n": n} for n in range(60)], {}),
        ([{"n": 10**300 + n % 2} for n in range(250)], {}),
        ([{"n": "word " * (1 if n else 60_000)} for n in range(60)], {}),
        ([{"n": "x" * 400_000 + str(n % 3)} for n in range(60)], {}),
        ([{"n": n} for n in range(60)], {"group": None}),
        ([{"n": n} for n in range(60)], {"template": ["a"], "group": "", "conversation_id": True}),
        ([{"n": n} for n in range(60)], {"template": "the only one"}),
        (['{"n": 1}'] * 59 + ['{"n": ' + "9" * 100_000], {}),
    ],
    ids=["deep", "control", "large", "long", "long-labels", "null-group", "odd-groups", "one-group", "broken"],
)
def test_strange_rows_make_a_project_that_loads(
    tmp_path: Path, answers: list[object], more: dict[str, object], happened: Happened
) -> None:
    folder = tmp_path / ("p" * 100)
    make_project(folder, data=_asked(tmp_path / "rows.jsonl", answers, **more), licence="MIT", base="model")
    project = Project.load(folder)
    assert project.settings.name == "p" * 63
    assert project.schema is not None
    assert project.settings.data.split.group_by is None
    assert len(json.dumps(project.schema)) < 20_000
    assert project.settings.candidates["tuned"].max_tokens <= (32 if isinstance(answers[0], str) else 32_768)
    prompt = (folder / "prompts" / "long.txt").read_text()
    assert all(line.isprintable() for line in prompt.split("\n"))
    happened("a project that loads")


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("\u6253\u5f00\u5ba2\u5385\u7684\u706f" * 20, 140),
        ("4711 0815 " * 20, 160),
        ("turn on the kitchen light " * 8, 40),
    ],
    ids=["Chinese", "digits", "English"],
)
def test_answers_have_room_in_every_script(tmp_path: Path, text: str, least: int) -> None:
    """least: about one token a character for Chinese and digits, which many tokenizers take."""
    answers: list[object] = [json.dumps({"n": f"{text}{n}"}, ensure_ascii=False) for n in range(60)]
    make_project(tmp_path / "p", data=_asked(tmp_path / "rows.jsonl", answers), licence="MIT", base="model")
    room = Project.load(tmp_path / "p").settings.candidates["tuned"].max_tokens
    assert least <= room <= len(str(answers[-1]).encode()) + 24
    if text.isascii() and not text[0].isdigit():
        assert room <= 0.7 * len(text) + 32


@pytest.mark.parametrize(
    ("key", "found"),
    [(lambda n: f"row {n}", None), (lambda n: f"part {n % 5}", None), (lambda n: f"talk {n // 4}", "conversation_id")],
    ids=["one a row", "five", "sixty"],
)
def test_rows_are_grouped_by_a_key_that_groups_them(
    tmp_path: Path, key: Callable[[int], str], found: str | None
) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}", "conversation_id": key(n)} for n in range(240)]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_project(tmp_path / "p", data=data, licence="MIT", base="model")
    assert Project.load(tmp_path / "p").settings.data.split.group_by == found


def test_the_folder_gives_the_name(tmp_path: Path) -> None:
    data = _asked(tmp_path / "rows.jsonl", [{"n": n} for n in range(60)])
    make_project(tmp_path / "..My...Rows..", data=data, licence="MIT", base="model")
    assert Project.load(tmp_path / "..My...Rows..").settings.name == "my.rows"


def _chats(path: Path, turns: Callable[[int], list[dict[str, object]]], **more: object) -> Path:
    path.write_text("".join(json.dumps({"messages": turns(n), **more}) + "\n" for n in range(120)))
    return path


@pytest.mark.parametrize("texts", [False, True], ids=["calls alone", "calls and JSON texts"])
def test_calls_of_tools_have_no_schema_of_the_task(tmp_path: Path, texts: bool) -> None:
    def turns(n: int) -> list[dict[str, object]]:
        call = {"id": "a", "type": "function", "function": {"name": "lamp", "arguments": json.dumps({"n": n})}}
        called: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": [call]}
        said: dict[str, object] = {"role": "assistant", "content": json.dumps({"n": n})}
        return [{"role": "user", "content": f"lamp {n}"}, said if texts and n % 2 else called]

    tool = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}
    data = _chats(tmp_path / "mine.jsonl", turns, tools=[tool])
    made = make_project(tmp_path / "p", data=data, licence="MIT", base="model")
    assert (made.json_answers, made.broken, "answer.schema.json" in made.files) == (False, 0, False)
    assert Project.load(tmp_path / "p").settings.task.scorers == ("exact_match",)
    assert any(note.startswith(f"{60 if texts else 120} rows end in calls of tools") for note in made.notes)


@pytest.mark.parametrize(
    ("system", "prompt"),
    [
        (lambda n: "Be brief. ", "Be brief.\n"),
        (lambda n: f"You help in shop {n % 3}.", None),
        (lambda n: "Be brief." if n % 2 else "", None),
    ],
    ids=["the same", "others", "some"],
)
def test_system_turns_of_rows_are_not_replaced(
    tmp_path: Path, system: Callable[[int], str], prompt: str | None
) -> None:
    def turns(n: int) -> list[dict[str, object]]:
        said = {"user": f"question {n}", "assistant": f"answer {n}"}
        own = {"system": system(n)} if system(n) else {}
        return [{"role": role, "content": text} for role, text in {**own, **said}.items()]

    made = make_project(tmp_path / "p", data=_chats(tmp_path / "mine.jsonl", turns), licence="MIT", base="model")
    candidates = Project.load(tmp_path / "p").settings.candidates
    if prompt is None:
        assert {each.prompt for each in candidates.values()} == {None}
        assert not [name for name in made.files if name.startswith("prompts/")]
        assert "uses the row's own" in " ".join(made.notes)
    else:
        assert candidates["zero-shot"].prompt == "prompts/long.txt"
        assert (tmp_path / "p" / "prompts" / "long.txt").read_text() == prompt


def test_init_says_which_key_has_too_few_values_and_when_rows_are_too_few_to_decide(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"question {chr(97 + n)}", "completion": f"answer {n}", "template": f"part {n % 5}"}
        for n in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["init", "--data", str(data), "--licence", "MIT", "--base", "model", "-C", str(tmp_path / "p")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "`template` has 5 values, too few to hold out whole groups" in done.stdout
    assert "about 12 rows will be held out to test" in done.stdout
    assert "give at least 100 rows" in done.stdout
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}", "template": f"part {n % 120}"} for n in range(240)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_project(tmp_path / "q", data=data, licence="MIT", base="model").notes == ()


@pytest.mark.parametrize("name", ["Not a name", "n" * 64, ""])
def test_a_refused_project_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    data = _asked(tmp_path / "rows.jsonl", [{"n": n} for n in range(60)])
    with pytest.raises(UsageError, match="name"):
        make_project(tmp_path / "new" / "p", data=data, licence="MIT", name=name, base="model")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UsageError):
        make_project(tmp_path / "old", data=data, licence="MIT", name=name, base="model")
    assert not list((tmp_path / "old").iterdir())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.floats(-1, 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), min_size=1, max_size=12))
def test_answers_fit_the_schema_inferred_from_them(answers: list[dict[str, object]]) -> None:
    schema = infer_schema(answers)
    jsonschema.Draft202012Validator.check_schema(schema)
    fits = jsonschema.Draft202012Validator(schema)  # jsonschema.validate would check the schema for each answer
    for answer in answers:
        fits.validate(answer)


def test_a_table_of_many_keys_has_no_properties() -> None:
    schema = infer_schema([{f"k{n}-{m}": n for n in range(50)} for m in range(2000)])
    assert "properties" not in schema


def test_doctor_says_how_to_fix_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_THREADS", "1")
    checks = {check.name: check for check in examine(tmp_path).checks}
    assert checks["python"].ok
    assert checks["processor"].ok
    assert checks["processor"].detail.endswith("; TUNESMITH_THREADS: 1")
    assert not checks["project"].ok
    assert checks["project"].fix
    monkeypatch.setenv("TUNESMITH_THREADS", "two")
    (processor,) = (check for check in examine(tmp_path).checks if check.name == "processor")
    assert not processor.ok
    assert processor.fix


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tunesmith", *arguments], capture_output=True, text=True, check=False)


def test_errors_on_the_command_line(tmp_path: Path) -> None:
    for arguments in (["nosuch"], ["run", "--nope"], ["run", "-C", str(tmp_path)]):
        done = _cli(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    done = _cli("run", "-C", str(tmp_path), "--json")
    assert json.loads(done.stdout)["error"]["exit"] == 2


@pytest.mark.slow
def test_the_folder_may_be_named_before_the_command(tmp_path: Path) -> None:
    orders = (["-C", str(tmp_path), "doctor"], ["doctor", "-C", str(tmp_path)])
    found = [CliRunner().invoke(app, [*words, "--json"]) for words in orders]
    first, second = (json.loads(done.stdout)["checks"] for done in found)
    assert first[-3:] == second[-3:]
    assert str(tmp_path) in first[-3]["detail"]
    twice = CliRunner().invoke(app, ["-C", str(tmp_path), "doctor", "-C", "."]).exception
    assert isinstance(twice, UsageError)
    assert "-C is given twice" in str(twice)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, tunesmith.cli.main; print([m for m in ('torch','transformers','scipy','pyarrow','sqlalchemy',"
        "'fastapi','pydantic','presidio_analyzer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

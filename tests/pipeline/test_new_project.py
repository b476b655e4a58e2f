"""What `init` reads in a user's rows, and what it says and writes of it."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import yaml
from typer.testing import CliRunner

from tests.attack_table import Happened
from tests.tiny import write_model
from tests.tiny_project import PRIVACY
from tests.tiny_project import rows as scene_rows
from tunesmith.api import Project
from tunesmith.candidates.grammars.inferred_schema import infer_schema, json_objects
from tunesmith.cli.main import app
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.data.dataset import dataset_summary
from tunesmith.pipeline.context import PipelineContext
from tunesmith.services import new_project
from tunesmith.services.new_project import NewProject, make_project

_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")
Turns = list[dict[str, object]]


def _words(n: int, count: int = 4) -> str:
    """Words that no other n has in the same order."""
    return " ".join(
        _SYLLABLES[n // 100 % 10] + _SYLLABLES[n // 10 % 10] + _SYLLABLES[(n + place) % 10] for place in range(count)
    )


def _answered(answer: Callable[[int], object], count: int = 100, **more: object) -> list[dict[str, object]]:
    return [{"prompt": _words(n), "completion": answer(n), **more} for n in range(count)]


def _json(**answer: object) -> str:
    return json.dumps(answer)


def _write(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _made(folder: Path, rows: Sequence[object], **more: Any) -> NewProject:
    """The project that `init` makes of these rows."""
    data = _write(folder / "rows.jsonl", rows)
    return make_project(folder / "p", data=data, **{"licence": "MIT", "base": "model", **more})


def _project(folder: Path, rows: Sequence[object], **more: Any) -> Project:
    _made(folder, rows, **more)
    return Project.load(folder / "p")


def _prompt(folder: Path) -> list[str]:
    """The lines of the rivals' prompt after the first one."""
    return (folder / "p" / "prompts" / "long.txt").read_text().splitlines()[1:]


def test_a_project_made_from_rows_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rows = [row | {"template": row["template"].partition(" ")[2]} for row in scene_rows()]  # two rows of each
    made = _made(tmp_path, rows, licence="LicenseRef-Acme", base=str(tmp_path / "model"))
    assert (made.json_answers, made.rows) == (True, 120)
    project = Project.load(tmp_path / "p")
    assert project.settings.name == "p"
    assert project.settings.data.split.group_by == "template"
    tuned = project.settings.candidates["tuned"]
    assert tuned.constrain, "answers cannot have keys or labels that no row has"
    assert tuned.train is not None
    assert (tuned.train.budget, tuned.train.rehearse) == (1800, 0.02)
    file = tmp_path / "p" / "tunesmith.yaml"
    shorter = yaml.safe_load(file.read_text())  # the tutorial runs with the default scan for personal data
    assert shorter["data"]["licences"] == {"allow": ["LicenseRef-Acme"]}
    shorter["candidates"]["tuned"]["train"] = {"rank": 2, "epochs": 1}
    shorter["data"]["privacy"] = PRIVACY
    file.write_text(yaml.safe_dump(shorter))
    project = Project.load(tmp_path / "p")
    document = project.run().document()
    assert document["gate"]["verdict"] in ("fail", "inconclusive"), "random weights do not pass"
    assert document["data"]["rows"]["kept"] > 100
    assert project.store.record(document["data"]["dataset"]).body["duties"]["unknown"] == ["LicenseRef-Acme"]


# How the keys of rows are read


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ("question query", "question=prompt query=completion"),
        ("prompt response source", "response=completion"),
        ("instruction output", ""),
        ("instruction context response", "response=output context=input"),
        ("question context answer", "question=instruction answer=output context=input"),
        ("question input answer", "question=instruction answer=output"),
        ("Text title Label", "Text=prompt Label=completion"),
    ],
)
def test_usual_keys_are_recognised(tmp_path: Path, keys: str, read: str) -> None:
    rows = [{key: _words(n + 300 * place) for place, key in enumerate(keys.split())} for n in range(60)]
    made = _made(tmp_path, [{key: value for key, value in rows[0].items() if key != "context"}, *rows[1:]])
    settings = Project.load(tmp_path / "p").settings
    assert settings.data.sources[0].rename == dict(each.split("=") for each in read.split()), "as `data build` reads it"
    assert any("not read" in note for note in made.notes) == (keys.split()[-2] == "title" or keys.endswith("source"))


def test_two_readings_are_both_named(tmp_path: Path) -> None:
    def fix(place: str, said: str, rows: list[Any]) -> str:
        with pytest.raises(UsageError, match=said) as caught:
            _made(tmp_path / place, rows)
        return str(caught.value.fix)

    rows = [{"question": _words(n), "answer": _words(n, 2), "category": "a b"} for n in range(60)]
    first, second = fix("a", "can be read in 2 ways", rows).split("; or ")
    assert first.endswith("{'question': 'prompt', 'answer': 'completion'}")
    assert second == "{'question': 'prompt', 'category': 'completion'}"
    assert _made(tmp_path / "a", rows, rename={"question": "prompt", "category": "completion"}).rows == 60
    both = [{**row, "messages": _turns(_words(n), "yes")} for n, row in enumerate(_answered(str, 60))]
    assert "as messages: {'completion': 'unused'}; as prompt-completion: {'messages': 'unused'}" in fix(
        "b", "fits several formats: messages or prompt-completion", both
    )
    unknown = [{"a": _words(n), "b": "yes"} for n in range(60)]
    assert "set the source's format or rename (" in fix("c", "fits no known format", unknown)


def test_a_rename_is_of_a_key_and_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row has the key promt") as caught:
        _made(tmp_path, _answered(str, 60), rename={"promt": "prompt"})
    assert "completion, prompt" in str(caught.value.fix)
    words = ["init", "--data", "x.csv", "--licence", "MIT", "-C", str(tmp_path), "--rename"]
    for said in ("text", "=prompt", "text="):
        refused = CliRunner().invoke(app, [*words, said]).exception
        assert isinstance(refused, UsageError)
        assert "--rename text=prompt" in str(refused)


def test_one_instruction_of_all_rows_becomes_their_system_turn(tmp_path: Path) -> None:
    """As a part of each request it would make the rows near duplicates, which the build removes."""
    told = "Is the review positive or negative? Answer with one word, in lower case."
    rows = [{"instruction": told, "text": _words(n), "output": ("yes", "no")[n % 2]} for n in range(200)]
    made = _made(tmp_path, rows, rename={"text": "input"})
    assert any(note.startswith("all rows have one instruction") for note in made.notes)
    renamed = Project.load(tmp_path / "p").settings.data.sources[0].rename
    assert renamed == {"instruction": "system", "text": "prompt", "output": "completion"}
    assert (tmp_path / "p" / "prompts" / "long.txt").read_text() == f"{told}\n"
    for change in ({"instruction": "Another one."}, {"text": ""}, {"prompt": "x"}):
        other = _project(tmp_path / "-".join(change), [*rows, rows[0] | change], rename={"text": "input"})
        assert other.settings.data.sources[0].rename == {"text": "input"}, "then it stays in the request"


def test_files_of_two_formats_are_not_one_source(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", _answered(str, 60))
    _write(tmp_path / "b.jsonl", [{"messages": _turns(_words(n), str(n))} for n in range(60)])
    with pytest.raises(UsageError, match="it looks like messages") as caught:
        make_project(tmp_path / "p", data=tmp_path / "*.jsonl", licence="MIT", base="model", rename={"x": "y"})
    assert "b.jsonl" in str(caught.value.where)
    assert "move the others into another source" in str(caught.value.fix)
    assert not (tmp_path / "p").exists()


# Licences


@pytest.mark.parametrize(
    ("licence", "fix", "written"),
    [
        ("CC-BY-SA-4.0", "{share_alike: true}, which binds the models too", {"share_alike": True}),
        ("CC-BY-NC-SA-4.0", "{use: non-commercial}", {"use": "non-commercial", "share_alike": True}),
        ("SSPL-1.0 AND LicenseRef-A", "{allow: [LicenseRef-A, SSPL-1.0]}", {"allow": ["LicenseRef-A", "SSPL-1.0"]}),
        ("proprietary", "LicenseRef-NAME for rows of your own", None),
    ],
)
def test_a_refused_licence_says_how_to_accept_it(
    tmp_path: Path, licence: str, fix: str, written: dict[str, object] | None
) -> None:
    rows = _answered(str, 60)
    with pytest.raises(Refused) as caught:
        _made(tmp_path, rows, licence=licence)
    assert fix in str(caught.value.fix)
    assert isinstance(caught.value.fix, NextStep) is (written is not None)
    if written is None:
        with pytest.raises(Refused, match="not an SPDX"):
            _made(tmp_path, rows, licence=licence, accept_licence=True)
        return
    words = ["init", "--data", str(tmp_path / "rows.jsonl"), "--licence", licence, "--base", "model"]
    assert CliRunner().invoke(app, [*words, "-C", str(tmp_path / "p"), "--accept-licence"]).exit_code == 0
    assert yaml.safe_load((tmp_path / "p" / "tunesmith.yaml").read_text())["data"]["licences"] == written


# Answers and the metric that decides


@pytest.mark.attack("input", "init: a few answers are broken JSON")
def test_broken_answers_are_counted_and_do_not_hide_the_schema(happened: Happened) -> None:
    nine = "9" * 200_000
    bad = ['{"a":1,"a":2}', '{"a":NaN}', '{"a":"\\ud800"}', '{"a":1e999}', f'{{"a":{nine}}}', '{"a":' * 5000]
    values, broken = json_objects(['{"a":1}'] * 10 + bad)
    assert (len(values), broken) == (10, len(bad))
    assert infer_schema(values)["properties"] == {"a": {"type": "integer"}}
    happened("counted, the schema is that of the sound ones", len(bad))
    for mixed in (['{"a":1}', "text"], ["[1]", "2"], ["{name} is here", '{"a":1}', "{x}"]):
        assert json_objects(mixed) == ([], 0), "answers that are not all objects have no schema"


@pytest.mark.parametrize(
    ("answer", "metric", "scorers"),
    [
        (lambda n: f"Dear {_words(n, 8)}, good bye.", "chrf", "exact_match chrf"),
        (lambda n: _json(kind=n % 2, reply=f"Dear {_words(n, 8)}"), "field_f1", "json_valid exact_match field_f1"),
        (lambda n: f"grep -c '{n}' {_words(n, 1)}.log", "chrf", "exact_match chrf"),
        (_words, "exact_match", "exact_match"),
        (lambda n: f"{n} Main St., {_words(n, 1)}", "exact_match", "exact_match"),
    ],
    ids=["sentences", "sentences in JSON", "commands", "words of the request", "addresses"],
)
def test_a_draft_measures_what_a_real_gain_can_pass(
    tmp_path: Path, answer: Callable[[int], str], metric: str, scorers: str
) -> None:
    made = _made(tmp_path, [{"prompt": f"to {_words(n)}", "completion": answer(n)} for n in range(400)])
    assert any("exact_match does not decide" in note for note in made.notes) is (metric != "exact_match")
    assert made.measured.startswith(f"measured: {metric}, ")
    assert "2 points more than the best untuned candidate" in made.measured
    settings = Project.load(tmp_path / "p").settings
    assert (settings.task.leading, " ".join(settings.task.scorers)) == (metric, scorers)  # type: ignore[arg-type]
    lift = settings.gates["lift"].model_dump()
    assert (lift["metric"], lift["over"], lift["at_least"]) == (metric, "best-untuned", 0.02)
    assert lift["or_metric"] == (None if metric == "exact_match" else "exact_match")
    steps = [step.analysis.metric for step in settings.rollout.steps if step.analysis]
    assert steps == ["success_rate" if metric in ("chrf", "exact_match") else "json_valid"] * 2


def _turns(*texts: str) -> Turns:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _called(n: int) -> dict[str, object]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"n": n})}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


_TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}


def test_no_schema_holds_answers_where_earlier_ones_are_texts_or_calls(tmp_path: Path) -> None:
    rows = [{"messages": _turns(f"{_words(n)} {n}", "Which size?", "large", _json(n=n))} for n in range(50)]
    for n in range(50):
        asked, said = _turns(f"call {_words(n)} {n}", _json(n=n))
        done = {"role": "tool", "tool_call_id": "a", "content": "done"}
        rows.append({"messages": [asked, _called(n), done, said], **_TOOLS})
    made = _made(tmp_path, rows)
    assert any(note.startswith("100 answers before a row's last one are texts or calls") for note in made.notes)
    assert any(note.startswith("50 rows hold tools, which the base's") for note in made.notes)
    project = Project.load(tmp_path / "p")
    assert project.schema is not None
    assert {each.constrain for each in project.settings.candidates.values()} == {False}
    assert (tmp_path / "p" / "prompts" / "short.txt").read_text() == "Answer as in the examples.\n"


@pytest.mark.parametrize("texts", [False, True], ids=["calls alone", "calls and JSON texts"])
def test_calls_of_tools_have_no_schema_of_the_task(tmp_path: Path, texts: bool) -> None:
    said = [_turns(f"lamp {n}", json.dumps({"n": n})) for n in range(120)]
    chats = [turns if texts and n % 2 else [turns[0], _called(n)] for n, turns in enumerate(said)]
    made = _made(tmp_path, [{"messages": turns, **_TOOLS} for turns in chats])
    assert (made.json_answers, made.broken, "answer.schema.json" in made.files) == (False, 0, False)
    assert Project.load(tmp_path / "p").settings.task.scorers == ("exact_match",)
    assert any(note.startswith(f"{60 if texts else 120} rows end in calls of tools") for note in made.notes)
    if texts:
        turns = [_turns(f"open {_words(n)}", _json(open=n), f"shut {n}", _json(shut=n)) for n in range(100)]
        project = _project(tmp_path / "both", [{"messages": each} for each in turns])
        assert project.schema is not None, "it allows every answer of a conversation"
        assert set(project.schema["properties"]) == {"open", "shut"}
        assert project.schema["required"] == []
        assert project.settings.candidates["tuned"].constrain is True


def test_the_build_writes_answers_in_the_order_of_requests_and_as_a_constraint_allows(tmp_path: Path) -> None:
    """json.dumps writes the letters of a name as escapes, which decoding under a schema does not."""
    write_model(tmp_path / "model")
    verbs, openings = "call ring phone meet wake ask remind text", ("please", "later on", "do", "kindly", "today")
    found = [
        {"prompt": f"{opening} at {n}pm {verb} Ren\u00e9e{n}",
         "completion": json.dumps({"who": f"Ren\u00e9e{n}", "at": f"{n}pm"}, indent=n % 2 or None)}
        for n, (opening, verb) in enumerate(product(openings, verbs.split()))
    ]  # fmt: skip
    made = _made(tmp_path, found, base=str(tmp_path / "model"))
    assert (made.reordered, made.respelled) == (40, 40)
    file = tmp_path / "p" / "tunesmith.yaml"
    for held, example in ((True, "Ren\u00e9e"), (False, "\\u00e9")):
        project = Project.load(tmp_path / "p")
        dataset = PipelineContext(project).dataset
        answers = [row.answer for split in ("train", "validation", "test") for row in dataset.examples(split)]
        assert {tuple(json.loads(answer)) for answer in answers} == {("at", "who")}
        assert all(example in answer for answer in answers)
        assert dataset.record.body.get("respelled") == (40 if held else None)
        assert dataset_summary(project.store, dataset.digest).rows.changed == len(answers)
        settings = yaml.safe_load(file.read_text())
        for candidate in settings["candidates"].values():
            candidate.pop("constrain", None)
        file.write_text(yaml.safe_dump(settings))


# The rivals: their prompt, and a classifier


def test_the_prompt_of_the_rivals_fits_the_rows(tmp_path: Path) -> None:
    def said(name: str, answer: Callable[[int], object]) -> str:
        asked = (f"{_words(n)} apples{n} for Ann{n} on {n % 28 + 1} May" for n in range(100))
        rows = [{"prompt": text, "completion": json.dumps(answer(n))} for n, text in enumerate(asked)]
        _made(tmp_path / name, rows)
        return "\n".join(_prompt(tmp_path / name)).replace('"', "")

    dates = said("a", lambda n: {"day": f"5-{n % 28 + 1:02}"})
    assert dates == "day: string", "nothing is copied, and each answer has the key"
    first = (tmp_path / "a" / "p" / "prompts" / "long.txt").read_text().splitlines()[0]
    assert "one JSON object on one line and nothing else" in first
    flat = said("b", lambda n: {"who": f"Ann{n}", "why": "because " * (n % 9), "at": f"{n}pm" if n % 2 else None})
    assert flat == (
        "who: string, copied from the request\nwhy: string\nat: null where the request says nothing, or string"
    )
    instead = said("c", lambda n: {"who": "" if n % 4 else f"Ann{n}", "kind": "boss" if n % 2 else f"Ann{n}"})
    assert instead == "who: string, copied from the request, or \nkind: string, copied from the request, or boss"
    order = {"by": {"name": "Ann{}"}, "items": [{"name": "apples{}", "unit": "kg"}], "tags": ["Ann{}"]}

    def ordered(n: int) -> object:
        text = json.dumps({"order": order if n % 2 else {**order, "items": [{"name": "apples{}", "unit": "box"}]}})
        whole = json.loads(text.replace("{}", str(n)))
        return whole if n % 2 else {"order": {key: whole["order"][key] for key in ("by", "items")}}

    assert said("e", ordered) == (
        "order: an object with\n  by: an object with\n    name: string\n  items: array of an object with\n"
        "    name: string\n    unit: one of box, kg\n  tags: array of string\n"
        "Copy each string from the request as it is written.\nLeave out what the request does not say."
    )


@pytest.mark.parametrize(
    ("rows", "named", "labels"),
    [
        (_answered(lambda n: f"intent_{n % 150:03}", 800), [f"intent_{n:03}" for n in range(150)], True),
        (_answered(lambda n: n % 3 - 1, 300), ["-1", "0", "1"], True),
        (_answered(lambda n: f"{n % 3}:30", 300), [], False),
        (_answered(lambda n: n % 3 / 2, 300), [], False),
        ([{"prompt": f"{_words(n)} {n % 3}", "completion": str(n % 3)} for n in range(300)], [], False),
        (_answered(lambda n: json.dumps({"n": n % 3}), 300), ['"n": integer'], True),
        (_answered(lambda n: json.dumps({"n": n}), 300), ['"n": integer'], False),
    ],
    ids=["150", "signs", "times", "decimals", "said", "labels in JSON", "numbers in JSON"],
)
def test_which_answers_are_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[object], named: list[str], labels: bool
) -> None:
    """Labels have a classifier as rival, and the prompt of the others names them."""
    for installed in (True, False):
        monkeypatch.setattr(new_project, "find_spec", lambda name, installed=installed: name if installed else None)
        made = _made(tmp_path / str(installed), rows)
        rival = "classifier" in Project.load(tmp_path / str(installed) / "p").settings.candidates
        assert rival is (labels and installed)
        assert any("tunesmith[classifier]" in note for note in made.notes) is (labels and not installed)
        assert _prompt(tmp_path / str(installed)) == named


# What init says


def _asked_at(verbs: str, rows: int = 400) -> list[dict[str, object]]:
    known = verbs.split()
    return [{"prompt": f"{known[n % len(known)]} at {n} o clock", "completion": _json(at=n)} for n in range(rows)]


def _keyed(key: str, value: Callable[[int], str], count: int = 400) -> list[dict[str, object]]:
    return [{**row, key: value(n)} for n, row in enumerate(_answered(str, count))]


def _rare(few: int, count: int) -> list[dict[str, object]]:
    """Rows of whose answers a few have a key that no other has."""
    return _answered(lambda n: {"all": [{"n": n} | ({f"k{n}": n} if n < few else {})]}, count)


def _every_second(text: str, count: int = 120) -> list[dict[str, object]]:
    return _answered(lambda n: f"{n} {text if n % 2 else 'yes'}", count)


_SEVERAL_KEYS = [
    row | ({"id": 1} if row["completion"] else {}) for row in _answered(int, 60, context="c", licence="MIT")
]
_SOME_TEXTS = _answered(lambda n: _json(n=n, said=f"The words are {_words(n)}") if n else "I cannot say")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (_answered(str, 400), None),
        (
            _keyed("conversation_id", lambda n: f"c{n // 10}"),
            "about 6 groups of equal size will be held out (a group: the rows of one `conversation_id`)",
        ),
        (_asked_at("call text"), "none is left to test. A group (the rows of one wording, whatever its values) is"),
        (
            _asked_at("go", 900) + _asked_at("call text mail wake ask", 100),
            "which are 920 rows, and 80 rows are left to train on. A gate decides nothing by fewer groups than 20: "
            "give rows of more groups, or set data.split.group_by",
        ),
        (_keyed("template", lambda n: f"part {n % 5}", 60), "`template` has 5 values, too few to hold out whole"),
        (_answered(str, 60), "about 12 rows will be held out to test, and a gate decides nothing by fewer than 20"),
        (_every_second("abc " * 1500), "about 60 rows have more than 1024 tokens"),
        (_every_second("\u6f22" * 1200), "about 60 rows have more than 1024 tokens"),
        (_every_second("abc " * 800, 400), None),
        (_answered(str, 150) * 2, "150 more rows are copies of these"),
        (_SEVERAL_KEYS, "so nothing is learned from them: `context` (60 times), `id` (59 times)"),
        (_rare(3, 200), "keys that one answer alone has: `all[].k0`, `all[].k1`, `all[].k2`. "),
        (_rare(1, 400), None),
        (_answered(lambda n: [n, _words(n, 1)], 200), "200 of 200 answers are JSON lists"),
        (_answered(lambda n: {"label": "yes"}, 200), "all answers are the same"),
        (_SOME_TEXTS, "99 of 100 answers hold a JSON object, but not every answer is one and no more"),
        (_SOME_TEXTS, "correct or remove the other rows, such as the one with 'I cannot say'"),
        (_answered(lambda n: _json(n=n) if n < 160 else f"no {n}", 400), None),
    ],
)
def test_notes(tmp_path: Path, rows: list[dict[str, object]], told: str | None) -> None:
    notes = _made(tmp_path, rows).notes
    assert (not notes) if told is None else any(told in note for note in notes), notes


def test_more_rows_are_held_out_where_fewer_groups_than_a_gate_needs_would_be(tmp_path: Path) -> None:
    for count, test in ((85, 0.35), (110, 0.3), (400, 0.2)):
        assert _project(tmp_path / str(count), _answered(str, count)).settings.data.split.test == test, count


def test_init_says_why_rows_are_not_usable(tmp_path: Path) -> None:
    greeted = [
        {"conversations": [{"from": who, "value": f"{_words(n)} {who}"} for who in ("gpt", "human", "gpt")]}
        for n in range(50)
    ]
    with pytest.raises(UsageError, match=r"^0 usable rows are too few .*: roles out of order \(50\)") as caught:
        _made(tmp_path / "a", greeted)
    assert "user and assistant turns alternate" in str(caught.value.fix)
    usable = [{"conversations": row["conversations"][1:]} for row in greeted]
    made = _made(tmp_path / "b", [*usable, *greeted, {"conversations": []}])
    assert made.unusable == 51
    why = "roles out of order (50), no assistant turn at the end (1)"
    assert f"rows without a usable conversation: {why}" in made.notes
    with pytest.raises(UsageError, match="12 usable rows are too few"):
        _made(tmp_path / "c", _answered(lambda n: "yes", 12) * 30)


def test_init_says_that_objects_of_parquet_lose_their_nulls(tmp_path: Path) -> None:
    rows = _answered(lambda n: {"n": n, "who": None if n % 2 else _words(n, 1)}, 60)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    made = make_project(tmp_path / "p", data=tmp_path / "rows.parquet", licence="MIT", base="model")
    assert any(note.startswith("60 answers are objects of Parquet or Arrow") for note in made.notes)
    schema = Project.load(tmp_path / "p").schema
    assert schema is not None
    assert schema["required"] == ["n"]
    assert not any("Parquet" in note for note in _made(tmp_path / "lines", rows).notes)


@pytest.mark.parametrize(
    ("systems", "same"), [(("Be brief. ",), True), (("Help in A.", "Help in B."), False), (("Be brief.", ""), False)]
)
def test_system_turns_of_rows_are_not_replaced(tmp_path: Path, systems: Sequence[str], same: bool) -> None:
    texts = [systems[n % len(systems)] for n in range(120)]
    turns = [[{"role": "system", "content": text}, *_turns(_words(n), str(n))] for n, text in enumerate(texts)]
    made = _made(tmp_path, [{"messages": each if each[0]["content"] else each[1:]} for each in turns])
    candidates = Project.load(tmp_path / "p").settings.candidates
    named = ("prompts/long.txt", "prompts/short.txt") if same else (None, None)
    assert (candidates["zero-shot"].prompt, candidates["tuned"].prompt) == named
    assert any(name.startswith("prompts/") for name in made.files) is same
    assert ("uses the row's own" in " ".join(made.notes)) is not same
    if same:
        assert (tmp_path / "p" / "prompts" / "long.txt").read_text() == "Be brief.\n"


@pytest.mark.parametrize(("key", "found"), [("row {0}", None), ("part {1}", None), ("talk {2}", "conversation_id")])
def test_rows_are_grouped_by_a_key_that_groups_them(tmp_path: Path, key: str, found: str | None) -> None:
    """By sixty talks, not by a group for each row or five parts."""
    rows = _keyed("conversation_id", lambda n: key.format(n, n % 5, n // 4), 240)
    assert _project(tmp_path, rows).settings.data.split.group_by == found


# The folder


def test_init_overwrites_nothing_and_names_the_project_by_its_folder(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": _write(tmp_path / "rows.jsonl", _answered(str, 60)), "licence": "MIT", "base": "m"}
    folder = tmp_path / "..My...Rows.."
    make_project(folder, **given)
    assert Project.load(folder).settings.name == "my.rows"
    with pytest.raises(UsageError, match="already"):
        make_project(folder, **given)
    (tmp_path / "q" / "prompts").mkdir(parents=True)
    (tmp_path / "q" / "prompts" / "long.txt").write_text("mine")
    with pytest.raises(UsageError, match="this exists already"):
        make_project(tmp_path / "q", **given)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tunesmith.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(UsageError, match="this is a link"):
        make_project(tmp_path / "linked", **given)
    (tmp_path / "old").mkdir()
    for name, place in (("Not a name", "new/p"), ("n" * 64, "new/p"), ("", "new/p"), ("", "old")):
        with pytest.raises(UsageError, match="name"):
            make_project(tmp_path / place, name=name, **given)
        assert not (tmp_path / "new").exists(), "a refused project leaves nothing behind"
    assert not list((tmp_path / "old").iterdir())


@pytest.mark.parametrize("known", ["*.pyc\n", "*.pyc", "*.pyc\n.tunesmith/\n"])
def test_a_gitignore_that_is_there_gets_a_line(tmp_path: Path, known: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".gitignore").write_text(known)
    made = _made(tmp_path, _answered(str, 60))
    assert (tmp_path / "p" / ".gitignore").read_text() == "*.pyc\n.tunesmith/\n"
    assert (".gitignore" in made.files) is (".tunesmith/" not in known)


def test_rows_may_be_a_url_and_are_named_once(tmp_path: Path) -> None:
    _write(tmp_path / "rows.jsonl", _answered(str, 60))
    url = f"file://{tmp_path}/rows.jsonl"
    words = ["init", "--licence", "MIT", "--base", "model", "-C", str(tmp_path / "p"), "--data", url]
    twice = CliRunner().invoke(app, [*words, "--data", "more.jsonl"]).exception
    assert isinstance(twice, UsageError)
    assert "pattern" in str(twice.fix)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    for told in ("60 rows, with answers in text", "measured: exact_match", "about 12 rows will be held out", "wrote"):
        assert told in done.stdout
    assert Project.load(tmp_path / "p").settings.data.sources[0].path == url


@pytest.mark.attack("input", "init: rows of which a strange project would follow", "a project that loads")
@pytest.mark.parametrize(
    ("answers", "more"),
    [
        ([reduce(lambda inner, _: {"a": inner}, range(50), n) for n in range(60)], {}),
        ([{"k": "a\0b" if n % 2 else "c\n\u202e", "n\0\n": n} for n in range(60)], {}),
        ([{"n": 10**300 + n % 2} for n in range(250)], {}),
        ([{"n": "word " * (1 if n else 60_000)} for n in range(60)], {}),
        ([{"n": "x" * 40_000 + str(n % 3)} for n in range(60)], {}),
        ([{"n": n} for n in range(60)], {"group": None}),
        ([{"n": n} for n in range(60)], {"template": ["a"], "group": "", "conversation_id": True}),
        ([{"n": n} for n in range(60)], {"template": "the only one"}),
        (['{"n": 1}'] * 59 + ['{"n": ' + "9" * 100_000], {}),
    ],
    ids=["deep", "control", "large", "long", "long-labels", "null-group", "odd-groups", "one-group", "broken"],
)
def test_strange_rows_make_a_project_that_loads(tmp_path: Path, answers: list[Any], more: dict[str, object]) -> None:
    texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
    _write(tmp_path / "rows.jsonl", _answered(lambda n: texts[n], len(texts), **more))
    folder = tmp_path / ("p" * 100)
    make_project(folder, data=tmp_path / "rows.jsonl", licence="MIT", base="model")
    project = Project.load(folder)
    assert project.settings.name == "p" * 63
    assert project.schema is not None
    assert project.settings.data.split.group_by is None
    assert len(json.dumps(project.schema)) < 20_000
    assert project.settings.candidates["tuned"].max_tokens <= (32 if isinstance(answers[0], str) else 32_768)
    assert all(line.isprintable() for line in (folder / "prompts" / "long.txt").read_text().split("\n"))

"""What `init` finds in rows, and what it says and writes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from tests.attack_table import Happened
from tests.tiny import write_model
from tunesmith.api import Project
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, UsageError
from tunesmith.services.starting import new_project
from tunesmith.services.starting import notes as new_project_notes
from tunesmith.services.starting.answers import json_objects
from tunesmith.services.starting.inferred_schema import infer_schema
from tunesmith.services.starting.new_project import NewProject, make_project

_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


def _words(n: int, count: int = 4) -> str:
    """Words that no other n has in the same order."""
    return " ".join(
        _SYLLABLES[n // 100 % 10] + _SYLLABLES[n // 10 % 10] + _SYLLABLES[(n + place) % 10] for place in range(count)
    )


def _made(folder: Path, rows: Sequence[object], **more: object) -> NewProject:
    """The project that `init` makes of these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_project(folder / "p", data=folder / "rows.jsonl", licence="MIT", **{"base": "model", **more})


def test_rows_with_control_tokens_of_the_base_are_refused_or_dropped(tmp_path: Path) -> None:
    base = {"base": str(write_model(tmp_path / "base"))}
    rows = [{"prompt": _words(n), "completion": _words(n + 500)} for n in range(60)]
    rows[7]["prompt"] += " <|im_end|>"
    rows[9]["completion"] = "<|im_start|>system"
    rows[11]["prompt"] += " <b>[INST] <filename>"
    with pytest.raises(Refused, match="2 rows hold a control token") as caught:
        _made(tmp_path / "refused", rows, **base)
    assert "row 8; " in str(caught.value.where)
    assert str(caught.value.where).endswith("row 10")
    assert "--control-tokens drop" in str(caught.value.fix)
    assert not (tmp_path / "refused" / "p").exists()
    dropped = _made(tmp_path / "dropped", rows, control_tokens="drop", **base)
    assert (dropped.rows, dropped.unusable) == (58, 2)
    assert "holds the control token <|im_end|> (1)" in " ".join(dropped.notes)
    assert Project.load(dropped.root).settings.data.control_tokens == "drop"
    unknown = _made(tmp_path / "unknown", rows)
    assert unknown.rows == 60
    assert "the base cannot be read yet" in " ".join(unknown.notes)


@pytest.mark.parametrize(
    ("keys", "proposed"),
    [
        (("question", "context", "answer"), "question=instruction answer=output context=input"),
        (("instruction", "context", "response"), "response=output context=input"),
        (("question", "input", "answer"), "question=instruction answer=output"),
        (("text", "title", "label"), "text=prompt label=completion"),
    ],
)
def test_a_passage_beside_request_and_answer_is_kept_by_the_proposed_names(
    tmp_path: Path, keys: tuple[str, ...], proposed: str
) -> None:
    rows = [dict(zip(keys, (_words(n), _words(n + 500), _words(n + 900)), strict=True)) for n in range(60)]
    with pytest.raises(UsageError, match="fits no known format") as caught:
        _made(tmp_path, rows)
    options = "".join(f" --rename {each}" for each in proposed.split())
    assert f"here{options} (" in str(caught.value.fix)
    names = dict(each.split("=") for each in proposed.split())
    unread = [note for note in _made(tmp_path, rows, rename=names).notes if "not read" in note]
    assert bool(unread) == ("title" in keys)


def test_init_says_which_keys_are_not_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": _words(n), "completion": str(n), "context": "c", "licence": "MIT", **({"id": n} if n else {})}
        for n in range(60)
    ]
    notes = _made(tmp_path, rows).notes
    assert "keys that are not read, so nothing is learned from them: `context` (60 times), `id` (59 times)" in notes


def test_answers_that_are_not_all_objects_have_no_schema() -> None:
    assert json_objects(['{"a":1}', "text"]) == ([], 0)
    assert json_objects(["[1]", "2"]) == ([], 0)
    assert json_objects(["{name} is here", '{"a":1}', "{x}"]) == ([], 0)


@pytest.mark.attack("input", "init: a few answers are broken JSON")
def test_broken_answers_are_counted_and_do_not_hide_the_schema(happened: Happened) -> None:
    bad = [
        '{"a":1,"a":2}',
        '{"a":NaN}',
        '{"a":"\\ud800"}',
        '{"a":1e999}',
        '{"a":' + "9" * 200_000 + "}",
        '{"a":' * 5000,
    ]
    values, broken = json_objects(['{"a":1}'] * 10 + bad)
    assert (len(values), broken) == (10, len(bad))
    assert infer_schema(values)["properties"] == {"a": {"type": "integer"}}
    happened("counted, the schema is that of the sound ones", len(bad))


def _asked_at(verbs: str, rows: int = 400) -> list[dict[str, str]]:
    known = verbs.split()
    return [
        {"prompt": f"{known[n % len(known)]} at {n} o clock", "completion": json.dumps({"at": n})} for n in range(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"prompt": _words(n), "completion": str(n), "conversation_id": f"c{n // 10}"} for n in range(400)],
            "about 6 groups of equal size will be held out (a group: the rows of one `conversation_id`)",
        ),
        (
            _asked_at("call text"),
            "`data build` will probably refuse the rows: none is left to test. They are in 2 groups (a group",
        ),
        (
            _asked_at("go", 900) + _asked_at("call text mail wake ask", 100),
            "which are 920 rows, and 80 rows are left to train on. A gate decides nothing by fewer groups than 20: "
            "give rows of more groups, or set data.split.group_by",
        ),
        (_asked_at("call text mail wake ask"), "groups of equal size will be held out"),
        ([{"prompt": _words(n), "completion": str(n)} for n in range(400)], None),
    ],
    ids=["conversations", "two wordings", "most rows held out", "five wordings", "a wording each"],
)
def test_init_says_that_too_few_groups_will_be_held_out(
    tmp_path: Path, rows: list[dict[str, str]], told: str | None
) -> None:
    notes = _made(tmp_path, rows).notes
    assert (not notes) if told is None else any(told in note for note in notes), notes


@pytest.mark.parametrize(("answer", "told"), [("abc " * 1500, True), ("\u6f22" * 1200, True), ("abc " * 800, False)])
def test_init_says_that_rows_are_too_long(tmp_path: Path, answer: str, told: bool) -> None:
    rows = [{"prompt": _words(n), "completion": f"{n} {answer if n % 2 else 'yes'}"} for n in range(120)]
    notes = _made(tmp_path, rows).notes
    assert any(note.startswith("about 60 rows have more than 1024 tokens") for note in notes) is told, notes


def test_copies_of_rows_do_not_count(tmp_path: Path) -> None:
    made = _made(tmp_path, [{"prompt": _words(n % 150), "completion": "yes"} for n in range(400)])
    assert made.rows == 150
    assert "250 more rows are copies of these: `data build` keeps one of each" in made.notes
    with pytest.raises(UsageError, match="12 usable rows are too few"):
        _made(tmp_path / "few", [{"prompt": _words(n % 12), "completion": "yes"} for n in range(400)])


def _turns(*texts: str) -> list[dict[str, object]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _asks_back(n: int) -> list[dict[str, object]]:
    answer = json.dumps({"size": ("large", "small")[n % 2], "name": f"Ann{n}"})
    return _turns(f"a pizza {_words(n)}", "What size would you like?", f"large for Ann{n}", answer)


def _calls(n: int) -> list[dict[str, object]]:
    called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"n": n})}}
    asked, said = _turns(f"{_words(n)} {n}", json.dumps({"n": n}))
    made = {"role": "assistant", "content": None, "tool_calls": [called]}
    return [asked, made, {"role": "tool", "tool_call_id": "a", "content": "done"}, said]


@pytest.mark.parametrize("turns", [_asks_back, _calls])
def test_no_schema_holds_answers_where_earlier_ones_are_texts_or_calls(
    tmp_path: Path, turns: Callable[[int], list[dict[str, object]]]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = {"tools": [tool]} if turns is _calls else {}
    made = _made(tmp_path, [{"messages": turns(n), **tools} for n in range(100)])
    assert any(note.startswith("100 answers before a row's last one are texts or calls") for note in made.notes)
    project = Project.load(tmp_path / "p")
    assert project.schema is not None
    assert {each.constrain for each in project.settings.candidates.values()} == {False}
    assert (tmp_path / "p" / "prompts" / "short.txt").read_text() == "Answer as in the examples.\n"


def test_a_schema_allows_every_answer_of_a_conversation(tmp_path: Path) -> None:
    rows = [
        {"messages": _turns(f"open {_words(n)}", json.dumps({"open": n}), f"shut {n}", json.dumps({"shut": n}))}
        for n in range(100)
    ]
    _made(tmp_path, rows)
    project = Project.load(tmp_path / "p")
    assert project.schema is not None
    assert set(project.schema["properties"]) == {"open", "shut"}
    assert project.schema["required"] == []
    assert project.settings.candidates["tuned"].constrain is True


def _long_prompt(folder: Path, asked: Callable[[int], str], answer: Callable[[int], object]) -> str:
    _made(folder, [{"prompt": asked(n), "completion": json.dumps(answer(n))} for n in range(100)])
    return (folder / "p" / "prompts" / "long.txt").read_text()


@pytest.mark.parametrize(("rare", "told"), [(3, True), (1, False)])
def test_init_says_that_later_answers_may_have_other_keys(tmp_path: Path, rare: int, told: bool) -> None:
    rows = [
        {"prompt": _words(n), "completion": {"all": [{"n": n} | ({f"k{n}": n} if n < rare else {})]}}
        for n in range(200)
    ]
    notes = [note for note in _made(tmp_path, rows).notes if "one answer alone" in note]
    assert [note.split(". ")[0] for note in notes] == (
        ["keys that one answer alone has: `all[].k0`, `all[].k1`, `all[].k2`"] if told else []
    )


def test_the_prompt_of_the_rivals_fits_the_rows(tmp_path: Path) -> None:
    first = "Answer the request with one JSON object on one line and nothing else: no explanation, no code fence."
    dates = _long_prompt(
        tmp_path / "a", lambda n: f"{_words(n)} on {n % 28 + 1} May", lambda n: {"day": f"5-{n % 28 + 1:02}"}
    )
    assert dates.splitlines() == [first, '"day": string'], "nothing is copied, and each answer has the key"
    nulls = _long_prompt(
        tmp_path / "b",
        lambda n: f"{_words(n)} Ann{n}",
        lambda n: {"who": f"Ann{n}", "why": "because " * (n % 9), "at": f"{n}pm" if n % 2 else None},
    )
    assert nulls.splitlines()[1:] == [
        '"who": string, copied from the request',
        '"why": string',
        '"at": null where the request says nothing, or string',
    ]
    others = _long_prompt(
        tmp_path / "c",
        lambda n: f"{_words(n)} Ann{n}",
        lambda n: {
            "who": f"Ann{n}" if n % 4 == 0 else "",
            "kind": "boss" if n % 2 else f"Ann{n}",
            "any": [n, {"a": n}],
        },
    )
    assert others.splitlines()[1:] == [
        '"who": string, copied from the request, or ""',
        '"kind": string, copied from the request, or "boss"',
        '"any": array of integer or an object with',
        '  "a": integer',
    ]


def test_the_prompt_of_the_rivals_names_every_key_and_label(tmp_path: Path) -> None:
    prompt = _long_prompt(
        tmp_path,
        lambda n: f"{_words(n)} apples{n} for Ann{n}",
        lambda n: {
            "order": {
                "customer": {"name": f"Ann{n}"},
                "items": [{"name": f"apples{n}", "unit": ("kg", "box")[n % 2]}],
                **({"tags": [f"Ann{n}"]} if n % 2 else {}),
            }
        },
    )
    assert prompt.splitlines()[1:] == [
        '"order": an object with',
        '  "customer": an object with',
        '    "name": string',
        '  "items": array of an object with',
        '    "name": string',
        '    "unit": one of "box", "kg"',
        '  "tags": array of string',
        "Copy each string from the request as it is written.",
        "Leave out what the request does not say.",
    ]


@pytest.mark.parametrize(
    ("answer", "primary", "told"),
    [
        (lambda n: f"Dear {_words(n, 8)}, good bye.", None, "set task: {scorers: [chrf, exact_match], primary: chrf}"),
        (
            lambda n: json.dumps({"kind": n % 2, "reply": f"Dear {_words(n, 8)}"}),
            "field_f1",
            "compares fields (field_f1)",
        ),
        (lambda n: _words(n), None, None),
        (lambda n: f"Please say the words again: {n % 100}", None, None),
    ],
    ids=["sentences", "sentences in JSON", "words of the request", "a hundred sentences"],
)
def test_exact_match_does_not_decide_over_sentences(
    tmp_path: Path, answer: Callable[[int], str], primary: str | None, told: str | None
) -> None:
    notes = _made(tmp_path, [{"prompt": f"to {_words(n)}", "completion": answer(n)} for n in range(400)]).notes
    assert (not notes) if told is None else any(told in note for note in notes), notes
    settings = Project.load(tmp_path / "p").settings
    assert settings.task.primary == primary
    lift = settings.gates["lift"].model_dump()
    assert lift["metric"] == (primary or "exact_match")


_LABELS = ("refund", "shipping", "other")


@pytest.mark.parametrize("installed", [True, False])
def test_labels_have_a_classifier_as_rival_and_a_prompt_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    for module in (new_project, new_project_notes):
        monkeypatch.setattr(module, "find_spec", lambda name: name if installed else None)
    made = _made(tmp_path, [{"prompt": _words(n), "completion": _LABELS[n % 3]} for n in range(300)])
    assert ("classifier" in Project.load(tmp_path / "p").settings.candidates) is installed
    assert any("tunesmith[classifier]" in note for note in made.notes) is not installed
    assert (tmp_path / "p" / "prompts" / "long.txt").read_text().splitlines()[1:] == sorted(_LABELS)


@pytest.mark.parametrize(("labels", "rows"), [(77, 400), (150, 3000)])
def test_many_labels_are_named_too(tmp_path: Path, labels: int, rows: int) -> None:
    """Banking77 has 77 intents and CLINC150 has 150. A prompt without them would flatter tuning."""
    intents = [f"intent_{_SYLLABLES[n // 10 % 10]}_{_SYLLABLES[n % 10]}_{n // 100}" for n in range(labels)]
    _made(tmp_path, [{"prompt": _words(n), "completion": intents[n % labels]} for n in range(rows)])
    assert (tmp_path / "p" / "prompts" / "long.txt").read_text().splitlines()[1:] == sorted(intents)
    assert ("classifier" in Project.load(tmp_path / "p").settings.candidates) is bool(find_spec("sklearn"))


@pytest.mark.parametrize(
    ("answer", "asked", "labels"),
    [
        (lambda n: 1 + n % 5, _words, ["1", "2", "3", "4", "5"]),
        (lambda n: n % 3 - 1, _words, ["-1", "0", "1"]),
        (lambda n: f"{n % 3}", lambda n: f"{_words(n)} {n % 3}", None),
        (lambda n: f"{n % 3}:30", _words, None),
        (lambda n: n % 3 / 2, _words, None),
    ],
    ids=["stars", "signs", "said", "times", "decimals"],
)
def test_whole_numbers_may_be_labels(
    tmp_path: Path, answer: Callable[[int], object], asked: Callable[[int], str], labels: list[str] | None
) -> None:
    _made(tmp_path, [{"prompt": asked(n), "completion": answer(n)} for n in range(300)])
    assert ("classifier" in Project.load(tmp_path / "p").settings.candidates) is bool(labels and find_spec("sklearn"))
    assert (tmp_path / "p" / "prompts" / "long.txt").read_text().splitlines()[1:] == (labels or [])


def test_answers_that_are_objects_or_lists(tmp_path: Path) -> None:
    for name, answer in (("objects", lambda n: {"n": n, "who": None}), ("lists", lambda n: [n, _words(n, 1)])):
        rows = [{"prompt": _words(n), "completion": answer(n)} for n in range(200)]
        made = _made(tmp_path / name, rows)
        assert made.json_answers is (name == "objects")
        assert any(note.startswith("200 of 200 answers are JSON lists") for note in made.notes) is (name == "lists")


def test_init_says_that_objects_of_parquet_lose_their_nulls(tmp_path: Path) -> None:
    rows = [{"prompt": _words(n), "completion": {"n": n, "who": None if n % 2 else _words(n, 1)}} for n in range(60)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    made = make_project(tmp_path / "p", data=tmp_path / "rows.parquet", licence="MIT", base="model")
    assert any(note.startswith("60 answers are objects of Parquet or Arrow") for note in made.notes)
    project = Project.load(tmp_path / "p")
    assert project.schema is not None
    assert project.schema["required"] == ["n"]
    assert not any("Parquet" in note for note in _made(tmp_path / "lines", rows).notes)


def test_a_rename_of_a_key_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": _words(n), "completion": str(n)} for n in range(60)]
    with pytest.raises(UsageError, match="no row has the key promt") as caught:
        _made(tmp_path, rows, rename={"promt": "prompt"})
    assert "completion, prompt" in str(caught.value.fix)


def test_init_says_which_bases_know_tools(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    notes = _made(tmp_path, [{"messages": _calls(n), "tools": [tool]} for n in range(60)]).notes
    assert any(note.startswith("60 rows hold tools, which the base's chat template must render") for note in notes)


def test_rows_may_be_a_url_and_are_named_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": _words(n), "completion": str(n)}) + "\n" for n in range(60))
    )
    url = f"file://{tmp_path}/rows.jsonl"
    words = ["init", "--licence", "MIT", "--base", "model", "-C", str(tmp_path / "p"), "--data", url]
    twice = CliRunner().invoke(app, [*words, "--data", "more.jsonl"]).exception
    assert isinstance(twice, UsageError)
    assert "pattern" in str(twice.fix)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert Project.load(tmp_path / "p").settings.data.sources[0].path == url


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("proprietary", "LicenseRef-NAME for rows of your own"),
        ("MIT License", "LicenseRef-NAME for rows of your own"),
        ("CC-BY-NC-4.0", "run init with --licence LicenseRef-NAME, then write both into tunesmith.yaml"),
    ],
)
def test_a_refused_licence_says_what_to_name(tmp_path: Path, licence: str, told: str) -> None:
    with pytest.raises(Refused) as caught:
        make_project(tmp_path / "p", data="rows.jsonl", licence=licence, base="model")
    assert told in str(caught.value.fix)


def test_labels_in_json_have_a_classifier_as_rival_and_other_answers_have_none(tmp_path: Path) -> None:
    for name, answer in (("labels", lambda n: n % 3), ("open", lambda n: n)):
        rows = [{"prompt": _words(n), "completion": json.dumps({"n": answer(n)})} for n in range(300)]
        _made(tmp_path / name, rows)
        candidates = Project.load(tmp_path / name / "p").settings.candidates
        assert ("classifier" in candidates) is (name == "labels")


def test_init_says_that_one_answer_for_all_teaches_nothing(tmp_path: Path) -> None:
    notes = _made(
        tmp_path, [{"prompt": _words(n), "completion": json.dumps({"label": "yes"})} for n in range(200)]
    ).notes
    assert any(note.startswith("all answers are the same") for note in notes)
    assert "classifier" not in Project.load(tmp_path / "p").settings.candidates


@pytest.mark.parametrize("keys", [("instruction", "input", "output"), ("task", "text", "label")])
def test_one_instruction_of_all_rows_becomes_their_system_turn(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """As a part of each request it would make the rows near duplicates, which the build removes."""
    told = "Is the review positive or negative? Answer with one word, in lower case."
    rows = [dict(zip(keys, (told, _words(n), ("positive", "negative")[n % 2]), strict=True)) for n in range(200)]
    names = {key: name for key, name in zip(keys, ("instruction", "input", "output"), strict=True) if key != name}
    made = _made(tmp_path, rows, rename=names)
    assert any(note.startswith("all rows have one instruction") for note in made.notes)
    settings = Project.load(tmp_path / "p").settings
    assert settings.data.sources[0].rename == dict(zip(keys, ("system", "prompt", "completion"), strict=True))
    assert (tmp_path / "p" / "prompts" / "long.txt").read_text() == f"{told}\n"


@pytest.mark.parametrize("change", [{"instruction": "Another one."}, {"input": ""}, {"prompt": "x"}])
def test_other_instructions_stay_in_the_request(tmp_path: Path, change: dict[str, str]) -> None:
    rows = [{"instruction": "Say it again.", "input": _words(n), "output": _words(n)} for n in range(60)]
    _made(tmp_path, [*rows, rows[0] | change])
    assert Project.load(tmp_path / "p").settings.data.sources[0].rename == {}


def test_files_of_two_formats_are_not_one_source(tmp_path: Path) -> None:
    plain = [{"prompt": _words(n), "completion": str(n)} for n in range(60)]
    chats = [{"messages": _turns(_words(n), str(n))} for n in range(60)]
    for name, rows in (("a", plain), ("b", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="it looks like messages") as caught:
        make_project(tmp_path / "p", data=tmp_path / "*.jsonl", licence="MIT", base="model")
    assert "b.jsonl" in str(caught.value.where)
    assert "move the others into another source" in str(caught.value.fix)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("known", ["*.pyc\n", "*.pyc", "*.pyc\n.tunesmith/\n"])
def test_a_gitignore_that_is_there_gets_a_line(tmp_path: Path, known: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".gitignore").write_text(known)
    made = _made(tmp_path, [{"prompt": _words(n), "completion": str(n)} for n in range(60)])
    assert (tmp_path / "p" / ".gitignore").read_text() == "*.pyc\n.tunesmith/\n"
    assert (".gitignore" in made.files) is (".tunesmith/" not in known)


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


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda n: json.dumps({"n": n, "said": f"The words are {_words(n)}"}) if n else "I cannot say", 99),
        (lambda n: "```json\n" + json.dumps({"n": n}, indent=1) + "\n```\n", 100),
        (lambda n: json.dumps({"n": n}) if n < 40 else "I cannot say", None),
    ],
    ids=["one text", "fences", "mostly texts"],
)
def test_init_says_that_nearly_all_answers_are_json(
    tmp_path: Path, answer: Callable[[int], str], told: int | None
) -> None:
    made = _made(tmp_path, [{"prompt": _words(n), "completion": answer(n)} for n in range(100)])
    assert not made.json_answers
    found = [note for note in made.notes if "hold a JSON object" in note]
    assert all(note.endswith("such as the one with 'I cannot say'") is (told == 99) for note in found)
    assert [note.split(" hold")[0] for note in found] == ([] if told is None else [f"{told} of 100 answers"])
    assert not any("a sentence of their own" in note for note in made.notes)

"""What a new project's schema says of the rows, and how its data build spells their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.api import Project
from tunesmith.candidates.grammars.copying import copied_fields
from tunesmith.core.messages import Message
from tunesmith.services.starting.inferred_schema import infer_schema, schema_and_copied
from tunesmith.services.starting.new_project import make_project

TOWNS = ("Berlin", "Bonn", "Bremen", "Ulm")
LABELS = ("next", "play", "stop")


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        (lambda n: 15 + n % 16, (0, 45)),
        (lambda n: -5 + n % 16, (-20, 25)),
        (lambda n: 15.5 + n % 16 / 2, (0, 31)),
        (lambda n: 1000 + n, None),
        (lambda n: (15 + n % 16) * 1e-9, None),
    ],
    ids=["temperatures", "below-zero", "halves", "orders", "exponents"],
)
def test_a_range_that_is_seen_again_and_again_gets_a_margin(
    value: Callable[[int], float], ends: tuple[int, int] | None
) -> None:
    values = [{"n": value(n)} for n in range(1000)]
    found = infer_schema(values)["properties"]["n"]
    assert (found.get("minimum"), found.get("maximum")) == (ends or (None, None))
    jsonschema.validate(values[-1]["n"], found)


@pytest.mark.parametrize(
    "value",
    [lambda n: 3, lambda n: 2015 + n % 10, lambda n: 1 + n % 10, lambda n: n % 2 * 10**300 + n % 20],
    ids=["constant", "years", "months", "beyond all readers"],
)
def test_a_sample_of_numbers_is_no_range(value: Callable[[int], int]) -> None:
    schema = infer_schema([{"n": value(n)} for n in range(250)])
    assert schema["properties"]["n"] == {"type": "integer"}


def test_a_key_without_values_stays_open() -> None:
    schema = infer_schema([{"note": None, "more": {}, "seen": [None], "n": n} for n in range(40)])
    for answer in ({"note": "a", "more": {"b": 1}, "seen": ["c"], "n": 1}, {"note": 1, "more": {}, "seen": [], "n": 2}):
        jsonschema.validate(answer, schema)


def test_a_vocabulary_is_closed_only_where_its_values_are_seen_again() -> None:
    often = [{"label": f"l{n % 20}"} for n in range(400)]
    assert infer_schema(often)["properties"]["label"] == {"type": "string", "enum": sorted(f"l{n}" for n in range(20))}
    many = [{"label": f"l{n % 150}"} for n in range(3000)]
    assert len(infer_schema(many)["properties"]["label"]["enum"]) == 150
    levels = [{"label": f"P{1 + n % 4}"} for n in range(400)]
    assert "enum" in infer_schema(levels)["properties"]["label"]
    rare = [{"label": f"rare{n}" if n < 10 else f"l{n % 10}"} for n in range(600)]
    assert infer_schema(rare)["properties"]["label"] == {"type": "string"}


@pytest.mark.parametrize("count", [3, 12])
def test_what_requests_say_is_copied_and_listed_where_they_list_it(tmp_path: Path, count: int) -> None:
    """Few towns in 360 rows would be listed, and another one could never be answered."""
    towns = [f"{first}{last}" for first in ("Oster", "Nieder", "Wester") for last in ("burg", "heim", "au", "feld")]
    found = []
    for n in range(360):
        town, urgency = towns[n % count], ("high", "low")[n % 2]
        there = f" to {town}" if n % 10 else ""
        asked = {"role": "user", "content": f"A train{there}, number {n}. Is it of high or low priority?"}
        answer = {"urgency": urgency, "kind": ("slow", "fast")[n // 12 % 2]} | ({"town": town} if there else {})
        found.append({"messages": [asked, {"role": "assistant", "content": json.dumps(answer)}]})
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    make_project(tmp_path / "p", data=data, licence="CC0-1.0", base="model")
    project = Project.load(tmp_path / "p")
    assert project.schema is not None
    assert project.schema["properties"] == {
        "town": {"type": "string"},
        "urgency": {"type": "string", "enum": ["high", "low"]},
        "kind": {"type": "string", "enum": ["fast", "slow"]},
    }
    assert project.settings.candidates["tuned"].copied == ("*",)


@pytest.mark.parametrize(
    ("asked", "answered", "later"),
    [
        (lambda n: f"to {TOWNS[n % 4].lower()}", lambda n: {"town": TOWNS[n % 4]}, {"town": "Dresden"}),
        (lambda n: f"for {1 + n % 15} people", lambda n: {"guests": 1 + n % 15}, {"guests": 20}),
        (lambda n: f"please {LABELS[n % 3]} it", lambda n: {"intent": LABELS[n % 3]}, {"intent": "pause"}),
    ],
    ids=["other-capitals", "numbers", "labels-or-copies"],
)
def test_what_requests_say_is_neither_closed_nor_copied_where_a_later_one_may_say_it_otherwise(
    asked: Callable[[int], str], answered: Callable[[int], dict[str, object]], later: dict[str, object]
) -> None:
    rows = [(json.dumps(answered(n)), [Message(role="user", content=f"{n}: {asked(n)}")]) for n in range(300)]
    schema, copied = schema_and_copied([answered(n) for n in range(300)], rows)
    jsonschema.validate(later, schema)
    assert not copied, "a label that a request does not say could not be answered"


def test_a_text_that_most_requests_say_is_not_closed() -> None:
    """Some answers write "" for a missing town, or correct what the request says. Levels are a closed list though the
    request says most of them: only one is understood where it says nothing."""
    towns = [f"{first}{last}" for first in ("Oster", "Nieder", "Wester") for last in ("burg", "heim", "au", "feld")]
    levels = ("high", "low", "normal")
    values, rows = [], []
    for n in range(600):
        town, level = towns[n % 12], levels[n // 12 % 3]
        told = "" if level == "normal" else f"{level} priority"
        value = {"to": town if n % 2 else "", "from": town, "level": level}
        asked = f"{n}: {'away' if n % 20 == 0 else 'from ' + town} {'to ' + town if n % 2 else ''} {told}"
        values.append(value)
        rows.append((json.dumps(value), [Message(role="user", content=asked)]))
    properties = schema_and_copied(values, rows)[0]["properties"]
    assert properties["to"] == properties["from"] == {"type": "string"}, "the next request may say another town"
    assert properties["level"] == {"type": "string", "enum": ["high", "low", "normal"]}


@pytest.mark.parametrize(("count", "copied"), [(20, []), (90, ["*"])])
def test_many_texts_that_requests_say_are_copies_and_not_labels(count: int, copied: list[str]) -> None:
    values = [{"to": f"Oster{n % count}"} for n in range(20 * count)]
    rows = [(json.dumps(value), [Message(role="user", content=f"go to {value['to']}")]) for value in values]
    assert schema_and_copied(values, rows)[1] == copied


@pytest.mark.parametrize(
    "asked",
    [
        lambda n: f"{n}x lamp",
        lambda n: f"{n} lamps for \u20ac{n}",
        lambda n: f"lamp, {n}pcs" if n > 1 else "a lamp",
        lambda n: {1: "a lamp", 12: "a dozen lamps"}.get(n, f"{n} lamps"),
    ],
    ids=["3x", "signs", "3pcs", "one is not said"],
)
def test_a_number_that_requests_say_has_no_range(asked: Callable[[int], str]) -> None:
    numbers = [1 + n % 15 for n in range(300)]
    rows = [(json.dumps({"n": n}), [Message(role="user", content=asked(n))]) for n in numbers]
    schema, _ = schema_and_copied([{"n": n} for n in numbers], rows)
    assert schema["properties"]["n"] == {"type": "integer"}, "the next request may say 50"
    rows = [(json.dumps({"n": n / 2}), [Message(role="user", content=f"{n / 2} degrees")]) for n in numbers]
    schema, _ = schema_and_copied([{"n": n / 2} for n in numbers], rows)
    assert schema["properties"]["n"] == {"type": "number"}


def test_what_is_proposed_to_copy_holds_every_text() -> None:
    """A wildcard that leaves a text of its object open is refused, so the fields are named one by one."""
    values = [{"who": f"Name{n}", "size": n if n % 2 else f"Large{n}", "tags": [f"Tag{n}"]} for n in range(60)]
    asked = [f"for Name{n}, size {value['size']}, tag Tag{n}" for n, value in enumerate(values)]
    rows = [
        (json.dumps(value), [Message(role="user", content=text)]) for value, text in zip(values, asked, strict=True)
    ]
    schema, copied = schema_and_copied(values, rows)
    assert copied == ["*", "tags[]"]
    assert copied_fields(schema, copied, "copy") == ("who", "size", "tags[]")
    for value in values:
        value["tags"] = [f"Thing{value['who']}"]
    rows = [(json.dumps(value), own) for value, (_, own) in zip(values, rows, strict=True)]
    schema, copied = schema_and_copied(values, rows)
    assert copied == ["who", "size"]
    assert copied_fields(schema, copied, "copy") == ("who", "size")


@pytest.mark.parametrize("said", [True, False], ids=["table", "record"])
def test_an_object_whose_keys_requests_say_is_a_table(said: bool) -> None:
    """A recipe names any ingredients, and its values are of one kind. Other keys are those of a record."""
    answers = [{"amounts": {f"k{(n + m) % 40}": m for m in range(3)}} for n in range(300)]
    texts = [" and ".join(answer["amounts"]) if said else "the usual" for answer in answers]
    rows = [
        (json.dumps(answer), [Message(role="user", content=text)]) for answer, text in zip(answers, texts, strict=True)
    ]
    schema, _ = schema_and_copied(answers, rows)
    amounts = jsonschema.Draft202012Validator(schema["properties"]["amounts"])
    assert amounts.is_valid({"saffron": 2}) is said
    assert not amounts.is_valid({"saffron": "much"})


@pytest.mark.parametrize(
    "text",
    [
        *("2024-05-{:02}", "2024-05-01T10:{:02}:00Z", "{}/5/2024", "{}:30", "{} pm", "-{}.5", "1,0{:02}", "{}%"),
        *("${}", "\u20ac {}.50", "{} min", "{} hours 5 minutes", "PT{}M", "Q3 20{:02}", "2026-W{:02}", "v1.{}"),
    ],
)
def test_numbers_dates_times_and_amounts_in_texts_are_not_listed(text: str) -> None:
    schema = infer_schema([{"at": text.format(1 + n % 12)} for n in range(300)])
    assert schema["properties"]["at"] == {"type": "string"}


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

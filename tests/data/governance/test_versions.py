"""From one dataset version to the next: what changed, what goes with it, who signed it off."""

import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.rows import build, many_rows, row, settings, write_jsonl
from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.building.signoff import require_signed, sign_off, sign_offs
from tunesmith.data.dataset import SPLITS, Dataset
from tunesmith.data.governance.cards import croissant, datasheet
from tunesmith.data.governance.difference import difference, removed_sample
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.store import audit, database
from tunesmith.store.people import identities
from tunesmith.store.store import Store


@pytest.fixture
def two(tmp_path: Path) -> tuple[Store, Dataset, Dataset]:
    rows = many_rows(80)
    first = build(tmp_path, rows=rows)
    rows[3]["messages"][1]["content"] = "another answer"
    write_jsonl(tmp_path / "rows.jsonl", [*rows[1:], row("an entirely new request", "new", licence="CC0-1.0")])
    return Store(tmp_path / "store"), first, build(tmp_path)


def test_rows_added_removed_changed_and_moved(two: tuple[Store, Dataset, Dataset], tmp_path: Path) -> None:
    store, first, second = two
    found = difference(store, first.digest, second.digest).document()
    assert found["rows"] == {"same": 78, "moved": 0, "added": 1, "removed": 1, "changed": 1}
    assert found["balance"]["licence"] == {"CC0-1.0": [0, 1], "MIT": [80, 79]}
    other = build(tmp_path, settings(split={"seed": 1}))
    found = difference(store, second.digest, other.digest).document()
    assert found["rows"]["moved"] > 0
    assert found["rows"]["moved"] + found["rows"]["same"] == 80
    assert found["settings"] == {"split.seed": [0, 1]}


def test_a_sample_of_each_removed_class_with_what_stood_there_as_json(tmp_path: Path) -> None:
    said = [row("said twice", "x")] * 2 + [row(f"request number {n} of its kind", "") for n in range(9)]
    more = {"at": datetime(2026, 1, 2, tzinfo=UTC), "noise": math.nan, "raw": b"\xff"}
    table = pyarrow.Table.from_pylist([{**one, **more} for one in (*many_rows(80), *said)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    dataset = build(tmp_path, settings("rows.parquet"))
    sample = removed_sample(dataset, tmp_path, 5)
    assert {reason: len(rows) for reason, rows in sample.items()} == {"empty assistant turn": 5, "exact duplicate": 1}
    fields: Any = sample["exact duplicate"][0].fields
    assert fields["messages"][0]["content"] == "said twice"
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["at"].startswith("2026-01-02")
    assert sample == removed_sample(dataset, tmp_path, 5)
    pyarrow.parquet.write_table(table[:80], tmp_path / "rows.parquet")
    with pytest.raises(Refused, match="changed since the build"):
        removed_sample(dataset, tmp_path, 5)


def test_cards_of_a_dataset(two: tuple[Store, Dataset, Dataset], tmp_path: Path) -> None:
    store, first, _ = two
    text = datasheet(first, "na|me\n# of it", [])
    assert text.splitlines()[0].startswith("# Datasheet of na\\|me # of it")
    assert "| MIT | 80 |" in text
    assert "No steward" in text
    mlcroissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed (group: dev)")
    for split in SPLITS:
        shutil.copy(store.blob_path(first.record.blobs[f"{split}.jsonl"]), tmp_path / f"{split}.jsonl")
    (tmp_path / "croissant.json").write_text(json.dumps(croissant(first, "rows")))
    read = mlcroissant.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert not read.metadata.issues.errors
    said = {one["test/id"].decode(): [text.decode() for text in one["test/messages"]] for one in read.records("test")}
    assert said == {one.id: [turn.content for turn in one.messages] for one in first.examples("test")}


def test_only_a_steward_signs_and_only_while_they_are_one(two: tuple[Store, Dataset, Dataset]) -> None:
    store, first, second = two
    owner = identities.ensure_owner(store).name
    identities.add_user(store, "sten", ["steward"], actor=owner)
    for who, reason, said in ((owner, "mine", "may not"), ("sten", " ", "reason")):
        with pytest.raises((Refused, UsageError), match=said):
            sign_off(store, first.digest, steward=who, reason=reason)
    with pytest.raises(Refused, match="no steward"):
        require_signed(store, first.digest)
    digest = sign_off(store, first.digest, steward="sten", reason="looked at 50 rows")
    require_signed(store, first.digest)
    assert [one.signoff for one in sign_offs(store, first.digest)] == [digest]
    with database.reading(store.engine) as session:
        entry = audit.entries(session)[-1]
    assert (entry.actor, entry.action, entry.subject) == ("sten", "data.sign", first.digest)
    with pytest.raises(Refused):  # of another version it says nothing
        require_signed(store, second.digest)
    recall(store, Cause(kind="row", value=second.examples("train")[0].id), reason="asked to", actor="sten")
    with pytest.raises(Refused, match="was recalled: asked to"):
        sign_off(store, second.digest, steward="sten", reason="looked at 50 rows")
    identities.set_roles(store, "sten", ["operator"], actor=owner)
    with pytest.raises(Refused):
        require_signed(store, first.digest)

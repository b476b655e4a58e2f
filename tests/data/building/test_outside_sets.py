"""Nothing of a test set from elsewhere stays in any split, and the record proves it without the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.rows import build, held, many_rows, row, settings, turns, write_jsonl
from tunesmith.core.errors import UsageError
from tunesmith.data.building.verify import verify_dataset
from tunesmith.store.records import Record
from tunesmith.store.store import Store

OUTSIDE = {"decontaminate": [{"path": "benchmark.csv", "rename": {"text": "prompt", "label": "completion"}}]}


def answer(**slots: str) -> str:
    return json.dumps({"intent": "Play", "slots": slots})


@pytest.fixture
def contaminated(tmp_path: Path) -> Path:
    leaked = [
        row("please turn the heating in the hall up to the top", "a"),  # near
        row("Wake me at seven, please!", "b"),  # the same
        row("play waterloo by abba", answer(track="waterloo", artist="abba")),  # the same but for values
        row("stop the music", answer()),  # not there
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(120), *leaked])
    benchmark = ["please turn the heating in the hall up to the tops,x", "wake me at seven please,y"]
    song = json.dumps(answer(track="yesterday", artist="the beatles")).replace('\\"', '""')
    benchmark.append(f"play yesterday by the beatles,{song}")
    (tmp_path / "benchmark.csv").write_text("text,label\n" + "\n".join(benchmark) + "\n")
    return tmp_path


def test_near_rows_and_equal_wordings_are_removed_and_verified_without_the_files(contaminated: Path) -> None:
    dataset = build(contaminated, settings(**OUTSIDE))
    rows = dataset.record.body["rows"]
    assert rows["removed"] == {
        "near a row of an outside test set": 2,
        "same wording as a row of an outside test set": 1,
    }
    assert rows["read"] == rows["kept"] + 3
    left = [one.request[0].content for one in held(dataset)]
    assert "stop the music" in left
    assert not [text for text in left if text.startswith(("please turn", "Wake", "play "))]
    assert [one["rows"] for one in dataset.record.body["decontaminated"]] == [3]
    (contaminated / "benchmark.csv").unlink()
    store = Store(contaminated / "store")
    assert verify_dataset(store, dataset.digest).ok
    clean = build(contaminated)
    body = dict(clean.record.body) | {"settings": settings(**OUTSIDE).model_dump(mode="json")}
    body["decontaminated"] = dataset.record.body["decontaminated"]
    blobs = {**clean.record.blobs, "outside.jsonl": dataset.record.blobs["outside.jsonl"]}
    found = verify_dataset(store, store.put_record(Record(kind="dataset", blobs=blobs, body=body)))
    assert not found.ok
    assert ("leakage.near_outside", "is 2, and must be 0") in [(one.path, one.reason) for one in found.problems]
    assert any("has the wording of a row" in problem.reason for problem in found.problems)
    blobs = {name: digest for name, digest in dataset.record.blobs.items() if name != "outside.jsonl"}
    bare = store.put_record(Record(kind="dataset", blobs=blobs, body=dataset.record.body))
    assert not verify_dataset(store, bare).ok, "without its outside set"


def test_rows_of_an_outside_set_need_a_request_and_no_answer(tmp_path: Path) -> None:
    talk = {"messages": turns("what plays in the kitchen now", "a song by abba", "turn that one off there", "done")}
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(120), row("stop the music please", "a"), talk])
    longer = turns("what plays in the kitchen now", "a song by abba", "turn that one off there")
    chosen = settings(decontaminate=[{"path": "asked.jsonl"}])
    for asked in (
        turns("Stop the music, please!", system="You are a house."),
        [*turns("stop the music please"), {"role": "assistant", "content": "", "weight": 0}],
    ):
        write_jsonl(tmp_path / "asked.jsonl", [{"messages": asked}, {"messages": longer}])
        removed = build(tmp_path, chosen).record.body["rows"]["removed"]
        assert sum(removed.values()) == 2
        assert all(reason.endswith("of an outside test set") for reason in removed)
    for messages in ([], turns(system="You are a house."), [{"role": "assistant", "content": "a"}]):
        write_jsonl(tmp_path / "asked.jsonl", [row("stop the music", "a"), {"messages": messages}])
        with pytest.raises(UsageError, match="no user turn") as caught:
            build(tmp_path, chosen)
        assert caught.value.where == "asked.jsonl, row 2"

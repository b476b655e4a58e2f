"""Failed requests become test rows: kept only when asked, written with where they come from, held out, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call, printed
from tests.data.rows import NO_SCAN, build_with
from tests.tiny_project import settings
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message, ToolCall, with_tools
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.settings import DataSettings, Split
from tunesmith.monitoring.cases import (
    Case,
    add_cases,
    correct_case,
    count_cases,
    delete_expired,
    drop_cases,
    list_cases,
    put_case,
)
from tunesmith.store import audit
from tunesmith.store.people.identities import acting, add_user
from tunesmith.store.store import Store

DATA: dict[str, Any] = {
    "duplicates": {"near": None},
    "split": {"test": 0.2, "group_by": "template"},
    "privacy": NO_SCAN,
}


def case(number: int, score: float = 0.0, **more: Any) -> Case:
    return Case(
        request=f"{number:032x}",
        messages=(Message(role="user", content=f"what about the odd thing {number}"),),
        expected=json.dumps({"odd": number}),
        answer="{}",
        version="sha256:" + "1" * 64,
        scores={"exact_match": score},
        by="ada",
        tenant="",
        region="",
        **{"at": f"2026-01-0{number}T00:00:00+00:00", "until": "2999-01-01T00:00:00Z", **more},
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    assert made.engine  # a store begins with its database
    return made


def _added(store: Store, target: Path, *, actor: str | None = None) -> int:
    split = Split(group_by="template")
    return add_cases(store, list_cases(store), target, licence="CC0-1.0", split=split, actor=actor or acting(store))


def test_failed_cases_wait_until_they_are_added(store: Store, tmp_path: Path) -> None:
    for number, score in ((2, 0.0), (1, 0.5), (3, 1.0)):
        put_case(store, case(number, score))
    assert [one.request for one in list_cases(store)] == [case(1).request, case(2).request]
    assert len(list_cases(store, everything=True)) == 3
    target = tmp_path / "cases.jsonl"
    target.write_text('{"messages": [], "template": "x"}')
    assert _added(store, target) == 2
    assert list_cases(store) == []
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == 3
    assert rows[1]["messages"][-1] == {"role": "assistant", "content": '{"odd": 1}'}
    assert rows[1]["licence"] == "CC0-1.0"
    assert rows[1]["case"] == {
        "request": case(1).request,
        "version": case(1).version,
        "scores": {"exact_match": 0.5},
        "by": "ada",
        "at": "2026-01-01T00:00:00+00:00",
    }
    with store.reading() as session:
        entry = list(audit.entries(session))[-1]
    assert (entry.action, entry.subject) == ("cases.add", "cases.jsonl")
    assert entry.detail["requests"] == [case(1).request, case(2).request]


def test_a_case_that_is_being_written_is_not_listed(store: Store) -> None:
    put_case(store, case(1))
    (store.root / "cases" / f"{SCRATCH}half").write_text('{"request": "')
    assert [one.request for one in list_cases(store)] == [case(1).request]
    assert count_cases(store) == 1
    assert delete_expired(store) == 0


def test_a_case_is_in_the_file_once_and_without_an_answer_waits_for_one(store: Store, tmp_path: Path) -> None:
    put_case(store, case(1).model_copy(update={"expected": None, "answer": None, "scores": {}}))
    put_case(store, case(2))
    assert [one.failed for one in list_cases(store)] == [True, True]
    assert _added(store, tmp_path / "c.jsonl") == 1
    put_case(store, case(2))  # as after a kill between the file and the folder
    assert _added(store, tmp_path / "c.jsonl") == 0
    (left,) = list_cases(store)
    correct_case(store, left.request, '{"odd": 1}', actor=acting(store))
    assert _added(store, tmp_path / "c.jsonl") == 1
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UsageError, match="no case of request"):
        correct_case(store, left.request, "x", actor=acting(store))


def test_what_has_expired_is_neither_shown_nor_added(store: Store, tmp_path: Path) -> None:
    put_case(store, case(1, until="2026-01-02T00:00:00Z"))
    put_case(store, case(2))
    assert [one.request for one in list_cases(store, everything=True)] == [case(2).request]
    assert _added(store, tmp_path / "c.jsonl") == 1
    assert delete_expired(store) == 1
    assert delete_expired(store) == 0
    assert not list((store.root / "cases").iterdir())
    with store.reading() as session:
        entry = list(audit.entries(session))[-1]
    assert (entry.actor, entry.action, entry.detail) == ("controller", "cases.expire", {"requests": [case(1).request]})


def test_nothing_is_added_by_others_to_other_files_or_of_damaged_cases(store: Store, tmp_path: Path) -> None:
    add_user(store, "eve", ("approver",), actor=acting(store))
    put_case(store, case(1))
    with pytest.raises(Refused):
        _added(store, tmp_path / "c.jsonl", actor="eve")
    assert not (tmp_path / "c.jsonl").exists()
    with pytest.raises(UsageError, match="JSONL"):
        _added(store, tmp_path / "c.csv")
    (tmp_path / "c.jsonl").write_text("not json\n")
    with pytest.raises(UsageError, match="line 1"):
        _added(store, tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_text() == "not json\n"
    assert len(list_cases(store)) == 1
    (path,) = (store.root / "cases").glob("*.json")
    path.write_text("{}")
    with pytest.raises(Refused, match="not a valid case"):
        list_cases(store)
    assert delete_expired(store) == 0, "nobody can tell its time"
    drop_cases(store, [case(1).request], actor=acting(store))
    assert list_cases(store) == []


def _rows(path: Path, count: int) -> None:
    rows = [
        {"prompt": f"{word} number {n}", "completion": f'{{"n": {n}}}', "template": f"{word}{n}"}
        for n in range(count)
        for word in ("switch", "measure", "describe")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cases_are_held_out_with_their_tools_and_the_dataset_verifies(store: Store, tmp_path: Path) -> None:
    _rows(tmp_path / "rows.jsonl", 30)
    source = {"path": "rows.jsonl", "licence": "CC0-1.0"}
    plain = {"sources": [source], **DATA}
    before = build_with(store, DataSettings.model_validate(plain), tmp_path)
    assert "held_groups" not in before.record.body
    assert before.record.body["settings"]["sources"][0]["split"] is None
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    calls = tuple(ToolCall(id=f"call{n}", name="find", arguments=f'{{"day": {n}}}') for n in (1, 2))
    turns = (
        Message(role="user", content="what is on"),
        Message(role="assistant", content="", tool_calls=calls),
        Message(role="tool", content="a concert", tool_call_id="call2"),
        Message(role="tool", content="nothing", tool_call_id="call1"),
    )
    put_case(store, case(1).model_copy(update={"messages": with_tools(turns, [tool])}))
    for number in range(2, 8):
        put_case(store, case(number))
    _added(store, tmp_path / "cases.jsonl")
    both = {**plain, "sources": [source, {"path": "cases.jsonl", "split": "test"}]}
    dataset = build_with(store, DataSettings.model_validate(both), tmp_path)
    held = [row for row in dataset.examples("test") if row.source == "cases.jsonl"]
    assert len(held) == 7
    assert [row.answer for row in held if row.request == with_tools(turns, [tool])] == [case(1).expected]
    assert dataset.record.body["ignored_keys"] == {"case": 7}, "no tool is ignored"
    earlier = {row.id for row in before.examples("train")}
    assert {row.id for row in dataset.examples("train")} == earlier, "no earlier row moved"
    assert verify_dataset(store, dataset.digest).ok, verify_dataset(store, dataset.digest).problems


def test_the_verbs(tmp_path: Path) -> None:

    (tmp_path / "tunesmith.yaml").write_text(yaml.safe_dump(settings()))
    store = Store(tmp_path / ".tunesmith")
    assert store.engine
    for number in (1, 2, 3):
        put_case(store, case(number).model_copy(update={"answer": "x\x1b[2J\u202e"}))
    put_case(store, case(4).model_copy(update={"expected": None}))
    put_case(store, case(5, until="2026-01-02T00:00:00Z"))
    assert len(call(tmp_path, "cases", "show")["cases"]) == 4
    assert len(list((store.root / "cases").iterdir())) == 4, "the expired one is deleted"
    shown = printed(tmp_path, "cases", "show")
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert call(tmp_path, "cases", "drop", case(3).request) == {"dropped": 1}
    with pytest.raises(UsageError, match="no case of request"):
        call(tmp_path, "cases", "drop", "../../x")
    with pytest.raises(Refused, match="non-commercial"):
        call(tmp_path, "cases", "add", "cases.jsonl", "--licence", "CC-BY-NC-4.0")
    with pytest.raises(UsageError, match="outside the project"):
        call(tmp_path, "cases", "add", "../cases.jsonl", "--licence", "CC0-1.0")
    added = call(tmp_path, "cases", "add", "cases.jsonl", "--licence", "CC0-1.0")
    assert added == {"added": 2, "source": "cases.jsonl", "named": False, "without_answer": 1}
    with pytest.raises(UsageError, match="is empty"):
        call(tmp_path, "cases", "correct", case(4).request, "--expected", " ")
    assert call(tmp_path, "cases", "correct", case(4).request, "--expected", "{}")["expected"] == "{}"
    assert json.loads((tmp_path / "cases.jsonl").read_text().splitlines()[0])["template"] == f"case-{case(1).request}"

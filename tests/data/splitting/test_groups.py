"""Rows are in one split by any of several things, by time, and in like shares of each kind; the record proves it."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.rows import build, held, many_rows, row, settings, write_jsonl
from tests.data.trigrams import jaccard, shingles
from tunesmith.core.errors import UsageError
from tunesmith.data.building.account import EXACT
from tunesmith.data.building.verify import verify_dataset
from tunesmith.data.dataset import SPLITS, Dataset
from tunesmith.data.settings import Split
from tunesmith.data.splitting.assignment import OLDER, cuts, split_by_time, time_of
from tunesmith.data.splitting.duplicates import near_text
from tunesmith.data.splitting.groups import joined_groups, wording_group
from tunesmith.data.splitting.leakage import ComparedRow, Leakage, Nearness, leakage
from tunesmith.store.store import Store

words = st.lists(st.sampled_from(["turn", "on", "off", "the", "light", "fan", "hall"]), min_size=1, max_size=5)
members = st.lists(st.tuples(words.map(" ".join), st.sampled_from("abcde"), st.sampled_from("vwxyz")), max_size=14)


@given(members, st.sampled_from([("a", "b"), ("a", "near"), ("near",), ("a", "b", "near")]))
@examples(max_examples=40)
def test_groups_are_components(found: list[tuple[str, str, str]], groups: tuple[str, ...]) -> None:
    rows = [ComparedRow(str(n), "", text, "", {"a": a, "b": b}) for n, (text, a, b) in enumerate(found)]
    told = dict(joined_groups(rows, Split(group_by=groups), 0.6))

    def share(one: ComparedRow, other: ComparedRow) -> bool:
        near = jaccard(shingles(near_text(one.wording)), shingles(near_text(other.wording))) >= 0.6
        return any(near if name == "near" else one.labels[name] == other.labels[name] for name in groups)

    component = {one.id: {one.id} for one in rows}
    for one in rows:
        for other in rows:
            if share(one, other) and component[one.id] is not component[other.id]:
                both = component[one.id] | component[other.id]
                component.update(dict.fromkeys(both, both))
    for one in rows:
        assert {name for name, group in told.items() if group == told[one.id]} == component[one.id]
    assert told == dict(joined_groups(rows[::-1], Split(group_by=groups), 0.6))


def test_leakage_counts_what_is_shared_by_any_of_them() -> None:
    said = [("train", "ann", "x"), ("validation", "bob", "y"), ("test", "ann", "z")]
    splits = {
        split: [ComparedRow(talk, talk, f"{talk} alone", "", {"author": author, "talk": talk})]
        for split, author, talk in said
    }
    found = leakage(splits, Nearness(splits, 0.8), Split(group_by=("author", "talk")))
    shared = {"author": 1, "talk": 0}
    assert found == Leakage(shared_groups=0, near_pairs=0, near_outside=0, threshold=0.8, shared=shared)
    assert found.faults() == {"shared.author": 1}


@pytest.mark.parametrize("talk", [None, "", True, ["a"], {"a": 1}])
def test_a_row_that_does_not_say_what_it_belongs_to(tmp_path: Path, talk: Any) -> None:
    odd = row("hello there", "hi", author="ann", talk=talk, at=talk or "soon")
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(9, author="a", talk="t", at="2024-01-01"), odd])
    for split in ({"group_by": ["author", "talk"]}, {"group_by": "talk"}, {"time": "at"}):
        with pytest.raises(UsageError) as caught:
            build(tmp_path, settings(split=split))
        assert str(caught.value.where).startswith("rows.jsonl, row 10")
    with pytest.raises(UsageError, match="'near'"):
        build(tmp_path, settings(split={"group_by": ["author", "near"]}), rows=many_rows(9, near="a", author="b"))


def test_names_alone_make_no_other_template(tmp_path: Path) -> None:
    """From what the settings declare, and from what the scan found, for every action."""
    assert wording_group("call ann lee at home", "ok", ["Ann Lee"]) == wording_group("call bob at home", "ok", ["Bob"])
    assert wording_group("call annette at home", "ok", ["ann"]) == wording_group("call annette at home", "ok")
    names = ("anna", "boris", "chidi", "dora", "emil", "fatima")
    calls = [row(f"call {name} and say that i will be there at six", f"call:{name}") for name in names]
    mails = [row(f"write to {name}@corp.net that it rains in the town", f"mail:{n}") for n, name in enumerate(names)]
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), *calls, *mails])

    def groups(said: str, **more: Any) -> int:
        dataset = build(tmp_path, settings(duplicates={"near": None}, **more))
        return len({one.group for one in held(dataset) if one.wording.startswith(said)})

    for action in ("report", "pseudonymise"):
        privacy = {"entities": ["EMAIL_ADDRESS"], "synthetic_values": 0, "action": action}
        assert groups("call", split={"values": names}) == groups("write", privacy=privacy) == 1
    assert groups("call") == 6
    write_jsonl(tmp_path / "bench.jsonl", [row("tell konstantinos that dinner is ready", "ok")])
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), row("tell anna that dinner is ready", "ok")])
    more = {"decontaminate": [{"path": "bench.jsonl"}], "split": {"values": ["anna", "konstantinos"]}}
    dataset = build(tmp_path, settings(**more))
    assert dataset.record.body["rows"]["removed"] == {"same wording as a row of an outside test set": 1}
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok


def dated(count: int) -> list[dict[str, Any]]:
    rows = many_rows(count)
    return [{**one, "at": f"2024-{1 + n // 28:02d}-{1 + n % 28:02d}"} for n, one in enumerate(rows)]


def test_split_by_time_with_equal_times_and_groups(tmp_path: Path) -> None:
    rows = [{**one, "who": f"p{n}"} for n, one in enumerate(dated(60))]
    for one in rows[-9:]:
        one["at"] = "2030-01-01"  # nine rows of one time, six wanted
    for at in ("2024-01-01", "2031-01-01"):
        rows.append(row(f"a train of {at} to the city of york", at, at=at, who="eve"))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build(tmp_path, settings(split={"time": "at", "group_by": "who", "test": 0.1, "validation": 0}))
    body = dataset.record.body
    assert body["splits"] == {"train": 51, "validation": 0, "test": 10}
    assert body["time"]["spans"]["train"][1] < body["time"]["spans"]["test"][0]
    assert body["leakage"]["not_older"] == 0
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok
    assert body["rows"]["removed"] == {OLDER: 1}
    assert body["time"]["rows_beyond_shares"] == 3
    assert body["leakage"]["shared_groups"] == body["leakage"]["near_pairs"] == 0


def test_times_of_every_kind_are_one_time() -> None:
    same = ["2024-05-01T12:00:00Z", "2024-05-01T14:00:00+02:00", 1714564800, "1714564800", 1714564800000, 1714564800.0]
    assert {time_of(value, "") for value in same} == {"2024-05-01T12:00:00.000000Z"}
    assert time_of("2024-05-01", "") < time_of("2024-05-01T00:00:01", "") < time_of(1714564800, "")
    days = ["2024-05-01", "20240501", 20240501, 20240501.0, date(2024, 5, 1), datetime(2024, 5, 1)]
    assert {time_of(value, "") for value in days} == {"2024-05-01T00:00:00.000000Z"}
    assert time_of(86_400_000 * 10, "") == "1997-05-19T00:00:00.000000Z"


@given(st.dictionaries(st.integers(0, 50).map(str), st.integers(1, 9), min_size=1), st.floats(0.05, 0.5))
def test_a_cut_takes_its_share_and_no_more_than_one_time_beyond(times: dict[str, int], test: float) -> None:
    split = Split(test=test, validation=0.1)
    found, _ = cuts(times, split)
    many: Counter[str] = Counter()
    for time, rows in times.items():
        many[split_by_time(time, found)] += rows
    total = sum(times.values())
    assert many["test"] >= test * total
    assert many["test"] - times[found["test"]] < test * total


@pytest.mark.parametrize("key", ["kind", "intent", "answer"])
def test_a_split_holds_its_share_of_every_kind(tmp_path: Path, key: str) -> None:
    rows = []
    for n, one in enumerate(many_rows(400)):
        kind = "rare" if n % 20 == 0 else "often"
        said = json.dumps({"intent": kind}) if key == "intent" else kind
        rows.append({**row(one["messages"][0]["content"], said), **({"kind": kind} if key == "kind" else {})})
    dataset = build(tmp_path, settings(split={"stratify": key, "test": 0.1, "validation": 0.1}), rows=rows)
    kinds = dataset.record.body["strata"]["rows"]
    assert [kinds["rare"][name] for name in SPLITS] == [16, 2, 2]
    assert [kinds["often"][name] for name in SPLITS] == [304, 38, 38]
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok


def test_what_is_no_kind_and_what_is_not_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="60 values in 60 rows"):
        build(tmp_path, settings(split={"stratify": "answer"}), rows=many_rows(60))
    with pytest.raises(UsageError, match="has no channel"):
        build(tmp_path, settings(split={"stratify": "channel"}))


def _published(root: Path, split: dict[str, Any], train: list[dict[str, Any]], held: list[dict[str, Any]]) -> Dataset:
    write_jsonl(root / "train.jsonl", train)
    write_jsonl(root / "held.jsonl", held)
    sources = [{"path": f"{name}.jsonl", "licence": "MIT"} for name in ("train", "held")]
    sources[1]["split"] = "test"
    return build(root, settings(sources=sources, split=split, duplicates={"near": None}))


@pytest.mark.parametrize("group_by", ["author", ["author", "wording"]])
def test_a_held_out_row_is_kept_rather_than_its_copies(tmp_path: Path, group_by: Any) -> None:
    """A copy of a published test row in training is dropped, not the test row: ids decide nothing here."""
    rows = many_rows(60)
    train = [{**one, "author": f"t{n % 7}"} for n, one in enumerate(rows)]
    held = [{**one, "author": f"h{n}"} for n, one in enumerate(rows[:20])]
    dataset = _published(tmp_path, {"group_by": group_by, "test": 0, "validation": 0}, train, held)
    assert dataset.record.body["splits"] == {"train": 40, "validation": 0, "test": 20}
    if isinstance(group_by, list):
        assert dataset.record.body["leakage"]["shared"] == {"author": 0, "wording": 0}
    assert {one.source for one in dataset.examples("test")} == {"held.jsonl"}
    assert {(one["source"], one["reason"]) for one in dataset.removed()} == {("train.jsonl", EXACT)}
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok


@pytest.mark.parametrize("more", [{}, {"stratify": "kind", "group_by": "author"}])
def test_a_published_test_set_may_be_all_that_is_held_out(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [{**one, "author": f"a{n}", "kind": "xy"[n % 2]} for n, one in enumerate(many_rows(80))]
    dataset = _published(tmp_path, {"test": 0, "validation": 0.1, **more}, rows[:60], rows[60:])
    assert {one.source for one in dataset.examples("test")} == {"held.jsonl"}
    assert dataset.record.body["splits"]["test"] == 20
    with pytest.raises(ValueError, match="nothing would be held out"):
        settings(split={"test": 0})

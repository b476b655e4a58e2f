"""Rows are flagged and reviewed by one or two people, and the next build does what they decided."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.acting import do, looking
from tests.commands import call, printed
from tests.data.rows import NO_SCAN, build_with, many_rows, row, settings, turns, write_jsonl
from tests.data.rows import build as build_rows
from tests.monitoring.test_cases import case
from tunesmith.core.errors import Forbidden, Refused, TunesmithError, UsageError
from tunesmith.core.progress import Silent
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.building.staging import EDITED
from tunesmith.data.dataset import SPLITS, Dataset, Example, dataset_summary
from tunesmith.data.formats.turns import UNDECLARED
from tunesmith.data.governance.difference import difference
from tunesmith.data.governance.withdrawn import Withdrawn, content_key, load_withdrawn
from tunesmith.data.quality.flags import examine_quality
from tunesmith.data.review import queue
from tunesmith.data.review.agreement import agreements, cohen_kappa
from tunesmith.data.review.decisions import ReviewedRow, encode_reviewed, read_reviewed
from tunesmith.monitoring.cases import delete_expired, find_case, put_case
from tunesmith.monitoring.recall import Cause, recall, recall_status
from tunesmith.project import Project
from tunesmith.services import review
from tunesmith.store import audit, database
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.store import Store
from tunesmith.store.tables import ReviewDecisionRow

REFUSAL = "I'm sorry, I cannot help with {}."


@dataclass
class Desk:
    """A project with six rows that quality flags, its store, and its reviewers."""

    project: Project
    store: Store
    first: Dataset

    def build(self, **more: Any) -> Dataset:
        """The next version, with the decisions."""
        chosen = settings(review="review.jsonl")
        return build_with(self.store, chosen, self.project.root, **more)


def rows(dataset: Dataset) -> dict[str, Example]:
    return {one.id: one for split in SPLITS for one in dataset.examples(split)}


def project_in(root: Path, *, metric: str = "exact_match", at_least: float = 0.0, **data: Any) -> Project:
    source = {"path": "rows.jsonl", "licence": "MIT"}
    chosen = {
        "name": "desk",
        "base": "model",
        "data": {"sources": [source], "privacy": NO_SCAN, "review": "review.jsonl", **data},
        "task": {"scorers": [metric]},
        "candidates": {"plain": {"prompt": "prompt.txt"}},
        "gates": {"valid": {"metric": metric, "at_least": at_least}},
    }
    (root / "prompt.txt").write_text("Answer.\n")
    (root / "tunesmith.yaml").write_text(yaml.safe_dump(chosen))
    return Project.load(root)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return made_desk(tmp_path, Store(tmp_path / "store"), monkeypatch)


def made_desk(root: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("TUNESMITH_USER", "ann")
    flagged = [row(f"{word} question about {word}", REFUSAL.format(word)) for word in "abcdef"]
    write_jsonl(root / "rows.jsonl", [*many_rows(60), *flagged])
    project = project_in(root)
    project.store = store
    ensure_owner(store)
    for name, roles in (("eve", ["engineer"]), ("stu", ["steward"]), ("bob", ["approver"])):
        add_user(store, name, roles, actor="ann")
    first = build_with(store, settings(), root)
    examine_quality(store, first)
    return Desk(project, store, first)


def numbers(desk: Desk) -> list[int]:
    return [one.item for one in review.list_items(looking(desk.store), state="all").items]


def edited(desk: Desk, number: int, answer: str) -> list[str]:
    return [*(turn.content for turn in review.show(looking(desk.store), number).messages[:-1]), answer]


def decide(store: Store, item: int, decision: Any, **more: Any) -> review.DecidedItem:
    """Decide on an item as it is now."""
    seen = review.show(looking(store, more.get("actor")), item)
    return do(store, review.decide, item=item, decision=decision, revision=seen.revision, **more)


def test_the_next_build_does_what_was_decided(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Silent, "say", lambda _self, text: said.append(text))
    assert do(desk.store, review.fill).added == 6
    again = do(desk.store, review.fill)
    assert (again.added, again.waiting, again.found) == (0, 6, {"refusing answer": 6})
    assert do(desk.project, review.export).named
    assert (desk.project.root / "review.jsonl").read_bytes() == b""
    assert desk.build().digest == desk.first.digest, "without decisions it is no other version"
    assert "review.jsonl: no review decision yet" in said
    accepted, changed, rejected, *_ = numbers(desk)
    decide(desk.store, accepted, "accept")
    decide(desk.store, changed, "edit", contents=edited(desk, changed, "a real answer"))
    decide(desk.store, rejected, "reject", reason="refuses")
    items = {number: review.show(looking(desk.store), number) for number in (accepted, changed, rejected)}
    done = do(desk.project, review.export)
    assert (done.accept, done.edit, done.reject) == (1, 1, 1)
    second = desk.build()
    assert said[-1].endswith("Removed: 1 rejected in a review: refusing answer")
    assert verify_dataset(desk.store, second.digest).ok
    found = difference(desk.store, desk.first.digest, second.digest)
    assert found.rows["added"] == 0
    assert found.removed == (items[rejected].subject,)
    (one,) = found.changed
    assert (one.before, rows(second)[one.after].answer) == (items[changed].subject, "a real answer")
    assert rows(second)[one.after].licence == "MIT"
    assert found.removed_reasons == {"rejected in a review: refusing answer": (0, 1)}
    told = dataset_summary(desk.store, second.digest).document()["review"]
    assert (told["accept"], told["edit"], told["reject"]) == (1, 1, 1)
    with database.reading(desk.store.engine) as session:
        entries = [one for one in audit.entries(session) if one.action == "review.decide"]
    assert [one.detail["decision"] for one in entries] == ["accept", "edit", "reject"]
    assert "a real answer" not in str([one.detail for one in entries])
    left = desk.build(withdrawn=Withdrawn({"row": frozenset([items[changed].subject])}))
    assert all(one.answer != "a real answer" for one in rows(left).values()), "withdrawn with the row that it was"
    write_jsonl(desk.project.root / "rows.jsonl", many_rows(60))
    warnings = dataset_summary(desk.store, desk.build().digest).warnings
    assert warnings == ("review.jsonl: 3 decisions fit no row of the sources",)


@pytest.mark.parametrize("named", ["before", "after"])
def test_a_recall_follows_an_edit_both_ways_and_empties_the_queue(desk: Desk, named: str) -> None:
    do(desk.store, review.fill)
    number, other = numbers(desk)[:2]
    subject = review.show(looking(desk.store), number).subject
    decide(desk.store, number, "edit", contents=edited(desk, number, "a real answer"))
    decide(desk.store, other, "accept")
    do(desk.project, review.export)
    second = desk.build()
    assert verify_dataset(desk.store, second.digest).ok
    (after,) = [one.id for one in rows(second).values() if one.answer == "a real answer"]
    cause = Cause(kind="row", value=subject if named == "before" else after)
    found = recall(desk.store, cause, reason="asked to", actor="ann")
    assert {one.digest for one in found.reached if one.kind == "dataset"} == {desk.first.digest, second.digest}
    with pytest.raises(UsageError, match="no review item"):
        review.show(looking(desk.store), number)
    with database.reading(desk.store.engine) as session:
        assert session.query(ReviewDecisionRow).count() == 1, "of the other row"
    assert do(desk.project, review.export).edit == 0
    assert "a real answer" not in (desk.project.root / "review.jsonl").read_text()
    do(desk.store, review.fill, dataset=desk.first.digest)
    assert subject not in [one.subject for one in review.list_items(looking(desk.store), state="all").items]
    assert recall_status(desk.store, cause).gone
    queue.add_items(desk.store, [queue.NewItem("row", after, {})], wanted=1, actor="ann")
    assert recall_status(desk.store, cause).left == ("the review queue holds its text (items: 1): recall it again",)
    third = desk.build(withdrawn=load_withdrawn(desk.store))
    assert not {subject, after} & rows(third).keys()
    assert len(rows(third)) == len(rows(second)) - 1


def test_an_edited_system_turn_stays_where_the_answer_is_spelled_otherwise(tmp_path: Path) -> None:
    asked = {"messages": turns("what is her name", '{"name": "Ren\\u00e9e"}', system="Be brief.")}
    write_jsonl(tmp_path / "rows.jsonl", [*many_rows(60), asked])
    (before,) = [one for one in rows(build_rows(tmp_path)).values() if one.messages[0].role == "system"]
    kind = (before.messages[0].model_copy(update={"content": "Be kind."}), *before.messages[1:])
    edit = ReviewedRow(row=before.id, content=content_key(before), decision="edit", messages=kind, by=("ann",))
    (tmp_path / "review.jsonl").write_bytes(encode_reviewed([edit]))
    after = build_rows(tmp_path, settings(review="review.jsonl"), respell=True)
    (found,) = [one for one in rows(after).values() if one.messages[0].role == "system"]
    assert (found.answer, found.messages[0].content) == ('{"name": "Renée"}', "Be kind.")


def test_copies_follow_an_edit_and_edited_rows_are_scanned(tmp_path: Path, desk: Desk) -> None:
    do(desk.store, review.fill)
    changed, rejected = numbers(desk)[:2]
    texts = {n: [turn.content for turn in review.show(looking(desk.store), n).messages] for n in numbers(desk)}
    copies = [{"messages": turns(*texts[number], system="Be brief.")} for number in (changed, rejected)]
    copies.append(row(texts[rejected][0].upper(), texts[rejected][-1]))
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in copies)
    decide(desk.store, changed, "edit", contents=edited(desk, changed, "write to ann@company-mail.org"))
    decide(desk.store, rejected, "reject", reason="refuses")
    do(desk.project, review.export)
    chosen = settings(review="review.jsonl", duplicates={"near": None}, privacy={"entities": ["EMAIL_ADDRESS"]})
    dataset = build_with(desk.store, chosen, tmp_path)
    answers = [(len(one.messages), one.answer) for one in rows(dataset).values()]
    scanned = "write to person1@example.com"
    assert sorted(said for said in answers if said[1] == scanned) == [(2, scanned), (3, scanned)]
    assert not [said for said in answers if said[1] in (texts[changed][-1], texts[rejected][-1])]
    assert dataset.record.body["privacy"] == {"EMAIL_ADDRESS": 2}
    do(desk.store, review.fill, pseudonyms=True)
    assert list(review.marked(f"{scanned} now"))[1] == ("person1@example.com", True)


def test_an_edited_row_calls_declared_functions_only(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    asked = [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    called = {"messages": asked, "tools": [{"type": "function", "function": {"name": "find"}}]}
    before = build_rows(tmp_path, settings(), rows=[*many_rows(40), called])
    (found,) = [one for one in rows(before).values() if one.call]
    said = [turn.model_dump(mode="json") for turn in found.messages]
    said[-1]["tool_calls"][0]["name"] = "delete"
    decision = {"row": found.id, "content": content_key(found), "decision": "edit", "messages": said}
    write_jsonl(tmp_path / "review.jsonl", [decision])
    after = build_rows(tmp_path, settings(review="review.jsonl"))
    assert after.record.body["rows"]["removed"] == {f"{UNDECLARED} {EDITED}": 1}


def test_a_file_of_decisions(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    content = "sha256:" + "0" * 64
    both = [{"row": row, "content": content, "decision": what} for row, what in (("a", "reject"), ("b", "accept"))]
    write_jsonl(tmp_path / "review.jsonl", both)
    reviewed = read_reviewed("review.jsonl", tmp_path, store)
    assert [one.row for one in reviewed.contents.values()] == ["a"], "a rejection wins"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    edit = json.dumps({"row": "x", "content": content, "decision": "edit"})
    for place, line in enumerate(("", "{", '{"row": "x"}', edit, "[1]")):
        (tmp_path / f"{place}.jsonl").write_text(line + "\n")
    for name in ("0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl", "folder", "link"):
        with pytest.raises(UsageError, match="line 1" if name[0].isdigit() else "cannot be read"):
            read_reviewed(name, tmp_path, store)


def test_what_is_refused_and_two_reviewers_who_disagree(desk: Desk) -> None:
    do(desk.store, review.fill, reviewers=2)
    first, second, third, *_ = numbers(desk)
    with pytest.raises(Refused, match="may not"):
        review.list_items(looking(desk.store, "bob"))
    with pytest.raises(Forbidden, match="may not"):
        do(desk.store, review.fill, actor="bob")
    with pytest.raises(UsageError, match="reason"):
        decide(desk.store, first, "reject")
    same = [turn.content for turn in review.show(looking(desk.store), first).messages]
    for contents, said in ((same, "changes nothing"), ([same[0], " "], "empty"), (["x"], "all 2 turns")):
        with pytest.raises(UsageError, match=said):
            decide(desk.store, first, "edit", contents=contents)
    with pytest.raises(UsageError, match="no review item"):
        review.show(looking(desk.store), 999)
    decide(desk.store, first, "accept", actor="ann")
    shown = review.show(looking(desk.store, "eve"), first)
    assert (shown.decisions, shown.may, shown.state) == ((), True, "open"), "the other's decision is not shown yet"
    with pytest.raises(Refused, match="already"):
        decide(desk.store, first, "accept", actor="ann")
    assert decide(desk.store, first, "accept", actor="eve").state == "accept"
    decide(desk.store, second, "accept", actor="ann")
    assert decide(desk.store, second, "reject", reason="no", actor="eve").state == "conflict"
    assert review.next_item(looking(desk.store, "ann")) != second
    assert review.show(looking(desk.store, "stu"), second).may
    assert decide(desk.store, second, "reject", reason="no", actor="stu").state == "reject"
    decide(desk.store, third, "edit", contents=edited(desk, third, "one way"), actor="stu")
    text = edited(desk, third, "another way")
    assert decide(desk.store, third, "edit", contents=text, actor="eve").state == "conflict"
    assert decide(desk.store, third, "edit", contents=text, actor="stu").state == "edit", "a steward settles it"
    found = {x.reviewers: (x.items, x.same, x.kappa) for x in review.list_items(looking(desk.store)).agreements}
    assert found == {("ann", "eve"): (2, 1, None), ("eve", "stu"): (1, 1, None)}


def test_kappa() -> None:
    both = [("accept", "accept")] * 20 + [("accept", "reject")] * 5 + [("reject", "accept")] * 10
    both += [("reject", "reject")] * 15
    (found,) = agreements({item: {"ann": one, "eve": other} for item, (one, other) in enumerate(both)})
    assert found.kappa == pytest.approx(0.4)  # the example of Cohen's kappa in its Wikipedia article
    assert found.low == pytest.approx(0.14, abs=0.04)
    assert found.high == pytest.approx(0.66, abs=0.04)
    assert cohen_kappa([("accept", "accept")] * 12) is None


def test_two_people_at_once_lose_nothing(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", url=any_database)
    do(made_desk(tmp_path, store, monkeypatch).store, review.fill)
    (number, *_) = [one.item for one in review.list_items(looking(store), state="all").items]
    both = threading.Barrier(2)

    def decide(name: str, choice: Any) -> str:
        both.wait(300)
        try:
            do(store, review.decide, item=number, decision=choice, reason="so", revision=0, actor=name)
        except TunesmithError as error:
            return error.what
        return str(choice)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(decide, ("eve", "stu"), ("accept", "reject")))
    shown = review.show(looking(store), number)
    assert [one.decision for one in shown.decisions] == [shown.state]
    assert shown.state in said
    assert any("decided" in one for one in said)
    store.engine.dispose()


def test_kept_requests(desk: Desk) -> None:
    put_case(desk.store, case(1))
    do(desk.store, review.fill)
    (number,) = [one.item for one in review.list_items(looking(desk.store)).items if one.kind == "case"]
    decide(desk.store, number, "edit", contents=edited(desk, number, "what a reviewer wrote"))
    put_case(desk.store, case(1, until="2020-01-01T00:00:00Z"))
    with pytest.raises(Refused, match="no longer kept"):
        review.show(looking(desk.store), number)
    delete_expired(desk.store)
    with pytest.raises(UsageError, match="no review item"):
        review.show(looking(desk.store), number)
    with database.reading(desk.store.engine) as session:
        assert session.query(ReviewDecisionRow).count() == 0, "what the reviewer wrote"
    for one in (case(1), case(2).model_copy(update={"expected": None}), case(3), case(4, until="2020-01-01T00:00:00Z")):
        put_case(desk.store, one)
    do(desk.store, review.fill)
    first, second, third = (one.item for one in review.list_items(looking(desk.store)).items if one.kind == "case")
    with pytest.raises(UsageError, match="nobody said"):
        decide(desk.store, second, "accept")
    texts = edited(desk, second, '{"odd": 2}')
    with pytest.raises(UsageError, match="only the answer"):
        decide(desk.store, second, "edit", contents=["another question", *texts[1:]])
    decide(desk.store, first, "accept")
    decide(desk.store, second, "edit", contents=texts)
    decide(desk.store, third, "reject", reason="sent on purpose")
    done = do(desk.project, review.export)
    assert (done.cases, done.dropped) == (2, 1)
    kept = find_case(desk.store, case(2).request)
    assert kept is not None
    assert kept.expected == '{"odd": 2}'
    assert find_case(desk.store, case(3).request) is None
    assert third not in numbers(desk)


def test_the_command_line(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / ".tunesmith").symlink_to(tmp_path / "store")
    assert call(tmp_path, "review", "fill")["added"] == 6
    number = str(call(tmp_path, "review", "list")["items"][0]["item"])
    assert call(tmp_path, "review", "decide", number, "edit", "--answer", "a real answer")["state"] == "edit"
    for command in (["list"], ["show", number], ["fill"], ["export"]):
        printed(tmp_path, "review", *command)
    assert json.loads((tmp_path / "review.jsonl").read_text())["messages"][-1]["content"] == "a real answer"

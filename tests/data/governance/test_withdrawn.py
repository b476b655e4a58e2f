"""A recall of a row or a person reaches every copy, and the next build leaves all of them out."""

import unicodedata
from pathlib import Path

import pytest

from tests.acting import do
from tests.attack_table import Happened
from tests.data.rows import build, held, many_rows, row, settings, turns, write_jsonl
from tunesmith.core.errors import UsageError
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.building.staging import WITHDRAWN
from tunesmith.data.dataset import Dataset, load_dataset
from tunesmith.data.governance.withdrawn import Withdrawn, content_key, load_withdrawn
from tunesmith.data.review import queue
from tunesmith.data.settings import DataSettings
from tunesmith.monitoring.recall import Cause, Recall, recall, recall_status
from tunesmith.services import monitoring
from tunesmith.store.people.identities import ensure_owner
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow

PLAIN = many_rows(100)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNESMITH_USER", "ann")
    store = Store(tmp_path / "store")
    ensure_owner(store)
    return store


def withdraw(store: Store, kind: str, value: str) -> Recall:
    cause = Cause.model_validate({"kind": kind, "value": value})
    return recall(store, cause, reason="asked to", actor="ann")


def gone(store: Store, kind: str, value: str) -> bool:
    return recall_status(store, Cause.model_validate({"kind": kind, "value": value})).gone


def chosen(*names: str) -> DataSettings:
    return settings(sources=[{"path": name, "licence": "MIT"} for name in names])


def test_a_recall_of_a_person(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "old.jsonl", PLAIN)
    write_jsonl(tmp_path / "new.jsonl", [{**one, "subject": f"p{n % 10}"} for n, one in enumerate(PLAIN)])
    both = chosen("old.jsonl", "new.jsonl")
    without = build(tmp_path, both, withdrawn=Withdrawn({"source": frozenset(["old.jsonl"])}))
    assert [one.source for one in held(without)] == ["new.jsonl"] * 100, "copies of other sources stay"
    at_once = build(tmp_path, both, withdrawn=Withdrawn({"subject": frozenset(["p3"])}))
    assert {one.answer for one in held(at_once)} == {f"answer {n}" for n in range(100) if n % 10 != 3}
    assert at_once.record.body["rows"]["removed"][WITHDRAWN] == 20
    assert verify_dataset(store, at_once.digest).ok
    texts = {one.wording for one in held(build(tmp_path, both)) if one.subject == "p3"}
    found = withdraw(store, "subject", "p3")
    assert sum(found.reached[0].rows.values()) == len(texts) == 10
    known = load_withdrawn(store)
    second = build(tmp_path, both, withdrawn=known)
    assert not texts & {one.wording for one in held(second)}
    assert second.record.body["rows"]["kept"] == 90
    assert gone(store, "subject", "p3")
    with monkeypatch.context() as blind:
        blind.setattr(Dataset, "examples", None)
        assert load_withdrawn(store) == known, "the contents of recalled rows are read once"
    (tmp_path / "store" / "withdrawn.json").write_text("[]")
    assert load_withdrawn(store) == known
    old = build(tmp_path, chosen("old.jsonl"))
    assert not gone(store, "subject", "p3"), "this version holds the text again"
    named = next(one.id for one in held(at_once) if one.source == "new.jsonl")
    assert old.digest in {one.digest for one in withdraw(store, "row", named).reached}, "under its other source's name"
    assert len(load_withdrawn(store).contents) == 11
    assert len(held(build(tmp_path, chosen("old.jsonl"), withdrawn=load_withdrawn(store)))) == 89


def test_a_recalled_licence_reaches_the_expressions_that_need_it(tmp_path: Path, store: Store) -> None:
    sources = []
    for place, licence in enumerate(("CC-BY-4.0", "MIT AND CC-BY-4.0", "MIT OR CC-BY-4.0", "MIT")):
        write_jsonl(tmp_path / f"{place}.jsonl", PLAIN[25 * place : 25 * (place + 1)])
        sources.append({"path": f"{place}.jsonl", "licence": licence})
    corrected = settings(source={"path": "0.jsonl", "licence": "MIT"})
    right = build(tmp_path, corrected).digest
    asked = {"actor": "ann", "kind": "licence", "value": "cc-by-4.0", "reason": "ended"}
    choice = build(tmp_path, settings(sources=sources[2:3])).digest
    with pytest.raises(UsageError, match=r"holds a row of licence CC-BY-4\.0, only of MIT OR CC-BY-4\.0"):
        do(store, monitoring.recall, **asked)
    apart = [build(tmp_path, settings(sources=[one])).digest for one in sources[:2]]
    whole = build(tmp_path, settings(sources=sources)).digest
    (twin, other, *_) = held(load_dataset(store, right))
    for one, of in ((twin, right), (other, whole)):
        queue.add_items(store, [queue.NewItem("row", one.id, {}, of)], wanted=1, actor="ann")
    found = do(store, monitoring.recall, **asked)
    assert [one.subject for one in queue.list_items(store, ["open"], 0, 9)] == [twin.id], "of the corrected version"
    assert len(held(build(tmp_path, corrected, withdrawn=load_withdrawn(store)))) == 25
    assert {one.digest: sum(one.rows.values()) for one in found.reached} == {**dict.fromkeys(apart, 25), whole: 50}
    assert found.other_licences == ("MIT OR CC-BY-4.0",)
    assert "not withdrawn, since they do not need it: MIT OR CC-BY-4.0" in found.next
    left = held(build(tmp_path, settings(sources=sources), withdrawn=load_withdrawn(store)))
    assert {one.licence for one in left} == {"MIT OR CC-BY-4.0", "MIT"}
    cause = Cause(kind="licence", value="CC-BY-4.0")
    status = recall_status(store, cause)
    assert (status.gone, status.other_licences) == (True, ("MIT OR CC-BY-4.0",))
    assert choice in {one.digest for one in withdraw(store, "licence", "MIT OR CC-BY-4.0").reached}
    left = held(build(tmp_path, settings(sources=sources), withdrawn=load_withdrawn(store)))
    assert {one.licence for one in left} == {"MIT"}
    assert recall_status(store, cause).other_licences == ()


def test_a_twin_under_another_system_turn_does_not_take_a_recalled_rows_place(tmp_path: Path, store: Store) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    said = [turns("my number is in the book", "noted", system=system) for system in (None, "Be kind.", "Be brief.")]
    twins = [{"messages": one} for one in said] + [{"messages": said[0], "tools": [tool]}]
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, *twins])
    loose = settings(duplicates={"near": None})
    same = [one for one in held(build(tmp_path, loose)) if one.answer == "noted"]
    assert len(same) == 4
    assert len(set(map(content_key, same))) == 1
    user, answer = (turn for turn in same[0].messages if turn.role != "system")
    asked, answered = (
        same[0].model_copy(update={"messages": (user, user.model_copy(update={"role": role}), answer)})
        for role in ("user", "assistant")
    )
    assert content_key(asked) != content_key(answered), "roles of turns make other contents"
    withdraw(store, "row", same[0].id)
    left = build(tmp_path, loose, withdrawn=load_withdrawn(store))
    assert all(one.answer != "noted" for one in held(left))


@pytest.mark.parametrize("near", [False, True])
def test_each_person_of_one_text_can_be_recalled(tmp_path: Path, store: Store, near: bool) -> None:
    """Of rows that are equal, and of near ones under other system turns, one stays, and is each person's."""
    people = ("zoe", "max", "ida")
    text = "my telephone number stands in the big red book on the shelf"
    systems = [f"Be {name}." if near else None for name in people]
    shared = [
        {"messages": turns(text, "a word", system=system), "subject": name}
        for name, system in zip(people, systems, strict=True)
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, *shared, *([] if near else [row(text, "a word")])])
    (kept,) = [one for one in held(build(tmp_path)) if one.answer == "a word"]
    assert near or kept.subject == "ida"
    for name in people:
        assert sum(withdraw(store, "subject", name).reached[0].rows.values()) == 1
    left = build(tmp_path, withdrawn=load_withdrawn(store))
    assert all(one.answer != "a word" for one in held(left))


# A person or a source is withdrawn in every spelling of its name, and what is near is listed


NAME = unicodedata.normalize("NFC", "José García")
SPELLINGS = (
    NAME, unicodedata.normalize("NFD", NAME), f"  {NAME} ", NAME.replace(" ", "  "), "Jo\u200bsé García", NAME.upper(),
    NAME.replace("J", "Ｊ"),
)  # fmt: skip
NEAR = ("Jose Garcia", "García, José", "José", "José Garcia Márquez", "José Garcías")
OTHERS = ("Maria Lopez", "Ann", *(f"customer-{n:05}" for n in range(60)))


@pytest.mark.attack("people", "a withdrawal under one spelling of a name")
@pytest.mark.parametrize("asked", [SPELLINGS[0], SPELLINGS[1], SPELLINGS[5]])
def test_all_spellings_go_and_what_is_near_is_listed(
    tmp_path: Path, store: Store, asked: str, happened: Happened
) -> None:
    names = (*SPELLINGS, *NEAR, *OTHERS)
    given = [{**one, "subject": name} for one, name in zip(many_rows(len(names)), names, strict=True)]
    write_jsonl(tmp_path / "rows.jsonl", given)
    build(tmp_path, chosen("rows.jsonl"))
    found = withdraw(store, "subject", asked)
    assert sum(found.reached[0].rows.values()) == len(SPELLINGS)
    assert set(found.near) == {name.lower() for name in NEAR}
    second = build(tmp_path, chosen("rows.jsonl"), withdrawn=load_withdrawn(store))
    assert {one.subject for one in held(second)} == {*NEAR, *OTHERS}
    status = recall_status(store, Cause(kind="subject", value=SPELLINGS[2]))
    assert (status.gone, set(status.near)) == (True, set(found.near))
    ids = withdraw(store, "subject", "customer-00001").near
    assert ids == (), "an id that differs in a digit is another id"
    withdraw(store, "subject", NEAR[0])
    assert NEAR[0].lower() not in recall_status(store, Cause(kind="subject", value=NAME)).near, "withdrawn as well"
    happened("every spelling gone", len(SPELLINGS))


@pytest.mark.parametrize("kind", ["subject", "source"])
def test_whatever_is_built_can_be_recalled(tmp_path: Path, store: Store, kind: str) -> None:
    long = "/".join(["x" * 180, "y" * 100])
    source = f"{long}.jsonl" if kind == "source" else "rows.jsonl"
    (tmp_path / source).parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / source, [{**one, "subject": long} for one in many_rows(20)])
    write_jsonl(tmp_path / "other.jsonl", [{**one, "subject": f"{long}z"} for one in many_rows(40)[20:]])
    build(tmp_path, chosen(source, "other.jsonl"))
    named = source if kind == "source" else long
    withdraw(store, kind, named)
    second = build(tmp_path, chosen(source, "other.jsonl"), withdrawn=load_withdrawn(store))
    assert {one.source for one in held(second)} == {"other.jsonl"}
    assert gone(store, kind, named)


def test_a_recall_of_before_counts_in_every_spelling(tmp_path: Path, store: Store) -> None:
    cause = f"subject {NAME}"
    write_jsonl(tmp_path / "rows.jsonl", [{**one, "subject": NAME} for one in many_rows(20)])
    dataset = build(tmp_path, chosen("rows.jsonl"))
    with store.change("ann", "recall.start", cause, {}) as session:
        session.add(RecallRow(digest=dataset.digest, cause=cause, reason="asked", at="2026-01-01T00:00:00Z"))
    assert gone(store, "subject", NAME.lower())
    with pytest.raises(UsageError, match="withdrawn by a recall: 20"):
        build(tmp_path, chosen("rows.jsonl"), withdrawn=load_withdrawn(store))

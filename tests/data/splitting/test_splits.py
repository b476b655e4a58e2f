"""Groups are in one split and keep it; what is near a held-out row, or begins with one, is not trained on."""

import itertools
import json
import random
from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.rows import build, held, many_rows, row, settings, turns, write_jsonl
from tests.data.trigrams import jaccard, shingles
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data import similarity_join as join
from tunesmith.data.building.signoff import verify_dataset
from tunesmith.data.building.staging import EXACT
from tunesmith.data.dataset import SPLITS, Dataset, Example, example_id
from tunesmith.data.duplicates import METHOD, answer_key, near_pairs, near_text, normalise, request_key, request_text
from tunesmith.data.settings import Split
from tunesmith.data.splitting import leakage as leaks
from tunesmith.data.splitting.assignment import OLDER, split_of, time_of
from tunesmith.data.splitting.groups import joined_groups, wording_group
from tunesmith.records.dataset import Leakage
from tunesmith.store.store import Store


def example(request: str, answer: str = "ok", group: str = "g", source: str = "a.jsonl") -> Example:
    messages = (Message(role="user", content=request), Message(role="assistant", content=answer))
    return Example(id=example_id(messages, source), messages=messages, source=source, licence="MIT", group=group)


def trigrams(one: Example) -> frozenset[str]:
    return shingles(near_text(request_text(one.messages)))


def test_shares_seed_and_known_places() -> None:
    names = [f"group {n}" for n in range(4000)]
    places, others = ([split_of(name, Split(test=0.2, validation=0.1, seed=n)) for name in names] for n in (0, 1))
    shares = Counter(places)
    assert abs(shares["test"] / 4000 - 0.2) < 0.02
    assert abs(shares["validation"] / 4000 - 0.1) < 0.02
    assert places != others
    # Pinned: a change here would move every existing dataset's held-out rows.
    small, large = (
        {n for n in range(500) if split_of(f"group {n}", Split(test=share)) == "test"} for share in (0.1, 0.3)
    )
    assert small < large, "a larger share keeps what was held out"
    places = [split_of(f"group {n}", Split(test=0.3, validation=0.2)) for n in range(12)]
    held = {name: [n for n, place in enumerate(places) if place == name] for name in ("test", "validation")}
    assert held == {"test": [3, 5, 7, 8], "validation": [1, 4]}


def test_wordings_without_their_values() -> None:
    def group(request: str, **slots: str) -> str:
        return wording_group(request, json.dumps({"intent": "Play", "slots": slots}))

    first = group("play yesterday by the beatles in the hall", track="yesterday", artist="the beatles", room="hall")
    assert first == group("play waterloo by abba in the kitchen", track="waterloo", artist="ABBA", room="kitchen")
    assert first != group("play some music", track="music")
    assert wording_group("set 5 alarms for 7:30", "ok") == wording_group("set 12 alarms for 16:45", "ok")
    assert wording_group('say "hello"', "ok") == wording_group('say "good night"', "ok")
    assert wording_group("say hello", "ok") != wording_group("say goodbye", "ok")
    # A mark at the end of a value is the value's.
    assert group("play who moved my cheese? in the hall", track="Who Moved My Cheese?", room="hall") == group(
        "play rockin' in the hall", track="rockin'", room="hall"
    )


def test_rows_near_a_removed_held_out_row_are_removed() -> None:
    """Of a published test set every row counts, whichever of two that say the same stays in ours."""
    said = ["book a table for two people at the harbour", "book a table for two people at the harbour tonight"]
    reworded = [f"please do {said[0]}", f"{said[1]} please"]
    splits = {
        "train": [example(text, source="b.jsonl") for text in reworded],
        "validation": [],
        "test": [example(text) for text in said],
    }
    one, other = (jaccard(trigrams(splits["test"][n]), trigrams(splits["train"][1 - n])) for n in (0, 1))
    assert max(one, other) < 0.8  # each training row is near one of the two alone
    gone = leaks.rows_to_remove(splits, 0.8)
    assert [gone.get(row.id) for row in splits["train"]] == [leaks.NEAR_HELD_OUT] * 2
    assert sorted(gone.get(row.id, "") for row in splits["test"]) == ["", leaks.NEAR_SAME_ANSWER]


request = st.lists(st.sampled_from(["turn", "on", "off", "the", "light", "fan", "in", "hall"]), min_size=1, max_size=6)
rows = st.lists(
    st.tuples(request.map(" ".join), st.sampled_from(["a", "b"]), st.sampled_from(["train", "validation", "test"])),
    max_size=25,
    unique_by=lambda row: row[:2],
)


@given(rows, st.sampled_from([0.6, 0.8, 1.0]))
@examples(max_examples=40)
def test_after_leaving_nothing_is_near_across_splits(found: list[tuple[str, str, str]], threshold: float) -> None:
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for text, answer, split in found:
        splits[split].append(example(text, answer))
    gone = leaks.rows_to_remove(splits, threshold)
    staying = {name: [one for one in some if one.id not in gone] for name, some in splits.items()}
    assert leaks.leakage(leaks.Nearness(staying, threshold)).near_pairs == 0
    assert leaks.NEAR_HELD_OUT not in [gone.get(one.id) for one in splits["test"]], "rows of the others leave first"
    # leakage counts what brute force counts
    flat = [(name, one) for name, some in splits.items() for one in some]
    near = [
        (one, other)
        for (name, one), (other_name, other) in itertools.combinations(flat, 2)
        if name != other_name and jaccard(trigrams(one), trigrams(other)) >= threshold
    ]
    assert leaks.leakage(leaks.Nearness(splits, threshold)).near_pairs == len(near)
    # a row leaves only for one that stays, or for a repeat of one that is held out
    repeats = [one for one in splits["test"] + splits["validation"] if gone.get(one.id) == leaks.NEAR_SAME_ANSWER]
    kept = [one for some in staying.values() for one in some]
    for _, one in flat:
        if one.id in gone:
            others = kept + repeats if gone[one.id] == leaks.NEAR_HELD_OUT else kept
            assert any(jaccard(trigrams(one), trigrams(other)) >= threshold for other in others), one.request


def talk(name: str, *said: str, weights: dict[int, int] | None = None) -> Example:
    spoken = [{**turn, "weight": (weights or {}).get(n, 1)} for n, turn in enumerate(turns(*said))]
    messages = tuple(Message.model_validate(turn) for turn in spoken)
    return Example(id=name, messages=messages, source="", licence="", group=name)


def test_beginnings_are_counted_in_what_learns_them_and_removed_from_it() -> None:
    splits = {
        "train": [
            talk("leaks", "Open the door!", "done", "and the window", "done too"),
            talk("unlearned", "open the door", "done", "and the gate", "done too", weights={1: 0}),
            talk("further", "open the door", "done", "now the lamp", "on", "now the fan", "on"),
            talk("plain", "water the flowers", "done"),
        ],
        "validation": [talk("held", "open the door", "no"), talk("begins", "lock up", "yes", "everything", "yes")],
        "test": [talk("second", "open the door", "done", "now the lamp", "off"), talk("first", "lock up", "no")],
    }
    near = leaks.Nearness(splits, 0.8)
    assert near.beginnings() == 3
    found = leaks.leakage(near)
    assert found.faults() == {"beginnings": 3}
    gone = leaks.rows_to_remove(splits, 0.8)
    assert gone == {"leaks": leaks.NEAR_HELD_OUT, "further": leaks.NEAR_HELD_OUT, "begins": leaks.NEAR_HELD_OUT}
    left = {split: [one for one in some if one.id not in gone] for split, some in splits.items()}
    clean = leaks.leakage(leaks.Nearness(left, 0.8))
    assert clean == Leakage(shared_groups=0, near_pairs=0, near_outside=0, threshold=0.8, method=METHOD)
    assert "beginnings" not in clean.model_dump()

    splits = {"train": [talk("leaks", "open the door", "done", "and the window", "done too")]}
    outside = [" open the door "]
    assert leaks.leakage(leaks.Nearness(splits, 0.8, outside)).near_outside == 1
    assert leaks.rows_to_remove(splits, 0.8, outside) == {"leaks": leaks.NEAR_OUTSIDE}


# Near pairs against brute force, and what counts as the same


def pairs(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    return [(left, right) for left, right in near_pairs(texts, threshold).tolist()]


def brute_force(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    sets = [shingles(text) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold]


def test_what_is_the_same() -> None:
    assert normalise("  Turn ON\tthe Lights!! ") == normalise("turn on the lights")
    assert normalise("ｆｕｌｌ ｗｉｄｔｈ") == "full width"
    assert normalise("?!") == "?!"
    assert normalise("c++") != normalise("c")
    assert answer_key('{"b": 1, "a": "x"}') == answer_key('{"a":"x","b":1.0}')
    answer = Message(role="assistant", content="ok")
    for left, right in (("a flat of 5 m²", "a flat of 5 m2"), ("what is 2⁵", "what is 25"), ("1½ cups", "1 1/2 cups")):
        keys = {request_key([Message(role="user", content=text), answer]) for text in (left, right)}
        assert len(keys) == 2
    assert answer_key("Yes ") == answer_key("Yes") != answer_key("yes")
    assert answer_key('{"a": NaN}') == '{"a": NaN}'
    long = "You are a helpful assistant that answers every question at great length. " * 5
    system = Message(role="system", content=long)
    said = [request_text([system, Message(role="user", content=text), answer]) for text in ("go", "stop")]
    assert not pairs(said, 0.8), "the system turn makes no two requests alike"


word = st.sampled_from("turn switch on off the a light lamp lights in kitchen bedroom please now".split())  # noqa: SIM905


thresholds = st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 1.0])


@given(st.lists(st.lists(word, min_size=1, max_size=7).map(" ".join) | st.text(max_size=12), unique=True), thresholds)
@examples(max_examples=60)
def test_near_pairs_are_those_of_brute_force(texts: list[str], threshold: float) -> None:
    assert pairs(texts, threshold) == brute_force(texts, threshold)


@pytest.mark.parametrize(("words", "threshold"), [(6, 0.5), (40, 0.8), (300, 0.95)])
def test_short_and_long_rows_of_many_sizes(words: int, threshold: float) -> None:
    """Long rows are compared all with all, short ones by parts; sizes vary so that several classes meet."""
    rng = random.Random(words)
    texts = []
    for _ in range(100):
        text = ["".join(rng.choices("abcdefghiklmnopqrst", k=4)) for _ in range(rng.randint(2, words))]
        changed = rng.randrange(len(text))
        texts += [" ".join(text), " ".join([*text[:changed], "changed", *text[changed + 1 :]])]
    texts = list(dict.fromkeys(texts))
    assert pairs(texts, threshold) == brute_force(texts, threshold)


@pytest.mark.parametrize("limit", ["_CELLS", "_PAIRS"])
def test_what_is_worked_on_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    rng = random.Random(0)
    texts = list({" ".join(rng.choice(["lamp", "light", "on", "off", "hall"]) for _ in range(6)) for _ in range(200)})
    short = ["", "\0", "\0\0", "\0\0\0", " ", "a", "a\0", "a ", "ab", "ab\0", "ab "]
    assert pairs(short, 0.5) == pairs([], 0.8) == [], "a short text is not what it would be padded with"
    whole = pairs(texts, 0.7)
    monkeypatch.setattr(join, limit, 256)
    assert pairs(texts, 0.7) == whole == brute_force(texts, 0.7)


def test_too_many_near_pairs_are_refused() -> None:
    shared = "classify the sentiment of the following review as positive or negative and explain briefly: " * 3
    with pytest.raises(Refused, match="too similar") as caught:
        pairs([f"{shared}{n}" for n in range(260)], 0.8)
    assert "system turn" in str(caught.value.fix)


# Rows are in one split by any of several things, by time, and in like shares of each kind; the record proves it


words = st.lists(st.sampled_from(["turn", "on", "off", "the", "light", "fan", "hall"]), min_size=1, max_size=5)
members = st.lists(st.tuples(words.map(" ".join), st.sampled_from("abcde"), st.sampled_from("vwxyz")), max_size=14)


@given(members, st.sampled_from([("a", "b"), ("a", "near"), ("near",), ("a", "b", "near")]))
@examples(max_examples=40)
def test_groups_are_components(found: list[tuple[str, str, str]], groups: tuple[str, ...]) -> None:
    rows = [leaks.ComparedRow(str(n), "", text, "", {"a": a, "b": b}) for n, (text, a, b) in enumerate(found)]
    told = dict(joined_groups(rows, Split(group_by=groups), 0.6))

    def share(one: leaks.ComparedRow, other: leaks.ComparedRow) -> bool:
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
        split: [leaks.ComparedRow(talk, talk, f"{talk} alone", "", {"author": author, "talk": talk})]
        for split, author, talk in said
    }
    found = leaks.leakage(leaks.Nearness(splits, 0.8), Split(group_by=("author", "talk")))
    assert (found.shared, found.faults()) == ({"author": 1, "talk": 0}, {"shared.author": 1})


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


def test_split_by_time_with_equal_times_and_groups(tmp_path: Path) -> None:
    days = [f"2024-{1 + n // 28:02d}-{1 + n % 28:02d}" for n in range(60)]
    rows = [{**one, "who": f"p{n}", "at": days[n]} for n, one in enumerate(many_rows(60))]
    for one in rows[-9:]:
        one["at"] = "2030-01-01"  # nine rows of one time, six wanted
    for at in ("2024-01-01", "2031-01-01"):
        rows.append(row(f"a train of {at} to the city of york", at, at=at, who="eve"))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build(tmp_path, settings(split={"time": "at", "group_by": "who", "test": 0.1, "validation": 0}))
    body = dataset.record.body
    assert body["splits"] == {"train": 51, "validation": 0, "test": 10}
    assert body["time"]["spans"]["train"][1] < body["time"]["spans"]["test"][0]
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok
    assert body["rows"]["removed"] == {OLDER: 1}
    assert body["time"]["rows_beyond_shares"] == 3
    assert [body["leakage"][name] for name in ("not_older", "shared_groups", "near_pairs")] == [0, 0, 0]


def test_times_of_every_kind_are_one_time() -> None:
    same = ["2024-05-01T12:00:00Z", "2024-05-01T14:00:00+02:00", 1714564800, "1714564800", 1714564800000, 1714564800.0]
    assert {time_of(value, "") for value in same} == {"2024-05-01T12:00:00.000000Z"}
    assert time_of("2024-05-01", "") < time_of("2024-05-01T00:00:01", "") < time_of(1714564800, "")
    days = ["2024-05-01", "20240501", 20240501, 20240501.0, date(2024, 5, 1), datetime(2024, 5, 1)]
    assert {time_of(value, "") for value in days} == {"2024-05-01T00:00:00.000000Z"}
    assert time_of(86_400_000 * 10, "") == "1997-05-19T00:00:00.000000Z"


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
    write_jsonl(tmp_path / "rows.jsonl", many_rows(60))
    for wrong, said in (("answer", "60 values in 60 rows"), ("channel", "has no channel")):
        with pytest.raises(UsageError, match=said):
            build(tmp_path, settings(split={"stratify": wrong}))


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
    assert {(one.source, one.reason) for one in dataset.removed()} == {("train.jsonl", EXACT)}
    assert verify_dataset(Store(tmp_path / "store"), dataset.digest).ok


@pytest.mark.parametrize("more", [{}, {"stratify": "kind", "group_by": "author"}])
def test_a_published_test_set_may_be_all_that_is_held_out(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [{**one, "author": f"a{n}", "kind": "xy"[n % 2]} for n, one in enumerate(many_rows(80))]
    dataset = _published(tmp_path, {"test": 0, "validation": 0.1, **more}, rows[:60], rows[60:])
    assert {one.source for one in dataset.examples("test")} == {"held.jsonl"}
    assert dataset.record.body["splits"]["test"] == 20
    with pytest.raises(ValueError, match="nothing would be held out"):
        settings(split={"test": 0})

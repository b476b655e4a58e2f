"""Groups are in one split and keep it; what is near a held-out row, or begins with one, is not trained on."""

from __future__ import annotations

import itertools
import json
from collections import Counter

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.data.rows import turns
from tests.data.trigrams import jaccard, shingles
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, example_id
from tunesmith.data.settings import Split
from tunesmith.data.splitting.assignment import split_of
from tunesmith.data.splitting.duplicates import near_text, request_text
from tunesmith.data.splitting.groups import wording_group
from tunesmith.data.splitting.leakage import (
    NEAR_HELD_OUT,
    NEAR_OUTSIDE,
    NEAR_SAME_ANSWER,
    Leakage,
    Nearness,
    leakage,
    rows_to_remove,
)


def example(request: str, answer: str = "ok", group: str = "g", source: str = "a.jsonl") -> Example:
    messages = (Message(role="user", content=request), Message(role="assistant", content=answer))
    return Example(id=example_id(messages, source), messages=messages, source=source, licence="MIT", group=group)


def trigrams(one: Example) -> frozenset[str]:
    return shingles(near_text(request_text(one.messages)))


def test_shares_and_seed() -> None:
    names = [f"group {n}" for n in range(4000)]
    places, others = ([split_of(name, Split(test=0.2, validation=0.1, seed=n)) for name in names] for n in (0, 1))
    shares = Counter(places)
    assert abs(shares["test"] / 4000 - 0.2) < 0.02
    assert abs(shares["validation"] / 4000 - 0.1) < 0.02
    assert places != others


def test_known_places_do_not_move() -> None:
    """Pinned: a change here would move every existing dataset's held-out rows."""
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
    gone = rows_to_remove(splits, 0.8)
    assert [gone.get(row.id) for row in splits["train"]] == [NEAR_HELD_OUT] * 2
    assert sorted(gone.get(row.id, "") for row in splits["test"]) == ["", NEAR_SAME_ANSWER]


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
    gone = rows_to_remove(splits, threshold)
    staying = {name: [one for one in some if one.id not in gone] for name, some in splits.items()}
    assert leakage(staying, Nearness(staying, threshold)).near_pairs == 0
    assert NEAR_HELD_OUT not in [gone.get(one.id) for one in splits["test"]], "rows of the others leave first"
    # leakage counts what brute force counts
    flat = [(name, one) for name, some in splits.items() for one in some]
    near = [
        (one, other)
        for (name, one), (other_name, other) in itertools.combinations(flat, 2)
        if name != other_name and jaccard(trigrams(one), trigrams(other)) >= threshold
    ]
    assert leakage(splits, Nearness(splits, threshold)).near_pairs == len(near)
    # a row leaves only for one that stays, or for a repeat of one that is held out
    repeats = [one for one in splits["test"] + splits["validation"] if gone.get(one.id) == NEAR_SAME_ANSWER]
    kept = [one for some in staying.values() for one in some]
    for _, one in flat:
        if one.id in gone:
            others = kept + repeats if gone[one.id] == NEAR_HELD_OUT else kept
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
    near = Nearness(splits, 0.8)
    assert near.beginnings(splits) == 3
    found = leakage(splits, near)
    assert found.faults() == {"beginnings": 3}
    gone = rows_to_remove(splits, 0.8)
    assert gone == {"leaks": NEAR_HELD_OUT, "further": NEAR_HELD_OUT, "begins": NEAR_HELD_OUT}
    left = {split: [one for one in some if one.id not in gone] for split, some in splits.items()}
    clean = leakage(left, Nearness(left, 0.8))
    assert clean == Leakage(shared_groups=0, near_pairs=0, near_outside=0, threshold=0.8)
    assert "beginnings" not in clean.document()

    splits = {"train": [talk("leaks", "open the door", "done", "and the window", "done too")]}
    outside = [" open the door "]
    assert leakage(splits, Nearness(splits, 0.8, outside)).near_outside == 1
    assert rows_to_remove(splits, 0.8, outside) == {"leaks": NEAR_OUTSIDE}

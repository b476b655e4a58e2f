"""Training learns every answer of a conversation, so a held-out row must not be the beginning of one."""

from __future__ import annotations

from tests.data.rows import turns
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.data.splitting.leakage import NEAR_HELD_OUT, NEAR_OUTSIDE, Leakage, Nearness, leakage, rows_to_remove


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

"""Which rows are held out, and the proof that nothing held out was near anything trained on."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.digests import digest_of
from tunesmith.data.dataset import SPLITS, Example
from tunesmith.data.duplicates import METHOD, MISS, answer_key, near_pairs, normalise, request_text
from tunesmith.data.settings import Split

NEAR_HELD_OUT = "near a held-out row"
NEAR_SAME_ANSWER = "near duplicate with the same answer"

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")
_SHORTEST_VALUE = 2


@dataclass(frozen=True, slots=True)
class Leakage:
    """What splits share. Both numbers are zero in a sound dataset version."""

    shared_groups: int
    near_pairs: int

    def as_json(self, threshold: float) -> dict[str, Any]:
        """For the record: the numbers and how they were found."""
        return {
            "shared_groups": self.shared_groups,
            "near_pairs": self.near_pairs,
            "threshold": threshold,
            "method": METHOD,
            "miss_at_threshold": MISS,
        }


def split_of(group: str, split: Split, held: Container[str] = ()) -> str:
    """The split of a group: its hash with the seed as a number in [0, 1), test first, then validation, then train.

    Nothing but the group and the settings decides, so rows that come later move no earlier one; but held groups are
    test, whatever their hash.
    """
    if group in held:
        return "test"
    number = int.from_bytes(hashlib.sha256(f"{split.seed}\0{group}".encode()).digest()[:8], "big") / 2**64
    if number < split.test:
        return "test"
    return "validation" if number < split.test + split.validation else "train"


def wording_group(request: str, answer: str) -> str:
    """A group for rows without one of their own: the request with its values taken out.

    request: normalised text. Values are numbers, quoted texts and, where the answer is JSON, the texts in it that the
    request holds too: "play yesterday in the kitchen" and "play hallelujah in the hall" are one wording.
    """
    for value in sorted(_values(answer), key=lambda value: (-len(value), value)):
        request = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "\0", request)
    bare = _NUMBER.sub("\0", _QUOTED.sub("\0", request))
    return "wording-" + digest_of(bare.replace("\0", "*")).removeprefix("sha256:")[:16]


def _values(answer: str) -> set[str]:
    if not answer.lstrip().startswith(("{", "[")):
        return set()
    try:
        pending, found = [json.loads(answer)], set()
    except (ValueError, RecursionError):
        return set()
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str) and len(value) >= _SHORTEST_VALUE:
            found.add(normalise(value))
    return found


def leaving(splits: Mapping[str, Sequence[Example]], threshold: float) -> dict[str, str]:
    """Example id -> why it has to leave its split: nearness to a held-out row, or a repeated row within the split.

    Of two near rows in different splits the test's stays, then the validation's. Of two near rows in one split with
    the same answer the one with the smaller id stays; with different answers both do, for the difference is what is
    to be learned.
    """
    rank = {name: place for place, name in enumerate(reversed(SPLITS))}  # test 0, validation 1, train 2
    near = _Nearness([example for examples in splits.values() for example in examples], threshold)
    staying: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)  # text -> (rank, answer) of rows that stay
    gone: dict[str, str] = {}
    rows = [(rank[name], example.id, example) for name, examples in splits.items() for example in examples]
    for own, name, example in sorted(rows, key=lambda row: row[:2]):
        mine = (own, answer_key(example.answer))
        met = [staying[text] for text in near.around(example)]
        if any(other < own for rows_there in met for other, _ in rows_there):
            gone[name] = NEAR_HELD_OUT
        elif any(mine in rows_there for rows_there in met):
            gone[name] = NEAR_SAME_ANSWER
        else:
            staying[near.text(example)].add(mine)
    return gone


def leakage(splits: Mapping[str, Sequence[Example]], threshold: float) -> Leakage:
    """Groups that stand in more than one split, and near pairs of requests across splits, counted afresh."""
    near = _Nearness([example for examples in splits.values() for example in examples], threshold)
    holders: defaultdict[str, set[str]] = defaultdict(set)
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # text -> split -> rows
    for name, examples in splits.items():
        for example in examples:
            holders[example.group].add(name)
            counts[near.text(example)][name] += 1
    across = 0
    for text, here in counts.items():
        for other in near.texts_around(text):
            if other >= text:  # each pair of texts once; a text is near itself
                there = counts[other]
                both = sum(here.values()) * sum(there.values()) - sum(here[name] * there[name] for name in here)
                across += both // 2 if other == text else both
    return Leakage(sum(len(names) > 1 for names in holders.values()), across)


class _Nearness:
    """Which requests are the same or near. Works on distinct texts: a request that stands a thousand times is one."""

    def __init__(self, examples: Sequence[Example], threshold: float) -> None:
        self._places: dict[str, int] = {}
        self._of = {
            example.id: self._places.setdefault(request_text(example.messages), len(self._places))
            for example in examples
        }
        self._near = [{place} for place in range(len(self._places))]
        for left, right in near_pairs(list(self._places), threshold):
            self._near[left].add(right)
            self._near[right].add(left)

    def text(self, example: Example) -> int:
        """The number of the example's request among the distinct ones."""
        return self._of[example.id]

    def texts_around(self, text: int) -> set[int]:
        """The distinct requests near this one, itself among them."""
        return self._near[text]

    def around(self, example: Example) -> set[int]:
        """The distinct requests near the example's."""
        return self._near[self._of[example.id]]

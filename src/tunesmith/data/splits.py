"""Which rows are held out, and the proof that nothing held out was near anything trained on."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.data.dataset import SPLITS
from tunesmith.data.duplicates import METHOD, METHODS, answer_key, near_pairs
from tunesmith.data.settings import NEAR, Split

NEAR_HELD_OUT = "near a held-out row"
NEAR_SAME_ANSWER = "near duplicate with the same answer"
NEAR_OUTSIDE = "near a row of an outside test set"


@dataclass(frozen=True, slots=True)
class Leakage:
    """What splits share. All numbers are zero in a sound dataset version.

    near_outside: rows near a row of the outside test sets. shared: of what may keep rows together, how many values
    stand in two splits; told where there are several. not_older: rows of train and validation that are not older than
    every row of the splits after them; None where time does not decide.
    """

    shared_groups: int
    near_pairs: int
    near_outside: int = 0
    shared: Mapping[str, int] = field(default_factory=dict)
    not_older: int | None = None

    def as_json(self, threshold: float) -> dict[str, Any]:
        """For the record: the numbers and how they were found."""
        return {
            "shared_groups": self.shared_groups,
            "near_pairs": self.near_pairs,
            "near_outside": self.near_outside,
            "threshold": threshold,
            "method": METHOD,
            **({"shared": dict(self.shared)} if self.shared else {}),
            **({} if self.not_older is None else {"not_older": self.not_older}),
        }

    def faults(self) -> dict[str, int]:
        """What is not zero and must be, by its name in the record."""
        found = {"shared_groups": self.shared_groups, "near_pairs": self.near_pairs, "near_outside": self.near_outside}
        found |= {f"shared.{name}": number for name, number in self.shared.items()}
        found["not_older"] = self.not_older or 0
        return {name: number for name, number in found.items() if number}


class Judged(Protocol):
    """What nearness is judged by. wording: the request, normalised; answer: its text, or what stands for it."""

    @property
    def id(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def wording(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Trace:
    """Of an example no more than nearness is judged by. answer: the digest of its answer_key."""

    id: str
    group: str
    wording: str
    answer: str
    labels: Mapping[str, str]


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


def leaving(splits: Mapping[str, Sequence[Judged]], threshold: float, outside: Iterable[str] = ()) -> dict[str, str]:
    """Example id -> why it has to leave its split: nearness to a held-out row, or a repeated row within the split.

    outside: near_text of requests that no split may hold; what is near one leaves whatever split it is in. Of two near
    rows in different splits the test's stays, then the validation's. Of two near rows in one split with the same answer
    the one with the smaller id stays; with different answers both do, for the difference is what is to be learned.
    """
    rank = {name: place for place, name in enumerate(reversed(SPLITS))}  # test 0, validation 1, train 2
    near = _Nearness([example for examples in splits.values() for example in examples], threshold, outside)
    staying: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)  # text -> (rank, answer) of rows that stay
    gone: dict[str, str] = {}
    rows = [(rank[name], example.id, example) for name, examples in splits.items() for example in examples]
    for own, name, example in sorted(rows, key=lambda row: row[:2]):
        mine = (own, answer_key(example.answer))
        met = [staying[text] for text in near.around(example)]
        if not near.outside.isdisjoint(near.around(example)):
            gone[name] = NEAR_OUTSIDE
        elif any(other < own for rows_there in met for other, _ in rows_there):
            gone[name] = NEAR_HELD_OUT
        elif any(mine in rows_there for rows_there in met):
            gone[name] = NEAR_SAME_ANSWER
        else:
            staying[near.text(example)].add(mine)
    return gone


def leakage(
    splits: Mapping[str, Sequence[Judged]],
    threshold: float,
    outside: Iterable[str] = (),
    method: str = METHOD,
    split: Split = Split(),
) -> Leakage:
    """Groups that stand in more than one split, and near pairs of requests across splits, counted afresh.

    method: one of METHODS, as an earlier record may state another than today's. split: says what else the splits may
    not share, and whether they go by time.
    """
    near = _Nearness([example for examples in splits.values() for example in examples], threshold, outside, method)
    holders: defaultdict[str, set[str]] = defaultdict(set)
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # text -> split -> rows
    for name, examples in splits.items():
        for example in examples:
            holders[example.group].add(name)
            counts[near.text(example)][name] += 1
    across = 0
    for text, here in counts.items():
        for other in near.texts_around(text):
            if other >= text and other in counts:  # each pair of texts once; a text is near itself
                there = counts[other]
                both = sum(here.values()) * sum(there.values()) - sum(here[name] * there[name] for name in here)
                across += both // 2 if other == text else both
    touching = sum(sum(here.values()) for text, here in counts.items() if near.outside & near.texts_around(text))
    shared = sum(len(names) > 1 for names in holders.values())
    return Leakage(shared, across, touching, _shared_labels(splits, split), _not_older(splits, split.time))


def _shared_labels(splits: Mapping[str, Sequence[Judged]], split: Split) -> dict[str, int]:
    found = {}
    for name in split.groups if split.joined else ():
        if name != NEAR:  # near pairs are counted as such
            holders: defaultdict[str, set[str]] = defaultdict(set)
            for each, examples in splits.items():
                for example in examples:
                    holders[example.labels.get(name, "")].add(each)
            found[name] = sum(len(names) > 1 for names in holders.values())
    return found


def _not_older(splits: Mapping[str, Sequence[Judged]], key: str | None) -> int | None:
    if key is None:
        return None
    found, earliest = 0, "~"  # after every time
    for name in reversed(SPLITS):
        times = [example.labels.get(key, "~") for example in splits[name]]
        found += sum(time >= earliest for time in times)
        earliest = min([earliest, *times])
    return found


def clusters(splits: Mapping[str, Sequence[Judged]], threshold: float, shown: int) -> dict[str, Any]:
    """Rows of a split that are near each other, directly or through others, and were kept since their answers differ.

    {"clusters", "rows", "largest", "examples": the ids of the largest `shown`}.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found: list[list[str]] = []
    for examples in splits.values():
        near = _Nearness(examples, threshold)
        links = [(text, other) for text in near.texts() for other in near.texts_around(text)]
        ends = tuple(zip(*links, strict=True)) or ((), ())
        size = len(near.texts())
        _, labels = connected_components(coo_array(([True] * len(links), ends), shape=(size, size)), directed=False)
        together: defaultdict[int, list[str]] = defaultdict(list)
        for example in examples:
            together[int(labels[near.text(example)])].append(example.id)
        found.extend(sorted(ids) for ids in together.values() if len(ids) > 1)
    found.sort(key=lambda ids: (-len(ids), ids))
    rows = [len(ids) for ids in found]
    return {"clusters": len(found), "rows": sum(rows), "largest": max(rows, default=0), "examples": found[:shown]}


class _Nearness:
    """Which requests are the same or near. Works on distinct texts: a request that stands a thousand times is one."""

    def __init__(
        self, examples: Sequence[Judged], threshold: float, outside: Iterable[str] = (), method: str = METHOD
    ) -> None:
        self._places: dict[str, int] = {}
        self._of: dict[str, int] = {}
        for example in examples:
            self._of[example.id] = self._places.setdefault(METHODS[method](example.wording), len(self._places))
        self.outside = {self._places.setdefault(text, len(self._places)) for text in outside}
        self._near = [{place} for place in range(len(self._places))]
        for left, right in near_pairs(list(self._places), threshold):
            self._near[left].add(right)
            self._near[right].add(left)

    def texts(self) -> range:
        """The numbers of the distinct requests."""
        return range(len(self._near))

    def text(self, example: Judged) -> int:
        """The number of the example's request among the distinct ones."""
        return self._of[example.id]

    def texts_around(self, text: int) -> set[int]:
        """The distinct requests near this one, itself among them."""
        return self._near[text]

    def around(self, example: Judged) -> set[int]:
        """The distinct requests near the example's."""
        return self._near[self._of[example.id]]

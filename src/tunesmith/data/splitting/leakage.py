"""Near duplicates across splits: removes them, and counts again that none is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tunesmith.data.dataset import SPLITS, Example
from tunesmith.data.duplicates import METHOD, answer_key, near_pairs, near_text
from tunesmith.data.settings import NEAR, Split
from tunesmith.data.splitting.groups import connected
from tunesmith.records.dataset import Leakage, NearClusters

NEAR_HELD_OUT = "near a held-out row"
NEAR_SAME_ANSWER = "near duplicate with the same answer"
NEAR_OUTSIDE = "near a row of an outside test set"


class ComparedRow(NamedTuple):
    """The parts of an example that comparisons need. answer: the digest of its `answer_key`. earlier: as in Example."""

    id: str
    group: str
    wording: str
    answer: str
    labels: Mapping[str, str]
    earlier: tuple[int, ...] = ()


Comparable = Example | ComparedRow
Splits = Mapping[str, Sequence[Comparable]]


def rows_to_remove(splits: Splits, threshold: float, outside: Iterable[str] = ()) -> dict[str, str]:
    """Example id -> why the row is removed: it is near a held-out row, or a near duplicate within its split.

    outside: near_text of requests that no split may hold; rows near one are removed from any split. Of two near rows in
    different splits, the test row is kept, otherwise the validation row. Of two near rows in one split with the same
    answer, the one with the smaller id is kept; with different answers both are kept, since training should learn the
    difference. Rows near a held-out row are removed even where that row is itself removed as a near duplicate. So are
    conversations that learn an earlier answer to a held-out or outside request: these requests must be equal, not near.
    """
    rank = {name: place for place, name in enumerate(reversed(SPLITS))}  # test 0, validation 1, train 2
    near = Nearness(splits, threshold, outside)
    staying: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)  # text -> (rank, answer) of rows that stay
    given: dict[int, int] = {}  # text -> the lowest rank of its rows that were not too near to one of a lower rank
    gone: dict[str, str] = {}
    for name in sorted(splits, key=rank.__getitem__):
        for example in sorted(splits[name], key=lambda one: one.id):
            text, own, begun = near.text(example), rank[name], near.begun(example)
            if near.alone[text] and not begun:
                continue
            around = near.texts_around(text)
            mine = (own, answer_key(example.answer))
            if not near.outside.isdisjoint(around | begun):
                gone[example.id] = NEAR_OUTSIDE
                continue
            if any(given.get(other, own) < own for other in around | begun):
                gone[example.id] = NEAR_HELD_OUT
                continue
            given.setdefault(text, own)
            if any(mine in staying[other] for other in around if other in staying):
                gone[example.id] = NEAR_SAME_ANSWER
            else:
                staying[text].add(mine)
    return gone


def leakage(near: Nearness, split: Split = Split()) -> Leakage:
    """Counts what two splits share: groups, near pairs of requests, and what `split` adds.

    split: what else splits must not share, and whether time assigns rows.
    """
    splits, counts = near.splits, near.counts  # rows of each text in each split
    everywhere = counts.sum(axis=1)
    left, right = near.pairs.T
    across = (everywhere[left] * everywhere[right] - (counts[left] * counts[right]).sum(axis=1)).sum()
    across += (everywhere**2 - (counts**2).sum(axis=1)).sum() // 2  # a text is near itself
    touched = set[int]().union(*map(near.texts_around, near.outside))
    # Rows near an outside request, and others that learn an earlier answer to one.
    rows = (row for some in splits.values() for row in some)
    begun = (not near.outside.isdisjoint(near.begun(row)) and near.text(row) not in touched for row in rows)
    near_outside = int(everywhere[list(touched)].sum()) + sum(begun)
    labels = {
        name: _in_several(splits, name)
        for name in (split.groups if split.joined else ())
        if name != NEAR  # near pairs are counted as such
    }
    return Leakage(
        shared_groups=_in_several(splits),
        near_pairs=int(across),
        near_outside=near_outside,
        threshold=near.threshold,
        method=METHOD,
        shared=labels or None,
        not_older=_not_older(splits, split.time),
        beginnings=near.beginnings() or None,
    )


def _in_several(splits: Splits, label: str | None = None) -> int:
    """The number of groups, or of a label's values, that occur in more than one split."""
    first: dict[str, str] = {}
    rows = ((split, row) for split, some in splits.items() for row in some)
    values = ((split, row.group if label is None else row.labels.get(label, "")) for split, row in rows)
    return len({value for split, value in values if first.setdefault(value, split) != split})


def _not_older(splits: Splits, key: str | None) -> int | None:
    if key is None:
        return None
    newer, earliest = 0, "~"  # after every time
    for name in reversed(SPLITS):
        times = [example.labels.get(key, "~") for example in splits[name]]
        newer += sum(time >= earliest for time in times)
        earliest = min([earliest, *times])
    return newer


def clusters(near: Nearness, shown: int) -> NearClusters:
    """Clusters of rows of one split that are near each other, directly or through others; their answers differ.

    shown: how many of the largest are named.
    """
    groups: list[tuple[str, ...]] = []
    for place, examples in enumerate(near.splits.values()):
        here = near.counts[:, place]
        left, right = near.pairs[(here[near.pairs] > 0).all(axis=1)].T
        component = connected(left, right, len(near.counts))
        several = np.bincount(component, weights=here)[component] > 1
        together: defaultdict[int, list[str]] = defaultdict(list)
        for example in examples:
            text = near.text(example)
            if several[text]:
                together[int(component[text])].append(example.id)
        groups.extend(tuple(sorted(ids)) for ids in together.values())
    groups.sort(key=lambda ids: (-len(ids), ids))
    rows = [len(ids) for ids in groups]
    return NearClusters(
        clusters=len(groups), rows=sum(rows), largest=max(rows, default=0), examples=tuple(groups[:shown])
    )


class Nearness:
    """Which requests of the splits are equal or near.

    Distinct texts are numbered, so a request that occurs a thousand times is compared once. counts: rows of each text
    in each split, int64[texts, splits]. pairs: texts that are near, left < right, int64[pairs, 2]. outside: texts of
    requests that no split may hold, given as near_text. alone: whether no other text is near, only one row has the
    text, and no conversation begins with it, bool[texts].
    """

    def __init__(self, splits: Splits, threshold: float, outside: Iterable[str] = ()) -> None:
        self.splits, self.threshold = splits, threshold
        places: dict[str, int] = {}
        self._of: dict[str, int] = {}
        numbers = []
        for examples in splits.values():
            those = [places.setdefault(near_text(example.wording), len(places)) for example in examples]
            self._of.update(zip((example.id for example in examples), those, strict=True))
            numbers.append(those)
        self.outside = frozenset(places.setdefault(text, len(places)) for text in outside)
        self._begun = {
            example.id: _beginnings(example, places)
            for examples in splits.values()
            for example in examples
            if example.earlier
        }
        self.counts = np.stack(
            [np.bincount(np.array(those, dtype=np.int64), minlength=len(places)) for those in numbers], axis=1
        )
        self.pairs = near_pairs(list(places), threshold)
        ends = np.concatenate((self.pairs, self.pairs[:, ::-1]))
        ends = ends[np.argsort(ends[:, 0], kind="stable")]
        self._others = np.ascontiguousarray(ends[:, 1])
        self._start = np.searchsorted(ends[:, 0], np.arange(len(places) + 1))
        self.alone = (np.diff(self._start) == 0) & (self.counts.sum(axis=1) < 2)
        self.alone[list(self.outside.union(*self._begun.values()))] = False

    def text(self, example: Comparable) -> int:
        """The number of the example's request among the distinct texts."""
        return self._of[example.id]

    def texts_around(self, text: int) -> set[int]:
        """The texts near this one, and itself."""
        return {text, *self._others[self._start[text] : self._start[text + 1]].tolist()}

    def begun(self, example: Comparable) -> frozenset[int]:
        """The texts to which the example learns an answer before its last one."""
        return self._begun.get(example.id, frozenset())

    def beginnings(self) -> int:
        """How many rows learn an earlier answer to the request of a row in a later split."""
        count = 0
        for name, examples in self.splits.items():
            later = [place for place, other in enumerate(self.splits) if SPLITS.index(other) > SPLITS.index(name)]
            count += sum(bool(self.counts[list(self.begun(one))][:, later].any()) for one in examples if one.earlier)
        return count


def _beginnings(example: Comparable, places: Mapping[str, int]) -> frozenset[int]:
    turns = near_text(example.wording).split("\n")
    texts = ("\n".join(turns[:count]) for count in example.earlier)
    return frozenset(places[text] for text in texts if text in places)

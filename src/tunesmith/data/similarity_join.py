"""An exact set-similarity join: finds all pairs of texts with similar sets of trigrams.

Rows are grouped into classes of similar size, since two sets with a Jaccard similarity of at least t differ in size by
a factor of 1/t at most. For each class, the cheaper of two methods proposes the pairs to compare:

- The partition of Deng, Li, Wen, Feng, "An Efficient Partition Based Method for Exact Set Similarity Joins" (PVLDB
  9(4), 2015), section 3. Two near sets of sizes s <= l differ in at most d = s(1 - t)/t elements. If the universe of
  elements is cut into d + 1 parts, the two sets are equal in at least one part. Short rows rarely are by chance.
- All pairs, for long rows, which nearly always agree in some part.

Bitmaps rule out most pairs: sets whose bitmaps differ in b bits differ in at least b elements (Sandes, Teodoro, Melo,
"Bitmap Filter: Speeding up Exact Set Similarity Joins with Bitwise Operations", Information Systems 88, 2020). The
elements of the remaining pairs are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]
Numbers = NDArray[np.uint32]

_CELLS = 1 << 22  # numbers processed at once, which limits the memory
_PAIRS = 1 << 17  # pairs compared at once; they fit into the processor's cache
_CLASS = 1.12  # the sizes of a class differ by this factor at most, so one number of parts fits all
_COARSE = 4  # words of the fine bitmap per word of the coarse one, and bits of the fine one per element
_GATHERED = 4  # comparing one pair found by a part costs as much as comparing this many pairs in order
_MARGIN = 1e-9  # against rounding in the bounds that rule pairs out; the final test is exact


class TooMany(Exception):
    """There are more pairs than the caller allows."""


class _Sets(NamedTuple):
    """n rows sorted by size, with m trigrams in total.

    size: int64[n]; start: where the rows begin, and where the last one ends, int64[n + 1]; grams: the numbers of the
    trigrams, sorted within a row, uint32[m]; mixed: a 64-bit hash of each trigram, by its number.
    """

    start: Integers
    size: Integers
    grams: Numbers
    mixed: Bits


class _Class(NamedTuple):
    """Rows of similar size, numbered from `low`. The smaller row of a pair is among the first `small` rows.

    size: int64[rows]; marks: a hash of a row's elements in each part of the universe, uint64[rows, parts]; reach:
    int64[small], the number of rows from `low` that are not too large to be near; coarse, fine: bitmaps, uint64[rows,
    words].
    """

    low: int
    small: int
    threshold: float
    size: Integers
    marks: Bits
    reach: Integers
    coarse: Bits
    fine: Bits

    def near(self, left: Integers, right: Integers, bitmap: Bits) -> NDArray[np.bool_]:
        """Which pairs the bitmap does not rule out."""
        differing = np.bitwise_count(bitmap[left] ^ bitmap[right]).sum(axis=1, dtype=np.int64)
        fits: NDArray[np.bool_] = differing <= (self.size[left] + self.size[right]) * _apart(self.threshold) + _MARGIN
        return fits


def similar_pairs(texts: Sequence[str], threshold: float, most: int) -> Integers:
    """Index pairs (i < j) of texts whose trigrams have a Jaccard similarity of at least threshold: int64[pairs, 2].

    Sorted. A text of fewer than three characters counts as one trigram. threshold: in (0, 1]. Raises TooMany for more
    than `most` pairs.
    """
    if len(texts) < 2:
        return np.empty((0, 2), dtype=np.int64)
    size, grams, names = _trigrams(texts)
    order = np.argsort(size, kind="stable")
    sets = _arranged(size, grams, order, _mix(names))
    del grams
    known = np.empty(0, dtype=np.int64)
    pending: list[Integers] = []
    held = 0

    def near() -> Integers:
        pairs = _near(sets, np.concatenate([known, *pending]), threshold)
        if len(pairs) > most:
            raise TooMany
        return pairs

    for left, right in _candidates(sets, threshold):
        pending.append(left * len(texts) + right)
        held += len(left)
        if held > _CELLS + len(known):
            known, pending, held = near(), [], 0
    known = near()
    ends = np.sort(np.stack((order[known // len(texts)], order[known % len(texts)]), axis=1), axis=1)
    ordered: Integers = ends[np.lexsort((ends[:, 1], ends[:, 0]))]
    return ordered


def _apart(threshold: float) -> float:
    """The largest share of their elements, counted over both, in which near sets differ."""
    return (1 - threshold) / (1 + threshold)


def _trigrams(texts: Sequence[str]) -> tuple[Integers, Numbers, Bits]:
    """(size of each set, int64[n]; elements, uint32[m]; distinct trigrams, sorted, uint64[t]).

    The elements of the sets follow each other, sorted within a set. An element is the index of its trigram. A trigram
    holds its three code points, each plus one, in 63 bits, so that different trigrams have different numbers.
    """
    padded = [text if len(text) > 2 else text.ljust(3) for text in texts]
    missing = np.fromiter((max(0, 3 - len(text)) for text in texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(np.fromiter(map(len, padded), dtype=np.int64, count=len(padded)))
    sizes, blocks = [], []
    for first, last in _blocks(ends, _CELLS):
        points = np.frombuffer("".join(padded[first:last]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32) + 1
        for place in (1, 2, 3):  # 0 fills up short texts; no character has it
            lacks = np.flatnonzero(missing[first:last] >= place) + first
            points[ends[lacks] - (ends[first] - len(padded[first])) - place] = 0
        row = np.repeat(np.arange(last - first), np.diff(ends[first:last], prepend=ends[first] - len(padded[first])))
        whole = row[:-2] == row[2:]
        names, numbers = _numbered(points, whole)
        cells = _distinct(row[:-2][whole] * len(names) + numbers)
        owner = cells // len(names)
        sizes.append(np.bincount(owner, minlength=last - first))
        blocks.append((names, (cells - owner * len(names)).astype(np.uint32)))
    known = np.unique(np.concatenate([names for names, _ in blocks]))
    grams = np.concatenate([np.searchsorted(known, names).astype(np.uint32)[some] for names, some in blocks])
    return np.concatenate(sizes), grams, known


def _numbered(points: Numbers, whole: NDArray[np.bool_]) -> tuple[Bits, Integers]:
    """(the distinct trigrams of the code points, sorted; for each whole trigram its index among them).

    whole: which trigrams lie within one text. For few distinct letters, as in most scripts, a table of all possible
    trigrams is used, which is faster than sorting.
    """
    letters, spelt = np.unique(points), np.zeros(int(points.max()) + 1, dtype=np.int64)
    spelt[letters] = np.arange(len(letters))
    base, wide = len(letters), letters.astype(np.uint64)
    codes = spelt[points]
    every = ((codes[:-2] * base + codes[1:-1]) * base + codes[2:])[whole]
    if base**3 <= _CELLS:
        here = np.zeros(base**3, dtype=np.bool_)
        here[every] = True
        distinct, numbers = np.flatnonzero(here), (np.cumsum(here) - 1)[every]
    else:
        distinct, numbers = np.unique(every, return_inverse=True)
    first, second, third = (wide[distinct // base**power % base] for power in (2, 1, 0))
    return (first << np.uint64(42)) | (second << np.uint64(21)) | third, numbers


def _distinct(values: Integers) -> Integers:
    """The distinct values, sorted. numpy's unique hashes first, which is ten times slower here."""
    values = np.sort(values)
    first: Integers = values[np.diff(values, prepend=-1) != 0]
    return first


def _blocks(ends: Integers, most: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of rows whose sizes add up to at most `most`, or of one row. ends: the running sum."""
    first, before = 0, 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield first, last
        first, before = last, int(ends[last - 1])


def _arranged(size: Integers, grams: Numbers, order: Integers, mixed: Bits) -> _Sets:
    """The sets in the given order, block by block: the index of an element takes more memory than the element."""
    ordered = size[order]
    start, before = np.append(0, np.cumsum(ordered)), (np.cumsum(size) - size)[order]
    arranged = np.empty_like(grams)
    for first, last in _blocks(start[1:], _CELLS):
        shift = np.repeat((before - start[:-1])[first:last], ordered[first:last])
        arranged[start[first] : start[last]] = grams[shift + np.arange(start[first], start[last])]
    return _Sets(start=start, size=ordered, grams=arranged, mixed=mixed)


def _mix(values: Bits) -> Bits:
    """A 64-bit hash: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _candidates(sets: _Sets, threshold: float) -> Iterator[tuple[Integers, Integers]]:
    """Pairs (smaller, larger) of rows that may be near, some of them several times; every near pair is among them."""
    low = 0
    while low < len(sets.size):
        largest = int(int(sets.size[low]) * _CLASS)  # size of the smaller set of a pair
        kind = _class(sets, low, largest, threshold)
        for left, right in _compared(kind):
            fits = kind.near(left, right, kind.fine)
            yield left[fits] + low, right[fits] + low
        low += kind.small


def _class(sets: _Sets, low: int, largest: int, threshold: float) -> _Class:
    middle = int(np.searchsorted(sets.size, largest, side="right"))
    high = int(np.searchsorted(sets.size, int(largest / threshold + _MARGIN), side="right"))
    size = sets.size[low:high]
    parts = int(largest * (1 - threshold) / threshold + _MARGIN) + 1
    words = _COARSE * -(-largest // 64)
    fine = np.empty((high - low, words), dtype=np.uint64)
    marks = np.empty((high - low, parts), dtype=np.uint64)
    for first, last in _blocks(np.arange(1, high - low + 1) * (words * 64), _CELLS):
        own = np.repeat(np.arange(last - first), size[first:last])
        mixed = sets.mixed[sets.grams[sets.start[low + first] : sets.start[low + last]]]
        bits = np.zeros((last - first, words * 64), dtype=np.bool_)
        bits[own, (mixed >> np.uint64(32)) % np.uint64(words * 64)] = True
        fine[first:last] = np.packbits(bits, axis=1).view(np.uint64)
        marks[first:last] = _marks(own, mixed, (last - first, parts))
    return _Class(
        low=low,
        small=middle - low,
        threshold=threshold,
        size=size,
        marks=marks,
        reach=np.searchsorted(size, np.floor(size[: middle - low] / threshold + _MARGIN), side="right"),
        coarse=np.bitwise_or.reduce(fine.reshape(high - low, _COARSE, -1), axis=1),
        fine=fine,
    )


def _marks(own: Integers, mixed: Bits, shape: tuple[int, int]) -> Bits:
    """A hash of the elements that a row has in each part, uint64[rows, parts]. own: the row of each element.

    The elements are summed in sorted order, so equal elements give exactly the same sum.
    """
    rows, parts = shape
    part = ((mixed & np.uint64((1 << 32) - 1)) % np.uint64(parts)).astype(np.int64)
    weight = (mixed >> np.uint64(20)).astype(np.float64)
    sums = np.bincount(own * parts + part, weights=weight, minlength=rows * parts).astype(np.uint64)
    marks: Bits = sums.reshape(shape) ^ _mix(np.arange(1, parts + 1, dtype=np.uint64))
    return marks


def _compared(kind: _Class) -> Iterator[tuple[Integers, Integers]]:
    """The pairs of a class that the coarse bitmap does not rule out, by the method that compares fewer pairs."""
    every = int((kind.reach - np.arange(1, kind.small + 1)).sum())
    parts = kind.marks.shape[1]
    width = min(parts, max(1, _CELLS // len(kind.size)))
    for start in range(0, parts, width):
        owner, after = _sharing(kind, start, min(parts, start + width))
        if start == 0 and int(after.sum()) * parts / width * _GATHERED > every:
            yield from _all_with_all(kind)
            return
        for place, follower in _pairs_of_groups(after):
            left, right = owner[place], owner[follower]
            fits = (right < kind.reach[left]) & kind.near(left, right, kind.coarse)
            yield left[fits], right[fits]


def _sharing(kind: _Class, first: int, last: int) -> tuple[Integers, Integers]:
    """(owner, after) for the rows sorted by their marks in parts first to last.

    owner: the row at each place. after: how many of the following places have the same mark; 0 for a row that is not
    the smaller one of any pair.
    """
    marks = kind.marks[:, first:last].ravel()
    order = np.argsort(marks, kind="stable")
    marks, owner = marks[order], order // (last - first)
    heads = np.flatnonzero(np.concatenate(([True], marks[1:] != marks[:-1])))
    length = np.diff(heads, append=len(marks))
    after = np.repeat(heads + length, length) - np.arange(len(marks)) - 1
    return owner, np.where(owner < kind.small, after, 0)


def _pairs_of_groups(after: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of each place with each of the `after` places that follow it, about _PAIRS at a time."""
    places = np.flatnonzero(after)
    for first, last in _blocks(np.cumsum(after[places]), _PAIRS):
        some, many = places[first:last], after[places[first:last]]
        left = np.repeat(some, many)
        yield left, left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(many) - many, many)


def _all_with_all(kind: _Class) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of each smaller row with the later rows in its reach that the coarse bitmap does not rule out.

    Where the coarse bitmap rules out few pairs, the fine one is applied to all: that is faster than pair by pair.
    """
    bitmaps = [np.ascontiguousarray(bitmap.T) for bitmap in (kind.coarse, kind.fine)]
    allowed = kind.size * _apart(kind.threshold) + _MARGIN / 2
    for first in range(0, kind.small, 128):
        last = min(first + 128, kind.small)
        for begin in range(first + 1, int(kind.reach[last - 1]), _PAIRS // 128):
            end = min(begin + _PAIRS // 128, int(kind.reach[last - 1]))
            most = allowed[first:last, None] + allowed[None, begin:end]
            for columns in bitmaps:
                differing = np.zeros((last - first, end - begin), dtype=np.uint32)
                for column in columns:
                    differing += np.bitwise_count(column[first:last, None] ^ column[None, begin:end])
                left, right = np.nonzero(differing <= most)
                if len(left) * _GATHERED < most.size:
                    break
            left, right = left + first, right + begin
            fits = (right > left) & (right < kind.reach[left])
            yield left[fits], right[fits]


def _near(sets: _Sets, pairs: Integers, threshold: float) -> Integers:
    """The distinct pairs (left row * n + right row) that are near. Their shared elements are counted.

    The Jaccard similarity is the number of shared elements divided by the number of all elements.
    """
    pairs = _distinct(pairs)
    left, right = pairs // len(sets.size), pairs % len(sets.size)
    near = np.zeros(len(pairs), dtype=np.bool_)
    for first, last in _blocks(np.cumsum(sets.size[left] + sets.size[right]), _CELLS):
        both = np.concatenate((left[first:last], right[first:last]))
        many = sets.size[both]
        elements = np.repeat(sets.start[both] - (np.cumsum(many) - many), many) + np.arange(int(many.sum()))
        pair = np.repeat(np.tile(np.arange(last - first), 2), many)
        cells = np.sort(pair * len(sets.mixed) + sets.grams[elements])  # a shared element occurs twice
        shared = np.bincount(cells[:-1][cells[1:] == cells[:-1]] // len(sets.mixed), minlength=last - first)
        near[first:last] = shared / (many[: last - first] + many[last - first :] - shared) >= threshold
    return pairs[near]

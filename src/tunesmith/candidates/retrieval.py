"""Finds the texts most similar to a request: by words, by embeddings, or by the ranks of both. And chooses the training
examples that are shown before every request.

Of documents with labels, a caller's request is compared only with passages that the caller may see.

By words: BM25 (Robertson and Zaragoza 2009, as bm25s computes it). By vectors: cosine of MiniLM's sentence vectors.
Fused: reciprocal rank fusion with k = 60 (Cormack, Clarke and Buettcher 2009).
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.access import Caller, Labels
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation
from tunesmith.data.dataset import Example
from tunesmith.data.documents import Passage

_WORD = re.compile(r"\w+")
_FUSION = 60
_COUNTED_WORDS = 4096
_VIEWS = 64  # indexes of passages that are kept, one for each set of labels that a caller may see

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]  # texts -> rows of length 1


class Index:
    """An index of texts. embed: makes the embeddings for `dense` and `fused`. vectors: of the texts, where known."""

    def __init__(
        self, texts: Sequence[str], by: str = "bm25", embed: Embed | None = None, vectors: Vectors | None = None
    ) -> None:
        self._by, self._embed = by, embed
        self._words = [words(text) for text in texts]
        self._sets = [frozenset(each) for each in self._words]
        self._known = frozenset[str]().union(*self._sets)
        self._index = _index_by_words(self._words)
        self._vectors = vectors if vectors is not None or embed is None or by == "bm25" else embed(texts)

    def nearest(self, text: str, k: int, skip: Set[int] = frozenset()) -> list[int]:
        """Positions of the k texts with the highest scores, the best last, next to the request in the prompt.

        skip: positions to leave out.
        """
        order = [place for place in self._ranked(text, k + len(skip)) if place not in skip]
        return list(reversed(order[:k]))

    def similarity(self, text: str) -> float:
        """Jaccard similarity (0 to 1) of a request's words to those of the best text by BM25."""
        return _likeness(frozenset(words(text)), self._sets[_best(self._by_word(text), 1)[0]])

    def _by_word(self, text: str) -> NDArray[np.floating]:
        known = [word for word in words(text) if word in self._known]
        if len(known) > _COUNTED_WORDS:  # each then counts once: a word costs as much as there are texts with it
            known = list(dict.fromkeys(known))
        # bm25s fails on a text without any known word.
        return self._index.get_scores(known) if known else np.zeros(len(self._words))

    def _ranked(self, text: str, k: int) -> list[int]:
        by_words = self._by_word(text) if self._by != "dense" else None
        if self._embed is None or self._vectors is None:
            assert by_words is not None
            return _best(by_words, k)
        # Six decimals, so that rounding differences between machines do not change the order.
        by_vectors = np.round(self._vectors @ self._embed([text])[0], 6)
        if by_words is None:
            return _best(by_vectors, k)
        fused = np.zeros(len(self._words))
        for scores in (by_words, by_vectors):
            for rank, place in enumerate(_best(scores, len(scores)), start=1):
                fused[place] += 1.0 / (_FUSION + rank)
        return _best(fused, k)


class PassageIndex:
    """Passages, of which each caller finds those that the labels let them see. Thread-safe.

    Callers who see the same passages share an index, and it holds nothing else. So neither the ranks nor the numbers
    behind them (how many texts hold a word, how long texts are) depend on a passage that the caller may not see.
    """

    def __init__(self, passages: Sequence[Passage], by: str = "bm25", embed: Embed | None = None) -> None:
        self._passages, self._by, self._embed = passages, by, embed
        self._labels = frozenset(passage.labels for passage in passages)
        self._vectors: Vectors | None = None
        self._views: dict[frozenset[Labels], tuple[list[Passage], Index]] = {}
        self._building = threading.Lock()

    def nearest(self, text: str, k: int, caller: Caller) -> list[Passage]:
        """The k best passages among those that the caller may see, the best last. Fewer where the caller sees fewer."""
        visible = frozenset(labels for labels in self._labels if labels.visible_to(caller))
        if not visible:
            return []
        passages, index = self._views.get(visible) or self._view(visible)
        return [passages[place] for place in index.nearest(text, k)]

    def _view(self, visible: frozenset[Labels]) -> tuple[list[Passage], Index]:
        with self._building:
            if visible in self._views:
                return self._views[visible]
            places = [place for place, passage in enumerate(self._passages) if passage.labels in visible]
            vectors = None
            if self._embed is not None and self._by != "bm25":
                if self._vectors is None:
                    self._vectors = self._embed([_indexed(passage) for passage in self._passages])
                vectors = self._vectors[places]
            passages = [self._passages[place] for place in places]
            made = passages, Index([_indexed(passage) for passage in passages], self._by, self._embed, vectors)
            if len(self._views) >= _VIEWS:
                self._views.pop(next(iter(self._views)))
            self._views[visible] = made
            return made


def _indexed(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}".strip()


def example_index(examples: Sequence[Example], by: str = "bm25", embed: Embed | None = None) -> Index:
    """An index of training examples by the words of their requests."""
    return Index([last_request(example.messages) for example in examples], by, embed)


def last_request(messages: Conversation) -> str:
    """The last user message. Raises UsageError where there is none."""
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise UsageError("there is no user message to answer", where="messages")


def words(text: str) -> list[str]:
    """The words of a text in lower case; one empty word where there is none."""
    return _WORD.findall(text.lower()) or [""]


def _index_by_words(texts: Sequence[Sequence[str]]) -> Any:
    """The BM25 index of texts. Imported here: bm25s loads SciPy, and most commands have no index."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each index as DEBUG, in a server too
    index = bm25s.BM25()
    index.index(texts, show_progress=False)
    return index


def _best(scores: NDArray[np.floating], k: int) -> list[int]:
    # A stable sort, so that equal scores keep the texts' order on every platform.
    return [int(place) for place in np.argsort(-scores, kind="stable")[:k]]


def choose_shots(examples: Sequence[Example], count: int, choose: str = "fixed") -> list[Example]:
    """count training examples, in one of two ways.

    fixed: one of each group before a second of any. Groups and rows are ordered by hashed names, so that a new row
    rarely changes the choice. diverse: the first of those, then repeatedly the example whose request and answer share
    the fewest words with those chosen (farthest-first traversal, Gonzalez 1985, by Jaccard distance).
    """
    if choose == "diverse":
        return _farthest_first(examples, count)
    by_group: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda one: _order(one.id)):
        by_group[example.group].append(example)
    chosen: list[Example] = []
    turn = 0
    ordered = sorted(by_group, key=_order)
    while len(chosen) < min(count, len(examples)):
        chosen += [by_group[group][turn] for group in ordered if len(by_group[group]) > turn][: count - len(chosen)]
        turn += 1
    return chosen


def draw_shots(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """count random training examples. The same seed gives the same examples."""
    ordered = sorted(examples, key=lambda one: _order(one.id))
    return random.Random(seed).sample(ordered, min(count, len(ordered)))


def _farthest_first(examples: Sequence[Example], count: int) -> list[Example]:
    ordered = sorted(examples, key=lambda one: _order(one.id))
    sets = [frozenset(words(f"{last_request(one.messages)} {one.answer}")) for one in ordered]
    if not ordered or count < 1:
        return []
    chosen = [0]
    nearest = [_likeness(sets[0], other) for other in sets]
    while len(chosen) < min(count, len(ordered)):
        nearest = [2.0 if place in chosen else value for place, value in enumerate(nearest)]
        place = min(range(len(ordered)), key=lambda each: (nearest[each], each))
        chosen.append(place)
        nearest = [max(value, _likeness(sets[place], other)) for value, other in zip(nearest, sets, strict=True)]
    return [ordered[place] for place in chosen]


def _likeness(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Finding the training examples most like a request, by BM25 (Robertson and Zaragoza 2009, as bm25s computes it)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import numpy as np

from tunesmith.data.dataset import Example

_WORD = re.compile(r"\w+")


class Index:
    """Training examples by the words of their requests."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)
        self._words = [_words(request_text(example)) for example in self._examples]
        self._sets = [set(words) for words in self._words]
        self._index = bm25s.BM25()
        self._index.index(self._words, show_progress=False)

    def nearest(self, text: str, k: int) -> list[Example]:
        """The k examples of the highest score, the best last: it stands next to the request in the prompt."""
        return [self._examples[place] for place in reversed(self._best(text, k))]

    def similarity(self, text: str) -> float:
        """Jaccard similarity (0 to 1) of a request's words to those of the example BM25 finds first."""
        words = set(_words(text))
        place = self._best(text, 1)[0]
        union = words | self._sets[place]
        return len(words & self._sets[place]) / len(union) if union else 0.0

    def _best(self, text: str, k: int) -> list[int]:
        scores = self._index.get_scores(_words(text))
        # A stable sort: equal scores keep the rows' order, whatever the platform.
        return [int(place) for place in np.argsort(-scores, kind="stable")[:k]]


def request_text(example: Example) -> str:
    """What the user asked last."""
    return next(message.content for message in reversed(example.messages) if message.role == "user")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower()) or [""]

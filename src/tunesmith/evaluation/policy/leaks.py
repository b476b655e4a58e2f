"""Finds a policy's requests in the rows, prompt and documents of a candidate: there, keeping a rule is memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.messages import Message
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import load_dataset
from tunesmith.data.documents import Documents
from tunesmith.data.duplicates import learned_parts, near_text, request_text
from tunesmith.evaluation.policy.requests import PolicyItem, compared_text, unchanged_id
from tunesmith.store.store import Store

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_TOGETHER = 2_000  # rows that are compared at the same time
NEAR = 0.8  # Jaccard similarity of trigrams, as for near duplicates of rows
_FEWEST_WORDS = 3  # of a request that is found in a prompt or passage; shorter ones may be a topic that it names
# Words; of scripts without spaces between them two characters.
_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{2}|\w+", regex.V1)
_SIGNS = regex.compile(r"\W*[^\s\w]\W*")


def leaked(store: Store, candidate: Candidate, items: Sequence[PolicyItem]) -> frozenset[str]:
    """Ids of the items whose request the candidate has seen in training, or sees in its prompt or by retrieval.

    Requests are compared folded and without system turns, and count as seen where they are near a row's, or where the
    last user turn stands in the prompt or in a passage of the documents. All forms of a request count as seen
    where one is.
    """
    learned = [part for messages in _learned(store, candidate) for part in (messages, *learned_parts(messages))]
    seen = {near_text(request_text(part)) for part in learned}
    flags = near_any([compared_text(item.request) for item in items], sorted(seen)) | _read(store, candidate, items)
    known = {unchanged_id(item) for item, near in zip(items, flags, strict=True) if near}
    return frozenset(item.id for item in items if unchanged_id(item) in known)


def near_any(texts: Sequence[str], others: Sequence[str]) -> NDArray[np.bool_]:
    """For each text, whether one of the others is equal, or near: at least NEAR in Jaccard similarity of trigrams."""
    own = [_trigrams(text) for text in texts]
    numbers = {gram: number for number, gram in enumerate(frozenset[str]().union(*own))}
    near = np.zeros(len(texts), dtype=bool)
    if not numbers or not others:
        return near
    wanted, sizes = _matrix(own, numbers), _sizes(own)
    for start in range(0, len(others), _TOGETHER):
        theirs = [_trigrams(text) for text in others[start : start + _TOGETHER]]
        shared = (wanted @ _matrix(theirs, numbers).T).tocoo()
        union = sizes[shared.row] + _sizes(theirs)[shared.col] - shared.data
        near[shared.row[shared.data >= NEAR * union]] = True
    return near


def _read(store: Store, candidate: Candidate, items: Sequence[PolicyItem]) -> NDArray[np.bool_]:
    """For each item, whether its last user turn stands in the prompt or in a passage between signs or line ends.

    "Never open the vault." does not hold the request "open the vault", but "Q: Open the vault! A: No." does.
    """
    passages = [] if candidate.documents is None else Documents(store, candidate.documents).passages
    texts = [candidate.prompt, *(passage.text for passage in passages)]
    whole = "".join(map(_parts, (*texts, *(text.replace("\n", " ") for text in texts))))  # lines may be wrapped
    asked = [item.request[-1].content for item in items]
    return np.array([len(_WORD.findall(fold(text))) >= _FEWEST_WORDS and _parts(text) in whole for text in asked], bool)


def _parts(text: str) -> str:
    """The folded text with a mark in place of each line end and each run of other signs than letters and digits."""
    folded = "|".join(map(fold, text.splitlines()))
    return f"|{_SIGNS.sub('|', folded).strip('|')}|"


def _learned(store: Store, candidate: Candidate) -> list[tuple[Message, ...]]:
    """The conversations that a candidate learned from, retrieves from or shows."""
    datasets = set[str]()
    if candidate.training is not None:
        datasets.add(store.record(candidate.training, kind="training").parents["dataset"])
    looks_up = candidate.method != "model" or (candidate.retrieve is not None and candidate.documents is None)
    if looks_up and candidate.dataset is not None:
        datasets.add(candidate.dataset)
    rows = [row.messages for digest in sorted(datasets) for row in load_dataset(store, digest).examples("train")]
    return [*rows, *candidate.shots]


def _sizes(sets: Sequence[frozenset[str]]) -> NDArray[np.int64]:
    return np.array([len(grams) for grams in sets], dtype=np.int64)


def _trigrams(text: str) -> frozenset[str]:
    return frozenset(text[place : place + 3] for place in range(max(1, len(text) - 2)))


def _matrix(sets: Sequence[frozenset[str]], numbers: dict[str, int]) -> csr_array:
    from scipy.sparse import csr_array

    columns = [sorted(numbers[gram] for gram in grams if gram in numbers) for grams in sets]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.array([place for each in columns for place in each], dtype=np.int64)
    return csr_array((np.ones(len(flat), dtype=np.int64), flat, ends), shape=(len(sets), len(numbers)))

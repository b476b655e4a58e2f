"""Finds a policy's requests in the rows, prompt and documents of a candidate: there, keeping a rule is memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

import numpy as np
import regex
from numpy.typing import NDArray

from tunesmith.candidates.candidate import Candidate
from tunesmith.core.messages import Message
from tunesmith.core.text.folding import fold
from tunesmith.data.dataset import load_dataset
from tunesmith.data.documents import Documents
from tunesmith.data.duplicates import learned_parts, near_text, request_text
from tunesmith.data.similarity_join import similar_pairs
from tunesmith.evaluation.policy.requests import PolicyItem, compared_text, unchanged_id
from tunesmith.store.store import Store

_TOGETHER = 2_000  # requests, and rows, that are compared at the same time: of equal texts every pair is found
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
    near = np.zeros(len(texts), dtype=bool)
    for first, start in product(range(0, len(texts), _TOGETHER), range(0, len(others), _TOGETHER)):
        own = texts[first : first + _TOGETHER]
        pairs = similar_pairs([*own, *others[start : start + _TOGETHER]], NEAR, sys.maxsize)
        across = (pairs[:, 0] < len(own)) & (pairs[:, 1] >= len(own))
        near[first + pairs[across, 0]] = True
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

"""Repeated rows: exactly after normalisation, and nearly by the Jaccard similarity of character trigrams.

Character trigrams work on requests of a few words, where word n-grams see nothing. Near pairs are found by an exact
join: none is missed, none is made up.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHOD = "character trigrams of the words, exact set-similarity join"
_PAIRS_EACH = 100
_WORD = re.compile(r"\w+")
_SENTENCE_MARKS = " .,;:!?\u2026¿¡\"'\u201c\u201d\u2018\u2019«»"


def folded(text: str) -> str:
    """The text in one Unicode form, case and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalise(text: str) -> str:
    """What two spellings of the same words share: they are folded, without sentence marks at the ends."""
    text = folded(text)
    return text.strip(_SENTENCE_MARKS) or text


def request_text(messages: Sequence[Message]) -> str:
    """The turns before the answer as one normalised text. The system turn, often the same in all rows, is left out."""
    return "\n".join(normalise(turn.text) for turn in messages[:-1] if turn.role != "system")


def request_key(messages: Sequence[Message]) -> str:
    """What two spellings of the same request share, turn by turn, with the tools that were on offer."""
    return json.dumps([[turn.role, normalise(turn.text), turn.tools or ""] for turn in messages])


def near_text(request: str) -> str:
    """What nearness is told by: the words of a normalised request, a space at either end of each turn.

    The spaces make the first and last letters of a turn count as much as those between; marks do not count at all,
    unless a turn has no words.
    """
    return "\n".join(f" {' '.join(_WORD.findall(turn)) or turn} " for turn in request.split("\n"))


# How a record may say that nearness was told -> the text whose trigrams are compared. The second is of earlier records:
# their pairs were proposed by MinHash, and are found exactly when they are looked for again.
METHODS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {METHOD: near_text, "character trigrams, MinHash LSH proposes, exact Jaccard decides": str}
)


def shingles(text: str) -> frozenset[str]:
    """The character trigrams of a text; of a shorter one the text itself."""
    return frozenset(text[start : start + 3] for start in range(max(1, len(text) - 2)))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared over all, in [0, 1]."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def answer_key(answer: str) -> str:
    """What two spellings of the same answer share: of JSON its canonical form, of prose the words as they are."""
    try:
        return canonical(json.loads(answer)).decode() if answer.lstrip().startswith(("{", "[")) else answer.strip()
    except (ValueError, RecursionError, UsageError):
        return answer.strip()


def near_pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """near_ends as a list, for where the pairs are few."""
    return [(left, right) for left, right in near_ends(texts, threshold).tolist()]


def near_ends(texts: Sequence[str], threshold: float) -> NDArray[np.int64]:
    """The pairs (i < j) of texts whose trigrams have a Jaccard similarity of at least threshold, sorted.

    int64[pairs, 2]. None is missed. texts should be distinct: n equal ones make n(n - 1) / 2 pairs. Raises Refused
    where the pairs outgrow the texts so far that the similarity cannot tell one row from another.
    """
    from tunesmith.data.splitting.similarity_join import TooMany, similar_pairs

    try:
        return similar_pairs(texts, threshold, _PAIRS_EACH * len(texts))
    except TooMany:
        raise Refused(
            f"the requests are so alike that a row has over {_PAIRS_EACH} others near it at {threshold}",
            where="data.duplicates.near",
            fix="move the text that all requests share into a system turn, or raise near, or set it to null",
        ) from None

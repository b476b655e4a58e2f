"""Repeated rows: exactly after normalisation, and nearly by the Jaccard similarity of character trigrams.

Character trigrams work on requests of a few words, where word n-grams see nothing. rensa's MinHash proposes pairs; the
exact similarity decides, so no pair is reported that is not one. Bands are chosen so that a pair at the threshold is
missed with a chance of at most MISS, and a closer pair with less.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message

MISS = 1e-4
METHOD = "character trigrams, MinHash LSH proposes, exact Jaccard decides"
_ROWS_TARGET = 0.3  # a band of r hashes lets a pair at the threshold t pass with t**r near this
_PAIRS_EACH = 100
_BATCH = 1024
_SENTENCE_MARKS = " .,;:!?\u2026¿¡\"'\u201c\u201d\u2018\u2019«»"


def normalise(text: str) -> str:
    """What two spellings of the same words share: Unicode form, case, spacing, sentence marks at the ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(_SENTENCE_MARKS) or text


def request_text(messages: Sequence[Message]) -> str:
    """The turns before the answer as one normalised text. The system turn, often the same in all rows, is left out."""
    return "\n".join(normalise(turn.text) for turn in messages[:-1] if turn.role != "system")


def request_key(messages: Sequence[Message]) -> str:
    """What two spellings of the same request share, turn by turn, with the tools that were on offer."""
    return json.dumps([[turn.role, normalise(turn.text), turn.tools or ""] for turn in messages])


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
    """The index pairs (i < j) of texts whose trigrams have a Jaccard similarity of at least threshold, sorted.

    texts should be distinct: n equal ones make n(n - 1) / 2 pairs. Raises Refused where the pairs outgrow the texts
    so far that the similarity cannot tell one row from another.
    """
    sets = [shingles(text) for text in texts]
    pairs: list[tuple[int, int]] = []
    for left, right in _proposed(sets, threshold):
        small, large = sorted((len(sets[left]), len(sets[right])))
        # Sizes further apart than the threshold allow no such similarity.
        if small / large >= threshold and jaccard(sets[left], sets[right]) >= threshold:
            pairs.append((left, right))
            if len(pairs) > _PAIRS_EACH * len(texts):
                raise Refused(
                    f"the requests are so alike that a row has over {_PAIRS_EACH} others near it at {threshold}",
                    where="data.duplicates.near",
                    fix="move the text that all requests share into a system turn, or raise near, or set it to null",
                )
    return sorted(pairs)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, hashes in a band) such that a pair at the threshold is missed with a chance of at most MISS.

    A pair of similarity s shares a band of r hashes with chance s**r, and one of b bands with 1 - (1 - s**r)**b
    (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4).
    """
    if threshold >= 1:
        return 1, 8
    rows = max(1, round(math.log(_ROWS_TARGET) / math.log(threshold)))
    return math.ceil(math.log(MISS) / math.log1p(-(threshold**rows))), rows


def _proposed(sets: Sequence[Iterable[str]], threshold: float) -> Iterator[tuple[int, int]]:
    if len(sets) < 2:
        return
    from rensa import RMinHash, RMinHashLSH

    count, rows = bands(threshold)
    hashes = RMinHash.from_token_sets([sorted(one) for one in sets], count * rows, 1)
    index = RMinHashLSH(threshold, count * rows, count)
    index.insert_many(hashes)
    for start in range(0, len(sets), _BATCH):  # in batches: the answers of all at once may not fit the memory
        for left, found in enumerate(index.query_all(hashes[start : start + _BATCH]), start=start):
            yield from ((left, right) for right in found if right > left)

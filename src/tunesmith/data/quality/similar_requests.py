"""Two further looks at rows: in which language a text is, and which requests say the same in other words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import UsageError

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

# Cosine of two MiniLM vectors. Of 6,000 requests each of CLINC150 and BANKING77, 99.4% and 97.1% of the pairs from 0.9
# on are of one intent (0.7 and 9.5 of a million pairs of two intents are there), with 79% and 88% of the twins, which
# differ in a few letters. From 0.8 on it is 97.8% and 88.9%: intents mix. `benchmarks/alike.py` repeats it.
ALIKE_AT = 0.9
_SURE = 0.95
_LETTERS = 25  # a text of fewer is of no language that could be told
_COMMON = 0.05  # a language of this share of the texts is one of the dataset's own
_BLOCK = 1024
_PAIRS = 4_000_000  # kept before they are merged: 64 MB


def foreign(texts: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Place -> language of the texts that are in another language than nearly all others, and how many are in each.

    Languages as ISO 639-1 codes, by py3langid (Lui, Baldwin, "langid.py", ACL 2012), where it is sure. Short texts and
    those it is not sure of are counted as "?". Raises UsageError where the extra `quality` is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UsageError(f"telling languages needs {error.name}", fix='pip install "tunesmith[quality]"') from error
    judge = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    told = []
    for text in texts:
        language, sure = judge.classify(text) if sum(map(str.isalpha, text)) >= _LETTERS else ("?", 1.0)
        told.append(language if sure >= _SURE else "?")
    counts = Counter(told)
    known = sum(many for language, many in counts.items() if language != "?")
    own = {language for language, many in counts.items() if many >= _COMMON * known}
    return {place: one for place, one in enumerate(told) if one not in own | {"?"}}, dict(sorted(counts.items()))


def alike(texts: Sequence[str], embed: Embed, at_least: float = ALIKE_AT) -> list[list[int]]:
    """Clusters of distinct texts that mean the same: places, each joined to another by a cosine of at least at_least.

    Every pair is compared, in blocks, so the time grows with the square of the texts. Memory does not: beside the
    vectors ([texts, width], float32) it holds a block of products and at most _PAIRS pairs, which are then merged into
    the clusters so far. The largest first.
    """
    vectors = np.ascontiguousarray(embed(texts), dtype=np.float32)
    labels = np.arange(len(texts))
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    waiting = 0
    for first in range(0, len(texts), _BLOCK):
        for second in range(first, len(texts), _BLOCK):
            one, other = vectors[first : first + _BLOCK], vectors[second : second + _BLOCK]
            rows, columns = np.nonzero(one @ other.T >= at_least)
            pairs.append((rows + first, columns + second))
            waiting += len(rows)
            if waiting > _PAIRS:
                labels, pairs, waiting = _merged(labels, pairs), [], 0
    clusters: defaultdict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(_merged(labels, pairs).tolist()):
        clusters[label].append(place)
    return sorted((some for some in clusters.values() if len(some) > 1), key=lambda some: (-len(some), some))


def _merged(
    labels: NDArray[np.int64], pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> NDArray[np.int64]:
    """Text -> number of its cluster, after each pair's clusters have become one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return labels
    size = len(labels)
    ends = tuple(labels[np.concatenate(side)] for side in zip(*pairs, strict=True))
    _, merged = connected_components(coo_array((np.ones(len(ends[0]), bool), ends), shape=(size, size)), directed=False)
    return merged[labels].astype(np.int64)  # type: ignore[no-any-return]

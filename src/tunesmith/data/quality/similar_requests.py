"""Finds requests that mean the same in other words, by the similarity of their embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.splitting.groups import connected

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

# Cosine of two MiniLM vectors. Measured by `benchmarks/alike.py` on 6,000 requests each of CLINC150 and BANKING77: of
# the pairs with a cosine of at least 0.9, 99.4% and 97.1% have one intent, and 79% and 88% of the near-identical twins
# are among them. From 0.8 on only 97.8% and 88.9% of the pairs have one intent.
ALIKE_AT = 0.9
_BLOCK = 1024
_PAIRS = 4_000_000  # collected before they are merged: 64 MB


def alike(texts: Sequence[str], embed: Embed, at_least: float = ALIKE_AT) -> list[list[int]]:
    """Clusters of distinct texts that mean the same, as lists of indices, the largest first.

    Each text of a cluster has a cosine of at least at_least to another one. Every pair is compared, in blocks, so the
    time grows with the square of the number of texts. Memory holds the vectors ([texts, width], float32), one block of
    products and at most _PAIRS pairs, which are then merged into the clusters.
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
    """The cluster number of each text after the clusters of each pair are merged: int64[texts]."""
    if not pairs:
        return labels
    left, right = (labels[np.concatenate(side)] for side in zip(*pairs, strict=True))
    return connected(left, right, len(labels))[labels].astype(np.int64)

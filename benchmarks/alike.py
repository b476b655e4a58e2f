"""Which cosine of two requests' vectors says that they mean the same: what `data quality --alike` goes by, measured.

    python benchmarks/alike.py [FOLDER] [--rows 6000]

FOLDER holds `clinc150` and `banking77`, by default `../shared/data`. All pairs of --rows different requests, drawn by
lot, are compared. Two requests of one intent need not mean the same, but two that mean the same are of one intent: the
share of the pairs from a cosine on that are of one intent is the highest precision that it can have. What it finds is
measured on twins: pairs of one intent that differ in a few letters (Jaccard of their trigrams at 0.8 or more).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from corpora import corpora
from leakage import FOLDER, NEAR, Row, words
from tunesmith.data.duplicates import near_pairs
from tunesmith.data.quality.flags import ALIKE_AT, alike
from tunesmith.models.embedding import find_embedder

BOUNDS = (0.70, 0.75, 0.80, 0.85, 0.875, 0.90, 0.925, 0.95, 0.975)
BLOCK = 1024


def counted(vectors: np.ndarray, intents: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Pairs at or above each bound, of one intent and of two; and how many pairs of either kind there are."""
    same, other = (np.zeros(len(BOUNDS), dtype=np.int64) for _ in range(2))
    of_one = of_two = 0
    for first in range(0, len(vectors), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(vectors)))
        cosines = vectors[rows] @ vectors.T
        later = np.arange(len(vectors))[None] > rows[:, None]  # each pair once, none with itself
        one = (intents[rows, None] == intents[None]) & later
        of_one += int(one.sum())
        of_two += int(later.sum() - one.sum())
        for place, bound in enumerate(BOUNDS):
            above = (cosines >= bound) & later
            same[place] += (above & one).sum()
            other[place] += (above & ~one).sum()
    return same, other, of_one, of_two


def twin_cosines(rows: list[Row], vectors: np.ndarray) -> np.ndarray:
    """The cosines of pairs of one intent that differ in a few letters."""
    texts: dict[str, int] = {}
    for place, (request, _) in enumerate(rows):
        texts.setdefault(words(request), place)
    places = list(texts.values())
    pairs = [(places[one], places[other]) for one, other in near_pairs(list(texts), NEAR).tolist()]
    kept = [(one, other) for one, other in pairs if rows[one][1] == rows[other][1]]
    return np.array([vectors[one] @ vectors[other] for one, other in kept], dtype=np.float32)


def show(name: str, rows: list[Row]) -> None:
    texts = [request for request, _ in rows]
    began = time.perf_counter()
    vectors = find_embedder().embed(texts)
    embedded = time.perf_counter() - began
    intents = np.unique([intent for _, intent in rows], return_inverse=True)[1]
    same, other, of_one, of_two = counted(vectors, intents)
    twins = twin_cosines(rows, vectors)
    print(f"\n{name}: {len(rows)} requests, {of_one} pairs of one intent, {of_two} of two, {len(twins)} twins;")
    print(f"vectors in {embedded:.0f} s ({len(rows) / embedded:.0f} a second)")
    print("cosine   pairs   of one intent   of pairs of two intents   twins found")
    for place, bound in enumerate(BOUNDS):
        above = same[place] + other[place]
        right = f"{same[place] / above:.1%}" if above else "-"
        print(
            f"{bound:<9}{above:<8}{right:<16}{other[place] / of_two * 1e6:<9.1f}in a million      "
            f"{(twins >= bound).mean():.1%}"
        )
    began = time.perf_counter()
    clusters = alike(texts, lambda _: vectors)
    print(
        f"from {ALIKE_AT} on: {sum(map(len, clusters))} requests in {len(clusters)} clusters, the largest of "
        f"{max(map(len, clusters), default=0)}; {time.perf_counter() - began:.1f} s for all pairs"
    )
    draw = Random(0)
    between = [
        (float(cosine), texts[one], texts[two])
        for one, two in (draw.sample(some, 2) for some in clusters if len(some) > 1)
        if (cosine := vectors[one] @ vectors[two]) >= ALIKE_AT
    ]
    for cosine, one, two in draw.sample(between, min(8, len(between))):
        print(f"  {cosine:.3f}  {one!r}  {two!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--rows", type=int, default=6000)
    chosen = parser.parse_args()
    for corpus in corpora(chosen.folder):
        if corpus.name in ("banking77", "clinc150"):
            # "oos" is what is of no intent. The same request twice is an exact duplicate, which a build removes.
            rows = {" ".join(text.split()).lower(): (text, intent) for text, intent in [*corpus.train, *corpus.held]}
            kept = [row for row in rows.values() if row[1] != "oos"]
            show(corpus.name, Random(0).sample(kept, min(chosen.rows, len(kept))))


if __name__ == "__main__":
    main()

"""Near duplicates among real requests: ours beside rensa and datasketch, with brute force as the truth.

    python benchmarks/duplicates.py [FOLDER] [--threshold 0.8] [--runs 5]

FOLDER holds the JSON files of the SNIPS corpus (https://github.com/sonos/nlu-benchmark), by default
`../shared/data/snips`. All see the same trigram sets of the words of the same rows, repeated ones among them; the time
is that from texts to pairs. rensa and datasketch report what their index proposes, as their users get it. Needs the
dependency group `bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy import sparse

from leakage import FOLDER
from tunesmith.data.duplicates import near_text, normalise
from tunesmith.data.similarity_join import similar_pairs

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data.trigrams import shingles

SNIPS = FOLDER / "snips"
Pairs = set[tuple[int, int]]


def requests(folder: Path) -> list[str]:
    """Every utterance of the corpus."""
    found = []
    for path in sorted(folder.glob("*.json")):
        for rows in json.loads(path.read_bytes().decode("utf-8", errors="replace")).values():
            found.extend(_words("".join(part["text"] for part in row["data"])) for row in rows)
    return found


def _words(text: str) -> str:
    """As near_text has it of a conversation."""
    return near_text(normalise(text))


def brute_force(texts: list[str], threshold: float) -> Pairs:
    """Every pair compared, as a product of sparse matrices: rows x trigrams."""
    columns: dict[str, int] = {}
    cells = [(i, columns.setdefault(gram, len(columns))) for i, text in enumerate(texts) for gram in shingles(text)]
    row, column = np.array(cells).T
    holds = sparse.csr_matrix((np.ones(len(cells), dtype=np.float32), (row, column)))
    sizes = np.asarray(holds.sum(axis=1)).ravel()
    pairs: Pairs = set()
    for start in range(0, len(texts), 1000):
        shared = (holds[start : start + 1000] @ holds.T).tocoo()
        left, right = shared.row + start, shared.col
        alike = shared.data / (sizes[left] + sizes[right] - shared.data)
        near = (right > left) & (alike >= threshold - 1e-6)
        pairs.update(zip(left[near].tolist(), right[near].tolist(), strict=True))
    return pairs


def ours(texts: list[str], threshold: float) -> Pairs:
    return {(left, right) for left, right in similar_pairs(texts, threshold, 100 * len(texts)).tolist()}


def rensa(texts: list[str], threshold: float) -> Pairs:
    from rensa import RMinHash, RMinHashLSH

    hashes = RMinHash.from_token_sets([list(shingles(text)) for text in texts], 128, 1)
    index = RMinHashLSH(threshold, 128, 16)
    index.insert_many(hashes)
    return _ordered((place, other) for place, found in enumerate(index.query_all(hashes)) for other in found)


def datasketch(texts: list[str], threshold: float) -> Pairs:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=128)
    hashes = MinHash.bulk([[gram.encode() for gram in shingles(text)] for text in texts], num_perm=128)
    for place, one in enumerate(hashes):
        index.insert(place, one)
    return _ordered((place, other) for place, one in enumerate(hashes) for other in index.query(one))


def _ordered(pairs: Iterable[tuple[int, int]]) -> Pairs:
    return {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=SNIPS)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    texts = requests(args.folder)
    if not texts:
        parser.exit(0, f"{args.folder} holds no SNIPS corpus: nothing measured\n")
    true = brute_force(texts, args.threshold)
    print(f"{len(texts)} rows, {len(true)} pairs at {args.threshold} by brute force\n")
    print(f"{'':<12}{'recall':>9}{'precision':>11}{'seconds':>9}{'to rensa':>10}")
    times: dict[str, float] = {}
    methods: dict[str, Callable[[list[str], float], Pairs]] = {"rensa": rensa, "ours": ours, "datasketch": datasketch}
    for name, method in methods.items():
        seconds = []
        for _ in range(args.runs if name != "datasketch" else 1):
            began = time.perf_counter()
            found = method(texts, args.threshold)
            seconds.append(time.perf_counter() - began)
        times[name] = min(seconds)
        right = len(found & true)
        shares = f"{right / len(true):>9.3f}{right / max(1, len(found)):>11.3f}"
        print(f"{name:<12}{shares}{times[name]:>9.2f}{times[name] / times['rensa']:>9.2f}x")


if __name__ == "__main__":
    main()

"""What of a test set stands in its training set: ours beside the usual overlap of word 13-grams.

    python benchmarks/leakage.py [FOLDER]

FOLDER holds `snips` (https://github.com/sonos/nlu-benchmark) and `banking77`
(https://github.com/PolyAI-LDN/task-specific-datasets), by default `../shared/data`. Numbers are rows of the held-out
part of which something stands in the training part, as both were published.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.data.duplicates import near_pairs, near_text, normalise
from tunesmith.data.splitting.groups import wording_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data.trigrams import jaccard, shingles

FOLDER = Path(os.environ.get("TUNESMITH_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
NEAR = 0.8
Row = tuple[str, str]  # request, answer


def snips(folder: Path, part: str) -> tuple[list[Row], list[str]]:
    """The rows, and the template of each as the corpus' own marks have it: lower case, one space between words."""
    rows, templates = [], []
    for path in sorted(folder.glob(f"*_{part}_*.json")):
        for intent, utterances in json.loads(path.read_bytes().decode("utf-8", errors="replace")).items():
            for pieces in (utterance["data"] for utterance in utterances):
                slots = defaultdict(list)
                for piece in pieces:
                    if "entity" in piece:
                        slots[piece["entity"]].append(piece["text"].strip())
                marked = "".join(f"<{piece['entity']}>" if "entity" in piece else piece["text"] for piece in pieces)
                templates.append(" ".join(marked.lower().split()))
                answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)
                rows.append(("".join(piece["text"] for piece in pieces).strip(), answer))
    return rows, templates


def banking(folder: Path, part: str) -> list[Row]:
    with (folder / f"banking_data_{part}.csv").open(newline="", encoding="utf-8") as lines:
        return [(row["text"], row["category"]) for row in csv.DictReader(lines)]


def grams(request: str) -> set[tuple[str, ...]]:
    """The runs of 13 words, as benchmarks are usually cleaned by."""
    words = re.findall(r"\w+", request.lower())
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


def words(request: str) -> str:
    return near_text(normalise(request))


def twins(train: list[Row], held: list[Row]) -> dict[int, list[int]]:
    """Held-out row -> the training rows near it."""
    places: defaultdict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, rows in enumerate((train, held)):
        for number, (request, _) in enumerate(rows):
            places[words(request)][side].append(number)
    texts = list(places)
    found: defaultdict[int, list[int]] = defaultdict(list)
    for left, right in [*((place, place) for place in range(len(texts))), *near_pairs(texts, NEAR).tolist()]:
        for one, other in {(left, right), (right, left)}:
            for number in places[texts[other]][1]:
                found[number].extend(places[texts[one]][0])
    return {number: near for number, near in found.items() if near}


def shared(key: Callable[[Any], str], train: list[Any], held: list[Any]) -> set[int]:
    seen = {key(row) for row in train}
    return {number for number, row in enumerate(held) if key(row) in seen}


def report(name: str, train: list[Row], held: list[Row]) -> dict[str, set[int]]:
    """Prints and returns what each method finds."""
    seen = set().union(*(grams(request) for request, _ in train))
    near = twins(train, held)
    found = {
        "13 words in a row": {number for number, (request, _) in enumerate(held) if grams(request) & seen},
        "the same text": shared(lambda row: row[0].strip(), train, held),
        "the same after normalisation": shared(lambda row: normalise(row[0]), train, held),
        f"near: {NEAR} of trigrams": set(near),
    }
    print(f"\n{name}: {len(train)} rows for training, {len(held)} held out")
    for what, rows in found.items():
        print(f"  {what:<34}{len(rows):>6}")
    found["label"] = other_label(train, held, near)
    return found


def other_label(train: list[Row], held: list[Row], near: Mapping[int, list[int]]) -> set[int]:
    """The held-out rows whose nearest training row has another answer. near: as twins found them."""
    best = {
        number: max(others, key=lambda other: _alike(held[number][0], train[other][0]))
        for number, others in near.items()
    }
    return {number for number, other in best.items() if held[number][1] != train[other][1]}


def _alike(one: str, other: str) -> float:
    return jaccard(shingles(words(one)), shingles(words(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    if not (folder / "snips").is_dir() or not (folder / "banking77").is_dir():
        parser.exit(0, f"{folder} holds no snips and banking77: nothing measured\n")
    (train, train_templates), (held, held_templates) = (snips(folder / "snips", part) for part in ("train", "validate"))
    report("snips", train, held)
    true = shared(str, train_templates, held_templates)
    ours = shared(lambda row: wording_group(normalise(row[0]), row[1]), train, held)
    print(f"  {'the same but for values':<34}{len(ours):>6}")
    print(f"  of the {len(true)} rows whose template stands in training as the corpus marks it, {len(true & ours)}")
    found = report("banking77", banking(folder / "banking77", "train"), banking(folder / "banking77", "test"))
    print(f"  {'the nearest has another label':<34}{len(found['label']):>6}")


if __name__ == "__main__":
    main()

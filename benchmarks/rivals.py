"""How strong the rivals without tuning are, on public data that is read from where it lies.

    python benchmarks/rivals.py FOLDER

FOLDER holds xquad_en/xquad.en.json (Artetxe et al. 2020, CC-BY-SA-4.0) and banking77/banking_data_{train,test}.csv
(Casanueva et al. 2020, CC-BY-4.0). Retrieval: how often the paragraph that holds the answer is among the k found, by
words, by vectors and fused. Floors: accuracy, macro-F1 and calibration; the peer is scikit-learn's own stratified
guessing (DummyClassifier).
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

from sklearn.dummy import DummyClassifier

from tunesmith.candidates.baselines import make_baseline
from tunesmith.candidates.retrieval import Index
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Generation
from tunesmith.evaluation.metrics.classification import Labelled, calibration, classes
from tunesmith.evaluation.stats.statistics import Level
from tunesmith.models.embedding import find_embedder


def retrieval(folder: Path) -> None:
    """Hit rate of each way to look paragraphs up."""
    articles = json.loads((folder / "xquad_en" / "xquad.en.json").read_bytes())["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    texts = [paragraph["context"] for paragraph in paragraphs]
    asked = [(each["question"], place) for place, paragraph in enumerate(paragraphs) for each in paragraph["qas"]]
    embedder = find_embedder()
    print(f"{len(asked)} questions, {len(texts)} paragraphs: share whose own paragraph is among the first k")
    print(f"{'':8} {'k=1':>7} {'k=3':>7} {'k=5':>7} {'ms each':>9}")
    for by in ("bm25", "dense", "fused"):
        index = Index(texts, by, None if by == "bm25" else embedder.embed)
        began = time.perf_counter()
        found = [index.nearest(question, 5)[::-1] for question, _ in asked]
        spent = 1000 * (time.perf_counter() - began) / len(asked)
        hits = [
            sum(place in places[:k] for places, (_, place) in zip(found, asked, strict=True)) / len(asked)
            for k in (1, 3, 5)
        ]
        print(f"{by:8} {hits[0]:7.1%} {hits[1]:7.1%} {hits[2]:7.1%} {spent:9.2f}")


def floors(folder: Path) -> None:
    """Nearest answer and classifier beside guessing."""
    train, test = (_rows(folder / "banking77" / f"banking_data_{split}.csv") for split in ("train", "test"))
    wanted = [row.answer for row in test]
    groups = tuple(row.id for row in test)
    guess = DummyClassifier(strategy="stratified", random_state=0).fit(train, [row.answer for row in train])
    chance = float(guess.score(test, wanted))
    rows = f"{len(train)} training rows, {len(test)} test rows, {len(set(wanted))} labels"
    print(f"\n{rows}; guessing is right on {chance:.1%}")
    for method in ("nearest", "classifier"):
        began = time.perf_counter()
        floor = make_baseline(method, train)
        made = time.perf_counter() - began
        given = floor.generate([Generation(messages=row.request) for row in test])
        answers = [each.text for each in given]
        right = [float(answer == truth) for answer, truth in zip(answers, wanted, strict=True)]
        sure = tuple(each.confidence for each in given if each.confidence is not None)
        labelled = Labelled(groups, groups, tuple(wanted), tuple(answers), sure if len(sure) == len(given) else None)
        macro = classes(labelled, Level(0.95, 0)).macro_f1
        share = sum(right) / len(right)
        line = f"{method:10} right {share:.1%} ({share / chance:.0f} times guessing), macro-F1 {macro.mean:.3f}"
        line += f" [{macro.low:.3f}, {macro.high:.3f}], made in {made:.1f} s"
        if labelled.confidences:
            line += f", calibration error {calibration(labelled).ece:.3f}"
        print(line)


def _rows(path: Path) -> list[Example]:
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    return [
        Example(
            id=f"{number:06d}",
            messages=(Message(role="user", content=row["text"]), Message(role="assistant", content=row["category"])),
            source=path.name,
            licence="CC-BY-4.0",
            group=f"{number:06d}",
        )
        for number, row in enumerate(read)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the published data sets")
    folder = parser.parse_args().folder
    retrieval(folder)
    floors(folder)

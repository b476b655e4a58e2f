"""How strong the rivals without tuning are, on public data that is read from where it lies.

    python benchmarks/rivals.py FOLDER
    python benchmarks/rivals.py FOLDER --optimise WORK    # some three hours of one core; goes on where it was stopped

FOLDER holds xquad_en/xquad.en.json (Artetxe et al. 2020, CC-BY-SA-4.0) and banking77/banking_data_{train,test}.csv
(Casanueva et al. 2020, CC-BY-4.0). Retrieval: how often the paragraph that holds the answer is among the k found, by
words, by vectors and fused. Floors: accuracy, macro-F1 and calibration; the peer is scikit-learn's own stratified
guessing (DummyClassifier). With --optimise: few-shot and rag as somebody writes them down, and what `optimise:` makes
of them, on three tasks of tasks.py. WORK keeps the projects.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from sklearn.dummy import DummyClassifier

sys.path.insert(0, str(Path(__file__).parent))
from task_projects import write_project
from tasks import tasks
from tunesmith.api import Project
from tunesmith.candidates.baselines import make_baseline
from tunesmith.candidates.optimise import described
from tunesmith.candidates.retrieval import Index
from tunesmith.core.digests import short
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Generation
from tunesmith.evaluation.metrics.classification import Labelled, calibration, classes
from tunesmith.evaluation.stats.statistics import Level
from tunesmith.models.embedding import find_embedder
from tunesmith.records.training import SearchBody
from tunesmith.services.evaluations import evaluate

TASKS, ROWS, TEST = ("banking77", "wording", "snips"), 300, 300


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


def optimised(folder: Path, work: Path) -> None:
    """Candidates as they are written down, and after a search on validation rows, by test rows."""
    for name in TASKS:
        task, project = tasks(folder)[name], work / name
        if not project.exists():
            write_project(project, replace(task, test=task.test[:TEST]), ROWS, {})
            settings = json.loads((project / "tunesmith.yaml").read_text(encoding="utf-8"))
            answer = {key: value for key, value in settings["candidates"]["tuned"].items() if key != "train"}
            few, rag = {**answer, "shots": 6}, {**answer, "retrieve": {"k": 4}}
            settings["candidates"] = {
                "few-shot": few,
                "rag": rag,
                "few-shot-optimised": {**few, "optimise": {}},
                "rag-optimised": {**rag, "optimise": {}},
            }
            (project / "tunesmith.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        loaded = Project.load(project)
        summary = evaluate(loaded)
        print(f"\n{name}, {task.metric} of {summary.n} test rows")
        for candidate, metrics in summary.candidates.items():
            found = metrics[task.metric]
            print(f"{candidate:20} {found.mean:6.1%} [{found.low:.1%}, {found.high:.1%}]")
        for digest in loaded.store.records_of("search"):
            body = SearchBody.read(loaded.store, digest)
            print(f"{short(digest)}: {described(body)}")


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
    parser.add_argument("--optimise", type=Path, metavar="WORK", help="measure searches instead, in this folder")
    given = parser.parse_args()
    if given.optimise:
        optimised(given.folder, given.optimise)
    else:
        retrieval(given.folder)
        floors(given.folder)

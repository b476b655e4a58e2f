"""The cases of the forecasts' benchmark: tasks with growing numbers of rows, trained and asked, each part kept."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from claims import claimed
from leakage import Row
from learning_parts.kept import append_line, read_lines
from task_training import Loaded, answers, load, scores
from tasks import Task, tasks
from tunesmith.candidates.baselines import make_baseline
from tunesmith.core.digests import digest_of
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Generation
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.estimates.estimate import subset_settings
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import make_spec, run_training

RESULTS = Path(__file__).parent / "results" / "forecast.jsonl"
CLAIMS = Path(tempfile.gettempdir()) / "tunesmith-forecast"
EPOCHS = 3
HELD = 200  # rows held out of all trainings, at most
TEST = 400  # test requests, at most
BATCH = 16  # of the training on 800 rows; the others' are as subset_settings has them, so that cases share trainings
SMALLEST = 12  # rows of the smallest subset; each further one has twice as many


@dataclass(frozen=True)
class Ladder:
    """Trainings of one task on ever more rows. top: the most; change: what was done to the task."""

    task: Task
    change: str
    top: int

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.change}".strip()

    @property
    def sizes(self) -> list[int]:
        """Rows of each training, ascending."""
        found = [self.top]
        while found[0] // 2 >= SMALLEST:
            found.insert(0, found[0] // 2)
        return found

    @property
    def cases(self) -> list[int]:
        """Rows of the cases."""
        return [size for size in self.sizes if size >= 200]


def ladders(folder: Path) -> list[Ladder]:
    """What is trained, in the order in which it is."""
    known = tasks(folder)
    plan = [
        ("home", "", 400), ("snips", "", 400), ("banking77", "", 400), ("intents", "", 400),
        ("intents", "shuffled", 400), ("music", "", 400), ("banking77", "half wrong", 400), ("choices", "", 400),
        ("wording", "", 400), ("home", "shuffled", 400), ("clinc150", "", 400), ("relevance", "", 400),
        ("masking", "", 400), ("clinc150", "shuffled", 400), ("personal", "", 200), ("xquad", "", 200),
        ("calls", "", 200),
    ]  # fmt: skip
    return [Ladder(_changed(known[name], change), change, top) for name, change, top in plan if name in known]


def _changed(task: Task, change: str) -> Task:
    """The task with other answers, and with at most TEST test requests."""
    draw = random.Random(f"forecast {task.name} {change}")
    rows, test = list(task.rows), list(task.test)
    draw.shuffle(test)
    test = test[:TEST]
    if change in ("shuffled", "half wrong"):
        share = 1.0 if change == "shuffled" else 0.5
        rows, test = _wrong(rows, share, draw), _wrong(test, share, draw)
    return replace(task, rows=tuple(rows), test=tuple(test))


def _wrong(rows: Sequence[Row], share: float, draw: random.Random) -> list[Row]:
    """Rows of which so many have the answers of others."""
    chosen = [place for place in range(len(rows)) if draw.random() < share]
    moved = chosen[:]
    draw.shuffle(moved)
    found = list(rows)
    for place, other in zip(chosen, moved, strict=True):
        found[place] = (rows[place][0], rows[other][1])
    return found


@dataclass(frozen=True)
class Rows:
    """The rows of a ladder. train: in the order in which subsets grow. held, test: what the models are asked."""

    train: tuple[Row, ...]
    held: tuple[Row, ...]
    test: tuple[Row, ...]


def rows_of(ladder: Ladder) -> Rows:
    """A ladder's rows."""
    task = ladder.task
    split = task.split(ladder.top, held=HELD)
    groups = dict(zip(task.rows, task.groups, strict=True))
    order = sorted({groups[row] for row in split.train})
    random.Random(f"forecast {ladder.name}").shuffle(order)
    place = {group: number for number, group in enumerate(order)}
    train = tuple(sorted(split.train, key=lambda row: place[groups[row]]))
    return Rows(train, split.held, task.test)


def parts(ladder: Ladder) -> Iterator[dict[str, Any]]:
    """What is to be trained and asked for a ladder, as the keys of result lines."""
    # Only what is stated, so that a new setting's default makes no result anew; nor does another schema that `init`
    # infers, which each line states (`limits`).
    settings = _settings().model_dump(mode="json", exclude_unset=True)
    common = {"task": ladder.name, "digest": ladder.task.asked_digest, "settings": settings,
              "top": ladder.top, "held": HELD, "revision": 3}  # fmt: skip
    yield {**common, "who": "start", "rows": 0, "epochs": 0}
    for size in ladder.sizes:
        yield {**common, "who": "tuned", "rows": size, "epochs": EPOCHS}
    train = rows_of(ladder).train
    for size in ladder.cases:
        yield {**common, "who": "nearest", "rows": size, "epochs": 0}
        if ladder.task.kind == "labels" and 2 * len({answer for _, answer in train[:size]}) <= size:
            yield {**common, "who": "classifier", "rows": size, "epochs": 0}


def _settings() -> TrainSettings:
    """The same for every number of rows, so that cases share trainings; a project's rate would fit the rows."""
    return TrainSettings(method="lora", rank=16, batch=BATCH, learning_rate=1e-3, b_rate=1.0)


def measure(loaded: Loaded, ladder: Ladder, part: dict[str, Any]) -> dict[str, Any]:
    """Train and ask one part; returns its result line."""
    rows, task, size = rows_of(ladder), ladder.task, part["rows"]
    asked = {"held": rows.held, "test": rows.test if size in (0, *ladder.cases) else ()}
    began, passes = time.perf_counter(), 0
    if part["who"] in ("nearest", "classifier"):
        given = {split: _baseline(part["who"], rows.train[:size], some) for split, some in asked.items()}
    else:
        with tempfile.TemporaryDirectory() as work:
            folder = None
            if size:
                folder, passes = (
                    _train(loaded, task, rows.train[:size], part["epochs"], Path(work)),
                    size * part["epochs"],
                )
            trained = time.perf_counter() - began
            given = {split: answers(loaded, task, some, folder) if some else [] for split, some in asked.items()}
    found = {split: scores(task, some, given[split]) for split, some in asked.items()}
    line = {"key": digest_of(part), **part, "limits": task.limits_digest, "passes": passes}
    line["seconds"] = round(time.perf_counter() - began, 2)
    line |= {"training_seconds": round(trained, 2)} if passes else {}
    if part["who"] == "start":
        known = dict(zip(task.rows, task.groups, strict=True))
        line["groups"] = [known.get(row, f"row {place}") for place, row in enumerate(rows.held)]
    return {**line, "scores": {split: _packed(values) for split, values in found.items()}}


def _train(loaded: Loaded, task: Task, rows: Sequence[Row], epochs: int, work: Path) -> Path:
    settings = subset_settings(_settings(), len(rows), 800).model_copy(update={"schedule": "wsd", "epochs": epochs})
    told = [
        TrainingRow(f"row-{place}", (*task.messages(request), Message(role="assistant", content=answer)))
        for place, (request, answer) in enumerate(rows)
    ]
    dataset = digest_of({"task": task.digest})
    spec = make_spec(base=loaded.base, dataset=dataset, rows=told, validation=[], settings=settings, work=work)
    return run_training(spec, model=loaded.model).folder


def _baseline(method: str, train: Sequence[Row], asked: Sequence[Row]) -> list[str]:
    examples = []
    for place, (request, answer) in enumerate(train):
        turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
        examples.append(Example(id=str(place), messages=turns, source="", licence="", group=str(place)))
    if not asked:
        return []
    answering = make_baseline(method, examples)
    requests = [Generation((Message(role="user", content=request),), max_tokens=1) for request, _ in asked]
    return [one.text for one in answering.generate(requests)]


def _packed(values: Sequence[float]) -> str | list[float]:
    """Scores, as a text of 0 and 1 where they are nothing else."""
    if all(value in (0.0, 1.0) for value in values):
        return "".join(str(int(value)) for value in values)
    return [round(value, 4) for value in values]


def results() -> list[dict[str, Any]]:
    """The result lines."""
    return list(read_lines(RESULTS))


def collect(plan: Sequence[Ladder], minutes: float) -> None:
    """Train and ask what is missing, for so long."""
    ends = time.monotonic() + 60 * minutes
    known = {line["key"] for line in results()}
    due = [(ladder, part) for ladder in plan for part in parts(ladder) if digest_of(part) not in known]
    print(f"{len(due)} parts are missing")
    if not due:
        return
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load(Path(scratch))
        for ladder, part in due:
            if time.monotonic() > ends:
                return
            key = digest_of(part)
            with claimed(CLAIMS, key) as ours:
                if not ours or key in {line["key"] for line in results()}:
                    continue
                line = measure(loaded, ladder, part)
                append_line(RESULTS, line)
            means = {
                split: round(sum(map(float, values)) / len(values), 3)
                for split, values in line["scores"].items()
                if values
            }
            print(
                f"{ladder.name} {part['who']} {part['rows']} x {part['epochs']}: {means} in {line['seconds']} s",
                flush=True,
            )

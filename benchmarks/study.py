"""What recipe fits the rows: trainings of many settings on tasks of different kinds, scored by each task's metric.

    python benchmarks/study.py --minutes 30        # goes on where the last run stopped; safe to kill at any moment
    python benchmarks/study.py --table             # what is known so far
    python benchmarks/study.py --plan              # the trials that are left, in order

A trial trains on some rows of a task (tasks.py) and answers rows that were held out of the training rows; test requests
are not read. Each finished trial is a line of results/study.jsonl, so that short runs add up. Several may
run at the same time: one for each core, with TUNESMITH_THREADS=1, gets most done.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from claims import claimed
from leakage import Row
from learning_parts.kept import append_line, machine, read_lines
from learning_parts.ours import SHORT_TASKS, VALIDATED, core_seconds
from task_training import Loaded, answers, load, scores, train_task
from tasks import FOLDER, Task, tasks
from tricks import TRICKS, applied, prepare
from tunesmith.core.digests import digest_of
from tunesmith.training.settings import TrainSettings

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
# Raise one where a trial of the same settings would give another score: earlier lines no longer count then.
REVISION = 2  # with epochs
BUDGET_REVISION = 4  # the third read rows up to 40 times
# Held-out rows that are answered, and how many of them may be of one group: rows of one template are right together.
ANSWERED, OF_A_GROUP = 300, 3
HELD = 600
WORK = Path(tempfile.gettempdir()) / "tunesmith-study"
Line = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One training. What is not named here is the same in all trials: see `settings`. Full training has no adapter."""

    task: str
    rows: int
    epochs: int
    rate: float = 1e-3
    rank: int = 16
    batch: int = 16
    decay: float = 0.25
    alpha: float = 2.0  # as a multiple of the rank
    weight_decay: float = 0.0
    b_rate: float = 1.0
    loss_on: str = "assistant"
    start: str = "zero"
    method: str = "lora"
    minutes: float = 0.0  # of a budget, instead of epochs
    seed: int = 0
    trick: str = ""  # of tricks.py

    def settings(self) -> TrainSettings:
        """As a candidate would have them: warm-up, stable, decay. With epochs the weights of the last step are kept,
        with a budget those that validation on other held-out rows chooses."""
        adapter = {
            "rank": self.rank,
            "alpha": self.alpha * self.rank,
            "b_rate": self.b_rate,
            "start": self.start,
        }
        once = {"epochs": self.epochs, "validations": 1, "validate_by": "loss", "keep": "last"}
        return TrainSettings.model_validate(
            {
                **(adapter if self.method == "lora" else {}),
                **({"budget": 60 * self.minutes} if self.minutes else once),
                "method": self.method,
                "learning_rate": self.rate,
                "batch": self.batch,
                "schedule": "wsd",
                "decay": self.decay,
                "weight_decay": self.weight_decay,
                "loss_on": self.loss_on,
                "seed": self.seed,
                "warmup": 0.05,
                "validation_rows": ANSWERED,
                "max_length": 2048,
            }
        )

    @property
    def recipe(self) -> Trial:
        """The trial without its task and seed."""
        return replace(self, task="", seed=0)


# How many times as long an epoch takes, where the time is to be the same; and the tasks that a trick is for. dft lost
# 52 points on the first.
_SLOWER = {"swapped": 2, "consistent": 2.8}
_ONLY = {"swapped": ("music",), "contrastive": ("banking77",), "dft": ("music",)}
KINDS = ("snips", "banking77", "personal", "wording")  # a task of each kind; tool calls take five times as long


def plan() -> Iterator[Trial]:
    """Every trial, the most informative for their time first."""
    slots = ("snips", "home", "music")
    yield from _of_epochs()
    for batch, rate in ((8, 1e-3), (4, 1e-3), (2, 1e-3), (8, 2e-3)):  # rows that a budget lets be read once
        yield Trial("home", 1880, 1, rate, batch=batch, decay=0.9, b_rate=4.0)
    for task in ("banking77", "music", "wording"):
        yield Trial(task, 1000, 3, batch=4, decay=0.9, b_rate=4.0)
    yield Trial("home", 1880, 1, batch=8, decay=0.9, b_rate=4.0, trick="twice")
    for trick in TRICKS:
        slower = _SLOWER.get(trick, 1)
        for rows in (300, 1000):
            for task in _ONLY.get(trick, SHORT_TASKS):
                yield Trial(
                    task, rows, round(_usual_epochs(task, rows) / slower), batch=8, decay=0.9, b_rate=4.0, trick=trick
                )
    many = Trial("snips", 13000, 1, batch=8, decay=0.9, b_rate=4.0)
    yield from (many, replace(many, trick="twice"))
    yield from (replace(many, rank=64), replace(many, method="full", rate=1e-4, b_rate=1.0))
    yield from (Trial(task, 200, 10, rank=64, b_rate=4.0) for task in ("clinc150", "banking77", "snips", "wording"))
    yield from (Trial(task, 200, 10, rank=4, b_rate=4.0) for task in ("clinc150", "banking77", "snips", "wording"))
    yield Trial("personal", 200, 10, rank=64, b_rate=4.0)
    for task in ("wording", "masking"):  # free text
        yield from (Trial(task, 100, 10, rate, b_rate=4.0, seed=seed) for seed in (0, 1) for rate in (1e-3, 2e-3))
    yield from (Trial("wording", 100, epochs, b_rate=4.0) for epochs in (3, 5))
    for task in ("xquad", "relevance", "choices"):  # long requests
        yield from (Trial(task, 100, epochs, batch=8, decay=0.9, b_rate=4.0) for epochs in (5, 20))
    for rows in (200, 50):
        yield from (Trial(task, rows, 20, 1e-3, b_rate=4.0) for task in slots)
    yield from (Trial("banking77", 100, 20, rate, b_rate=4.0) for rate in (1e-3, 2e-3))
    for task in ("music", "banking77", "wording"):  # rows that are read often may want lower rates
        yield from (
            Trial(task, 100, 20, rate, b_rate=b_rate) for rate, b_rate in ((1e-3, 4.0), (1e-3, 1.0), (5e-4, 4.0))
        )
    yield from (Trial("music", 1000, 10, b_rate=b_rate) for b_rate in (1.0, 4.0))
    for task in ("intents", "clinc150"):
        yield from (Trial(task, 200, 10, b_rate=b_rate) for b_rate in (1.0, 4.0))
    for rows in (50, 200):
        yield from (Trial(task, rows, epochs, 2e-3, b_rate=4.0) for epochs in (10, 20, 40) for task in slots)
    for seed in (1, 2):
        yield from (Trial(task, 200, epochs, 2e-3, b_rate=4.0, seed=seed) for epochs in (10, 20) for task in slots)
    yield from (Trial(task, 1000, 10, b_rate=4.0) for task in slots)
    for task in KINDS:
        yield from (Trial(task, 1000, 3, b_rate=b_rate) for b_rate in (1.0, 4.0))
    for task in ("snips", "wording"):
        yield from (Trial(task, 1000, 0, b_rate=b_rate, minutes=5.0) for b_rate in (1.0, 4.0))
    for rate, b_rate in _OF_FEW[:2]:
        yield from (Trial(task, 200, 10, rate, b_rate=b_rate) for task in KINDS)
    yield from (Trial("music", 1000, 0, b_rate=b_rate, minutes=5.0) for b_rate in (1.0, 4.0))
    for task in ("music", "home"):
        yield from (Trial(task, 1000, 3, b_rate=b_rate) for b_rate in (1.0, 4.0))
    for task in ("snips", "personal"):
        yield from (Trial(task, 1000, 3, b_rate=b_rate) for b_rate in (2.0, 8.0))
    yield from (Trial(task, 200, 10, rate, b_rate=b_rate) for task in KINDS for rate, b_rate in _OF_FEW)
    for task in KINDS:
        yield Trial(task, 1000, 3, rank=64)
        yield Trial(task, 1000, 3, b_rate=8.0)
        yield Trial(task, 1000, 3, 1e-4, method="full")
    yield from (Trial(task, 50, 10, rate, b_rate=b_rate) for task in KINDS for rate, b_rate in _OF_FEW)
    yield from (Trial(task, 1000, 3, rank=64, b_rate=4.0) for task in KINDS)
    yield from (Trial(task, 1000, 3, b_rate=b_rate, seed=1) for task in KINDS for b_rate in (1.0, 4.0))


def _usual_epochs(task: str, rows: int) -> int:
    if rows > 1000:
        return 1
    return 3 if rows == 1000 else 5 if task == "wording" else 10 if rows >= 300 else 20


def _of_epochs() -> Iterator[Trial]:
    """How often to read so many rows, where the rate falls in time for the last step: the fewest epochs that pay."""
    for rows, epochs, batch in _EPOCHS:
        for task in ("music", "banking77") if epochs > 5 or (rows, batch) == (1000, 16) else SHORT_TASKS:
            yield Trial(task, rows, epochs, batch=batch, decay=0.9, b_rate=4.0)


# Rows, epochs and rows a step, the most informative for their time first.
_EPOCHS = (
    (1000, 3, 8), (300, 10, 8), (300, 20, 8), (100, 20, 8), (300, 5, 8), (1000, 5, 8), (100, 10, 8), (300, 10, 16),
    (100, 20, 16), (1000, 3, 16), (100, 5, 8), (3000, 3, 8), (3000, 2, 8),
)  # fmt: skip
_OF_FEW = ((3e-3, 1.0), (1e-3, 4.0), (2e-3, 4.0))  # rate, and that of B as a multiple


def key_of(trial: Trial, task: Task) -> str:
    """Names a trial with everything that its score depends on, apart from the machine."""
    stated = {name: value for name, value in asdict(trial).items() if name != "trick" or value}
    return digest_of({"revision": _revision(trial), "answered": ANSWERED, "task": task.digest, **stated})


def _revision(trial: Trial) -> int:
    return BUDGET_REVISION if trial.minutes else REVISION


def read() -> dict[str, Line]:
    """The finished trials by key."""
    return {line["key"]: line for line in read_lines(RESULTS)}


def run(trial: Trial, task: Task, loaded: Loaded, key: str) -> Line:
    """Train, answer and score. A trial that was killed goes on from its checkpoints."""
    import torch

    split, work = task.split(trial.rows, trial.seed, HELD), WORK / _short(key)
    few = _few_of_each(task, split.held)
    asked, others = few[:ANSWERED], few[ANSWERED:]
    held = tuple(others[:VALIDATED] if trial.minutes else asked)
    made = prepare(trial.trick, task, split._replace(held=held), asked)
    steps = trial.epochs * math.ceil(len(made.split.train) / trial.batch)
    with applied(trial.trick, steps) as watch:
        trained = train_task(loaded, made.task, made.split, trial.settings(), work, clock=core_seconds, watch=watch)
    began, body = time.perf_counter(), trained.body
    found = scores(task, asked, answers(loaded, made.task, made.asked, trained.folder))
    answering = time.perf_counter() - began
    shutil.rmtree(work)
    return {
        "key": key,
        "revision": _revision(trial),
        "trial": asdict(trial),
        "task": task.digest,
        "trained": len(split.train),
        "score": round(statistics.fmean(found), 5),
        "scores": [round(each, 3) for each in found],
        "loss": round(next(each.loss for each in body.validation if each.step == body.kept), 5),
        "training_loss": round(statistics.fmean(step.loss for step in body.curve[-5:]), 5),
        "steps": body.steps,
        "seconds": round(body.seconds, 1),
        "answering_seconds": round(answering, 1),
        "machine": machine(torch.get_num_threads()),
        "kernel_revision": body.environment.kernel_revision,
    }


def _few_of_each(task: Task, rows: Sequence[Row]) -> list[Row]:
    """The first OF_A_GROUP rows of each group."""
    seen, found = Counter[str](), []
    for row in rows:
        seen[task.group_of[row]] += 1
        if seen[task.group_of[row]] <= OF_A_GROUP:
            found.append(row)
    return found


def work(minutes: float) -> None:
    """Run trials in order, and begin none after so many minutes: the last one ends later."""
    known, every = read(), tasks(FOLDER)
    left = [(trial, key) for trial, key in _keyed(dict.fromkeys(plan()), every) if key not in known]
    until = time.monotonic() + 60 * minutes
    print(f"{len(left)} trials left", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load(Path(scratch))
        for trial, key in left:
            if time.monotonic() > until:
                break
            with claimed(WORK, key) as ours:
                if not ours or key in read():  # another run has it, or had it
                    continue
                line = run(trial, every[trial.task], loaded, key)
                append_line(RESULTS, line)
            print(
                f"{trial.task:<12} {_told(trial.recipe)}: score {line['score']:.3f}, loss {line['loss']:.3f}, "
                f"{line['seconds']:.0f} s and {line['answering_seconds']:.0f} s",
                flush=True,
            )


def _short(key: str) -> str:
    return key.removeprefix("sha256:")[:16]


def _keyed(trials: Iterable[Trial], every: Mapping[str, Task]) -> Iterator[tuple[Trial, str]]:
    for trial in trials:
        if trial.task in every:
            yield trial, key_of(trial, every[trial.task])


def _told(recipe: Trial) -> str:
    """A recipe in words: rows, epochs, and what differs from the defaults of Trial."""
    usual = Trial("", 0, 0)
    parts = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
             for name, value in asdict(recipe).items()
             if name in ("rows", "epochs", "rate", "rank", "batch") or value != getattr(usual, name)]  # fmt: skip
    return ", ".join(part for part in parts if not part.startswith("task"))


def table(lines: Sequence[Line]) -> str:
    """Mean scores in percent by recipe and task, with the mean over the tasks that all recipes of so many rows have."""
    cells: defaultdict[Trial, defaultdict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        trial = Trial(**line["trial"])
        cells[trial.recipe][trial.task].append(line)
    shown = []
    for rows in sorted({recipe.rows for recipe in cells}):
        recipes = {recipe: by_task for recipe, by_task in cells.items() if recipe.rows == rows}
        names = sorted({name for by_task in recipes.values() for name in by_task})
        shown.append(f"\n{rows} rows: percent, and the validation loss in brackets\n" + " " * 58 + "mean      "
                     + "".join(f"{name:<15}" for name in names))  # fmt: skip
        for recipe, by_task in sorted(recipes.items(), key=lambda item: tuple(asdict(item[0]).values())):
            cell = {name: by_task[name] for name in names if name in by_task}
            told = _told(recipe).partition(", ")[2]
            mean = _mean(cell.values()) if len(cell) == len(names) else "-"
            shown.append(f"{told:<58}{mean:<10}" + "".join(f"{_cell(cell.get(name)):<15}" for name in names))
    return "\n".join(shown)


def gains(lines: Sequence[Line]) -> str:
    """What each trial with an early fall of the rate gains over the usual recipe with the same rows, in points with the
    standard error over the answers; then each trick's mean over three tasks with 300 and 1,000 rows."""
    by_trial, shown = {Trial(**line["trial"]): line for line in lines}, []
    means: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for trial, line in by_trial.items():
        usual = Trial(trial.task, trial.rows, _usual_epochs(trial.task, trial.rows), batch=8, decay=0.9, b_rate=4.0)
        without = by_trial.get(usual)
        if without and trial != usual and trial.decay == usual.decay and trial.seed == usual.seed:
            apart = [100 * (one - other) for one, other in zip(line["scores"], without["scores"], strict=True)]
            gain, error = statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))
            shown.append(f"{trial.task:<12} {_told(trial.recipe)}: {gain:+.1f} ± {error:.1f}, "
                         f"{line['seconds'] / without['seconds']:.1f}x the time")  # fmt: skip
            if trial.trick and trial.task in SHORT_TASKS and trial.rows in (300, 1000):
                means[trial.trick].append((gain, error))
    for trick, found in means.items():
        error = math.hypot(*(error for _, error in found)) / len(found)
        shown.append(
            f"mean of {len(found)}: trick {trick}: {statistics.fmean(gain for gain, _ in found):+.1f} ± {error:.1f}"
        )
    return "\n".join(shown)


def _mean(cells: Any) -> str:
    """The mean over tasks, with its standard error from the rows that were answered."""
    every = list(cells)
    means = [statistics.fmean(line["score"] for line in lines) for lines in every]
    variance = sum(
        statistics.pvariance([score for line in lines for score in line["scores"]])
        / sum(len(line["scores"]) for line in lines)
        for lines in every
    )
    return f"{100 * statistics.fmean(means):.1f}±{100 * math.sqrt(variance) / len(every):.1f}"


def _cell(lines: Sequence[Line] | None) -> str:
    if not lines:
        return "-"
    score, loss = (statistics.fmean(line[what] for line in lines) for what in ("score", "loss"))
    return f"{100 * score:.1f} ({loss:.3f})" + (f" x{len(lines)}" if len(lines) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="begin no trial after so many minutes")
    parser.add_argument("--table", action="store_true", help="print what is known and end")
    parser.add_argument("--plan", action="store_true", help="print the trials that are left and end")
    given = parser.parse_args()
    if given.table:
        for revision in range(1, BUDGET_REVISION + 1):
            print(f"\nround {revision}")
            print(table([line for line in read().values() if line["revision"] == revision]))
        print(f"\nwhat each adds to the usual recipe\n{gains(list(read().values()))}")
    elif given.plan:
        known = read()
        for trial, key in _keyed(dict.fromkeys(plan()), tasks(FOLDER)):
            if key not in known:
                print(f"{trial.task:<12} {_told(trial.recipe)}, seed {trial.seed}")
    else:
        work(given.minutes)


if __name__ == "__main__":
    main()

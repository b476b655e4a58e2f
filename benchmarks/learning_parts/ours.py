"""Our own trainings: a task as `init` would train it, and a whole project by the command line."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from leakage import Row
from learning_parts.kept import Figures, Kept
from task_training import Loaded, answers, load, scores, train_task
from tasks import CALLS, Split, Task
from tunesmith.core.errors import Refused
from tunesmith.services.new_project import default_training
from tunesmith.training.schedule import ALL_EPOCHS
from tunesmith.training.settings import TrainSettings

RECIPE = 6  # raise it where trainings that leave settings open train otherwise: earlier figures do not count then
SHORTER = (900.0,)  # budgets, in seconds, that `init` wrote with the same recipe
VALIDATED = 200  # rows that a training is validated on
SHORT_TASKS = ("music", "banking77", "wording")  # of three kinds, with short rows: peers are slow

_ROW_SECONDS = 0.15  # to train a row once, for the time that a measurement is said to take


@dataclass(frozen=True)
class Bench:
    """What parts share. folder: of the corpora; work: for what a killed measurement goes on from."""

    kept: Kept
    tasks: Mapping[str, Task]
    folder: Path
    work: Path
    demo: Path

    @cached_property
    def loaded(self) -> Loaded:
        """The base, loaded when the first measurement needs it."""
        return load(self.work / "base")


def defaults(budget: float | str | None = None) -> dict[str, Any]:
    """The settings that `init` writes for a training, with another budget where one is given."""
    return default_training() | ({} if budget is None else {"budget": budget})


def stated_settings(settings: TrainSettings) -> dict[str, Any]:
    """What figures depend on. Those of trainings that do not rehearse were kept before there was such a setting."""
    return settings.model_dump(mode="json", exclude=None if settings.rehearse else {"rehearse"})


def short_tasks(bench: Bench) -> Iterator[tuple[str, Task]]:
    """The tasks of SHORT_TASKS whose corpus is there."""
    for name in SHORT_TASKS:
        if name in bench.tasks:
            yield name, bench.tasks[name]


def trained(bench: Bench, name: str, task: Task, split: Split, train: Mapping[str, Any]) -> Figures | None:
    """Train on split.train, validate on rows of split.held, answer the test requests, constrained as `init` does it.

    A budget is counted by the processor's time, so that other work on the machine takes nothing from a training.

    Figures: score; scores of the test requests; held: score of the validation rows; seconds: of steps, validations and
    what is measured before them, by that clock; cpu_seconds: of all of it and all threads; epochs; ended: why it ended.
    For a budget that is refused: refused. A training that a shorter budget of `init` held whole is the same within a
    longer one, and is not repeated.
    """
    settings = TrainSettings.model_validate({**train, "validation_rows": VALIDATED})
    stated = {
        "task": task.digest,
        "rows": len(split.train),
        "train": stated_settings(settings),
        **({} if "learning_rate" in train else {"recipe": RECIPE}),  # a peer's recipe leaves nothing open
        **({"seldom": True} if task.kind == CALLS and "epochs" not in train else {}),  # before, as often as other rows
    }
    for shorter in SHORTER if settings.budget else ():
        found = bench.kept.known(name, {**stated, "train": {**stated["train"], "budget": shorter}})
        if found and shorter < settings.budget and found["ended"] == ALL_EPOCHS:
            return found
    minutes = (settings.budget or _ROW_SECONDS * settings.epochs * len(split.train)) / 60 + 1

    def measure() -> Figures:
        work = bench.work / name.replace(" ", "-")
        began = time.process_time()
        try:
            result = train_task(bench.loaded, task, split, settings, work, clock=core_seconds)
        except Refused as refused:
            return {"refused": refused.what}
        cpu = time.process_time() - began
        body, decisions = result.body, result.body.decisions
        found = {
            "seconds": round(body.seconds + (decisions.seconds if decisions else 0.0), 1),
            "cpu_seconds": round(cpu, 1),
            "epochs": round(body.epochs, 2),
            "ended": body.ended,
            "validation": [
                {key: round(value, 4) for key, value in each.model_dump().items()} for each in body.validation
            ],
            **scored(bench, task, split.held[:VALIDATED], result.folder),
        }
        shutil.rmtree(work)
        return found

    return bench.kept.figures(name, stated, minutes, measure)


def core_seconds() -> float:
    """The processor's seconds that this process has used, divided by its threads: about its time on an idle machine."""
    return time.process_time() / torch.get_num_threads()


def scored(bench: Bench, task: Task, held: Sequence[Row], adapter: Path) -> Figures:
    """The scores of an adapter's answers: of the test requests each, their mean, and the mean of the held-out rows."""
    test = scores(task, task.test, answers(bench.loaded, task, task.test, adapter))
    chosen = scores(task, held, answers(bench.loaded, task, held, adapter))
    return {
        "score": round(statistics.fmean(test), 5),
        "held": round(statistics.fmean(chosen), 5),
        "scores": [round(each, 3) for each in test],
    }


def project(
    bench: Bench, name: str, rows: Sequence[Row], change: Callable[[dict[str, Any]], None], stated: Mapping[str, Any]
) -> Figures | None:
    """What the candidate `tuned` reaches in a project that `tunesmith init` makes of these rows, by the command line.

    change: edits the project's settings. stated: what the figures depend on. A killed measurement goes on from its
    project.
    """

    def run(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tunesmith", *arguments, "-C", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"tunesmith {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))

    def measure() -> Figures:
        file = folder / "tunesmith.yaml"
        if not file.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            lines = (json.dumps({"prompt": asked, "completion": said}, ensure_ascii=False) for asked, said in rows)
            (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            run("init", "--data", str(folder / "rows.jsonl"), "--licence", "CC0-1.0")
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            change(settings)
            file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        training = run("train", "tuned")
        evaluation = run("evaluate", "tuned")
        found = {key: training[key] for key in ("seconds", "epochs", "validation", "kept", "notices")}
        exact = evaluation["candidates"]["tuned"]["exact_match"]
        shutil.rmtree(folder)
        return found | {"n": evaluation["n"], **{key: round(exact[key], 4) for key in ("mean", "low", "high")}}

    folder = bench.work / name.replace(" ", "-")
    return bench.kept.figures(name, stated, stated["minutes"], measure)

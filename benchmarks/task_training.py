"""Trains a task (tasks.py) in this process, and scores answers to its rows by the task's metric."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leakage import Row
from tasks import BASE, CALLS, Split, Task
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import Constraint, copied_fields
from tunesmith.core.digests import digest_of
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.batch import label_count
from tunesmith.engines.factory import load_model
from tunesmith.engines.protocol import Generation
from tunesmith.engines.training_protocol import LoadedModel, TrainableModel
from tunesmith.evaluation.metrics.scorers import OF_SENTENCES, SCORERS
from tunesmith.models.base import Base, model_width, resolve_base
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.schedule import TrainerState
from tunesmith.training.scoring import AnswerScore, Score, mean_score
from tunesmith.training.settings import TrainSettings, fit_to_rows
from tunesmith.training.spec import TrainingResult
from tunesmith.training.train import make_spec, run_training


@dataclass(frozen=True)
class Loaded:
    """The base and its weights, loaded once for any number of trainings."""

    base: Base
    model: LoadedModel


def load(scratch: Path, base: str = BASE) -> Loaded:
    """Load the base. scratch: a folder for what it is unpacked from."""
    found = resolve_base(Store(scratch / "store"), base, scratch)
    return Loaded(found, load_model(found))


def train_task(
    loaded: Loaded,
    task: Task,
    split: Split,
    settings: TrainSettings,
    work: Path,
    *,
    progress: Progress = SILENT,
    constrain: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[TrainerState, TrainableModel], None] | None = None,
) -> TrainingResult:
    """Train on split.train, validating on split.held by the task's metric, in a work folder that it resumes from.

    The adapter's files are in the result's folder. `settings.validation_rows` bounds the rows that are validated on.
    clock: that a budget is counted by. watch: as in run_training.
    """
    validated = split.held[: settings.validation_rows]
    seldom = task.metric in OF_SENTENCES or task.kind == CALLS
    spec = make_spec(
        base=loaded.base,
        dataset=digest_of({"task": task.digest}),
        rows=_training_rows(task, split.train),
        validation=_training_rows(task, validated),
        settings=fit_to_rows(settings, len(split.train), model_width(loaded.base), seldom=seldom),
        work=work,
        name=task.name,
    )

    groups = [task.group_of[row] for row in validated]

    def score_first(model: TrainableModel | None, count: int) -> Score:
        folder, lengths = None, None
        if model is None:  # answers are timed
            lengths = [label_count(row) for row in spec.validation.read()[:count]]
        else:
            folder = work / "validated"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            model.save(folder)
        texts = answers(loaded, task, validated[:count], folder, constrain=constrain, lengths=lengths)
        return mean_score(scores(task, validated[:count], texts), groups[:count])

    scored = AnswerScore(task.metric, len(validated), score_first) if settings.validate_by == "score" else None
    return run_training(spec, progress, model=loaded.model, score=scored, clock=clock, watch=watch)


def answers(
    loaded: Loaded,
    task: Task,
    rows: Sequence[Row],
    folder: Path | None,
    *,
    constrain: bool = True,
    lengths: Sequence[int] | None = None,
) -> list[str]:
    """Greedy answers to the rows' requests. folder: of the adapter; None: the base's own. constrain: as the task is.
    lengths: the most tokens of each answer; None: the task's."""
    engine, name = loaded.model.engine(), None
    if folder is not None:
        name = "answering"
        engine.load_adapter(name, folder)
    hold = _constraint(loaded, task if constrain else None)
    asked = [
        hold.hold(Generation(task.messages(request), max_tokens=most), [Message(role="user", content=request)])
        for (request, _), most in zip(rows, lengths or [task.max_tokens] * len(rows), strict=True)
    ]
    return [one.text for one in engine.generate(asked, name)]


def scores(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> list[float]:
    """The score of each answer by the task's metric."""
    return [SCORERS[task.metric](text, wanted, task.schema) for text, (_, wanted) in zip(texts, rows, strict=True)]


def _constraint(loaded: Loaded, task: Task | None) -> Constraint:
    schema: Mapping[str, object] | None = task.schema if task is not None and task.constrain else None
    copied = task.constrain if task is not None and isinstance(task.constrain, tuple) else ()
    return Constraint(
        Candidate(
            name="tuned",
            base=loaded.base.digest,
            max_tokens=1,
            answer_schema=None if schema is None else json.dumps(schema, ensure_ascii=False),
            copied=() if schema is None else copied_fields(schema, copied, "constrain"),
        )
    )


def _training_rows(task: Task, rows: Sequence[Row]) -> list[TrainingRow]:
    return [
        TrainingRow(f"row-{place}", (*task.messages(request), Message(role="assistant", content=answer)))
        for place, (request, answer) in enumerate(rows)
    ]

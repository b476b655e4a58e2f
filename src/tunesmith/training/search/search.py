"""Searches for better training settings: measures, trains each trial for a number of steps, and checks it.

A trial is a whole training of few steps: the learning rate rises and falls within them, as `train.schedule` says. So
trials of one rung are comparable, and a trial never depends on the ones before it. `halving.py` decides what runs.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.factory import load_model, training_engine
from tunesmith.engines.training_protocol import LoadedModel, TrainableModel
from tunesmith.models.base import Base, model_width, require_context_length
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.batches.batch_plan import TrainingPlan, plan, validation_parts
from tunesmith.training.batches.rows import TrainingRow, render_rows
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.estimates.estimate import (
    check_disk,
    check_memory,
    estimate,
    memory_needs,
    state_bytes,
    trial_step,
)
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.recipe import fit_to_rows
from tunesmith.training.schedule import Annealed, Decay, Decisions, Planned, Schedule, warmup_steps
from tunesmith.training.search.halving import (
    Measured,
    SearchDecisions,
    TrialResult,
    decide_search,
    keep_search,
    successive_halving,
)
from tunesmith.training.search.space import draw_trials, with_values
from tunesmith.training.settings import LEAST_SCORED, PROBABILITY, TrainSettings
from tunesmith.training.state import TrainerState
from tunesmith.training.train import environment
from tunesmith.training.trainer import Trainer

_TIMED = 32  # validation rows that are timed before the first trial

# A model's scores of the first so many validation rows; None stands for the untrained base.
RowScores = Callable[[TrainableModel | None, int], list[float]]


@dataclass(frozen=True)
class SearchOutcome:
    """A search that has ended. trials: the searched settings of each; results: of each trial in each rung."""

    decisions: SearchDecisions
    trials: list[dict[str, Any]]
    results: list[TrialResult]


@dataclass(frozen=True)
class _Search:
    """What all trials share. trials: searched settings by number; the present ones come first."""

    model: LoadedModel
    rows: Sequence[Rendered]
    validation: Sequence[Rendered]
    settings: TrainSettings
    trials: Sequence[dict[str, Any]]
    scores: RowScores | None
    clock: Callable[[], float] = field(default=time.perf_counter)

    def trainable(self, settings: TrainSettings) -> TrainableModel:
        return self.model.trainable(settings, seed=settings.seed, state_bytes=state_bytes(settings))


def search(
    *,
    base: Base,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: TrainSettings,
    within: float,
    work: Path,
    scorable: int = 0,
    scores: RowScores | None = None,
    model: LoadedModel | None = None,
    progress: Progress = SILENT,
    clock: Callable[[], float] = time.perf_counter,
) -> SearchOutcome:
    """Search for better settings within so many seconds. A search that was stopped goes on in its work folder.

    scorable: how many validation rows scores can score; without scores trials are compared by the probability of the
    expected answers. Raises Refused for rows or present settings that cannot be trained here, and where the time is too
    short.
    """
    renderer, context = Renderer(base.folder), require_context_length(base)
    settings = fit_to_rows(settings, len(rows), model_width(base))  # as the training itself would
    shared = _Search(
        model=load_model(base, training_engine(base.family, settings)) if model is None else model,
        rows=render_rows(renderer, rows, settings, context),
        validation=render_rows(renderer, validation, settings, context),
        settings=settings,
        trials=draw_trials(settings, len(rows)),
        scores=scores,
        clock=clock,
    )
    kept = work / "search.json"
    decisions = _decide(shared, within, scorable if scores else 0, work, kept, progress)
    if scores and not decisions.scored_rows:
        progress.say(f"comparing by {PROBABILITY}: the time is too short to score {LEAST_SCORED} answers of each trial")
    with progress.task("searching", within) as task:

        def run(rung: int, trial: int, count: int, seconds: float) -> TrialResult:
            result = _run_trial(shared, decisions.scored_rows, rung, trial, count, seconds, work)
            write_atomic(_file(work, rung, trial), result.model_dump_json().encode())
            task.advance(result.seconds + result.checking)
            progress.say(f"rung {rung + 1}, {_described(shared.trials[trial])}: {_outcome(result)}")
            return result

        def finished(rung: int, trial: int) -> TrialResult | None:
            result = _finished(work, rung, trial, progress)
            task.advance(result.seconds + result.checking if result else 0.0)
            return result

        decided, results = successive_halving(
            decisions,
            within,
            keep=lambda made: keep_search(kept, made),
            finished=finished,
            run=run,
        )
    return SearchOutcome(decided, list(shared.trials[: decided.others + 1]), results)


def _decide(
    shared: _Search, within: float, scorable: int, work: Path, kept: Path, progress: Progress
) -> SearchDecisions:
    """The decisions of a search that was stopped, or new ones. One that was stopped in another environment (a library,
    the number of threads) starts over: its trials could not be compared with new ones."""
    model = shared.trainable(shared.settings)
    here = environment(model)
    before = None
    if kept.is_file():
        with suppress(ValueError):  # damaged
            before = SearchDecisions.model_validate_json(kept.read_bytes())
        if before is not None and before.environment == here:
            progress.say(f"going on with a search that was stopped in rung {len(before.rungs)}")
            return before
        progress.say("the search that was stopped ran in another environment, or is damaged: starting over")
    shutil.rmtree(work, ignore_errors=True)  # also results whose decisions are missing
    work.mkdir(parents=True, exist_ok=True)
    measured, count = _measure(shared, model), len(shared.rows)
    budget = shared.settings.budget
    longest = shared.settings.epochs * count
    if budget is not None:
        longest = min(longest, round(budget / measured.row))
    made = decide_search(
        within,
        measured,
        here,
        available=len(shared.trials) - 1,
        batch=shared.settings.batch,
        longest=max(1, longest),
        scorable=scorable,
    )
    keep_search(kept, made)
    return made


def _measure(shared: _Search, model: TrainableModel) -> Measured:
    """Time a row's training, loss and answer, on the present settings. Raises Refused where memory does not suffice."""
    began = time.perf_counter()
    needs = memory_needs(model, shared.settings, validates=True)
    steps = TrainingPlan(shared.rows, shared.settings, share=model.shares_prefix).epoch(0)
    expected = estimate(steps, 0, 0, trial_step(model, CrossEntropy()), needs)
    some = shared.validation[:_TIMED]
    checking = time.perf_counter()
    _row_fits(model, some, shared.settings)
    answering = time.perf_counter()
    answer = 0.0
    if shared.scores is not None:
        shared.scores(None, len(some))
        answer = (time.perf_counter() - answering) / len(some)
    return Measured(
        row=max(1e-9, expected.seconds / len(shared.rows)),
        loss=(answering - checking) / len(some) * len(shared.validation),
        answer=answer,
        total=time.perf_counter() - began,
    )


def _run_trial(
    shared: _Search, scored: int, rung: int, trial: int, count: int, seconds: float, work: Path
) -> TrialResult:
    """Train a trial on about so many rows, for at most so many seconds, and check it. A trial that its own settings
    keep from being trained (too little memory, a loss that is not finite) has failed; other errors are raised."""
    settings = with_values(shared.settings, shared.trials[trial])
    epochs, more = divmod(count, len(shared.rows))
    steps = epochs * math.ceil(len(shared.rows) / settings.batch) + math.ceil(more / settings.batch)
    rows = _rows_read(shared.rows, settings, steps)
    result = TrialResult(rung=rung, trial=trial, rows=rows, steps=steps, seconds=0.0)
    folder, began = work / f"rung-{rung}-trial-{trial}", shared.clock()
    try:
        done = _train_and_check(shared, settings, scored, result, seconds, folder)
    except TunesmithError as error:
        if error.where is None or not f"{error.where}.".startswith("train."):
            raise
        done = result.model_copy(update={"failed": error.what, "seconds": shared.clock() - began})
    except torch.OutOfMemoryError as error:  # while it was validated
        failed = f"the GPU's memory is full: {str(error)[:200]}"
        done = result.model_copy(update={"failed": failed, "seconds": shared.clock() - began})
    shutil.rmtree(folder, ignore_errors=True)
    return done


def _train_and_check(
    shared: _Search, settings: TrainSettings, scored: int, result: TrialResult, seconds: float, folder: Path
) -> TrialResult:
    began = shared.clock()
    model = shared.trainable(settings)
    repeated = settings.model_copy(update={"budget": None, "epochs": math.ceil(result.rows / len(shared.rows)) + 1})
    steps = TrainingPlan(shared.rows, repeated, share=model.shares_prefix, most=result.steps)
    needs = memory_needs(model, settings, validates=True)
    check_disk(folder, needs)
    needs.memory.reset_peak()
    largest = check_memory(steps.epoch(0), needs)
    expected = needs.memory.peak() + needs.batch(largest) + needs.later
    identity = {"trial": shared.trials[result.trial], "steps": result.steps}
    checkpoints = Checkpoints(folder, identity)
    before = shared.clock() - began
    schedule = _Bounded(_schedule(settings, result.steps, folder), result.steps, seconds - before)
    state = Trainer(model, steps, repeated, checkpoints, schedule=schedule, clock=shared.clock).run()
    result = result.model_copy(
        update={"seconds": before + state.seconds, "expected_bytes": expected, "peak_bytes": needs.memory.peak()}
    )
    if state.step < result.steps:
        done = {"steps": state.step, "rows": _rows_read(shared.rows, settings, state.step)}
        return result.model_copy(update={**done, "cut": f"ended at step {state.step} of {result.steps}: {state.ended}"})
    checking = shared.clock()
    losses, probabilities = _row_fits(model, shared.validation, shared.settings)
    labels = sum(map(label_count, shared.validation))
    loss = math.fsum(losses) / labels
    if not math.isfinite(loss):
        raise TunesmithError(f"the validation loss became {loss}", where="train.learning_rate")
    scores = shared.scores(model, scored) if shared.scores is not None and scored else []
    return result.model_copy(
        update={
            "checking": shared.clock() - checking,
            "loss": loss,
            "probability": math.fsum(probabilities) / labels,
            "probabilities": tuple(probabilities),
            "scores": tuple(scores),
        }
    )


def _rows_read(rows: Sequence[Rendered], settings: TrainSettings, steps: int) -> int:
    """How many rows a training reads in its first so many steps, of which each epoch's may include a smaller one."""
    epochs, more = divmod(steps, math.ceil(len(rows) / settings.batch))
    return epochs * len(rows) + sum(map(len, plan(rows, settings.batch, settings.seed, epochs)[:more]))


class _Bounded:
    """A trial's schedule, which ends the trial where it has taken its seconds and steps are left."""

    def __init__(self, inner: Schedule, steps: int, seconds: float) -> None:
        self._inner, self._steps, self._seconds = inner, steps, seconds
        self.rate, self.validates = inner.rate, inner.validates

    def decide(self, state: TrainerState) -> str | None:
        """Decide as the schedule does; end the trial where its time is used."""
        said = self._inner.decide(state)
        if state.ended is None and state.step < self._steps and state.seconds > self._seconds:
            state.ended = "the time of the search was used"
        return said


def _schedule(settings: TrainSettings, steps: int, folder: Path) -> Schedule:
    """The schedule of a trial: the training's own over the trial's steps, decided beforehand."""
    if settings.schedule != "wsd":
        return Planned(steps, settings)
    fall = min(steps, max(1, round(settings.decay * steps)))
    decay = Decay(start=steps - fall, stop=steps, reason="the trial's steps are done")
    warmup = warmup_steps(settings, steps)
    decisions = Decisions(warmup=warmup, validate_every=steps, scored_rows=0, seconds=0.0, decays=(decay,))
    return Annealed(steps, settings, decisions, folder / "decisions.json", budget=None)


def _row_fits(
    model: TrainableModel, rows: Sequence[Rendered], settings: TrainSettings
) -> tuple[list[float], list[float]]:
    """The sums of each row's losses and of its probabilities over its labels, in batches of the settings' size.

    All trials are checked in the same batches: one that learned nothing then has exactly the loss of another one.
    """
    found, probabilities = [0.0] * len(rows), [0.0] * len(rows)
    for part in validation_parts(rows, settings, share=model.shares_prefix):
        some = [rows[row] for row in part]
        losses = model.label_losses(lay_out(some, share=model.shares_prefix))
        for row, own in zip(part, losses.split([label_count(each) for each in some]), strict=True):
            found[row] = math.fsum(own.tolist())
            probabilities[row] = math.fsum(own.neg().exp().tolist())
    return found, probabilities


def _file(work: Path, rung: int, trial: int) -> Path:
    return work / f"rung-{rung}-trial-{trial}.json"


def _finished(work: Path, rung: int, trial: int, progress: Progress) -> TrialResult | None:
    """The result of a trial that ran before the search was stopped."""
    path = _file(work, rung, trial)
    if not path.is_file():
        return None
    try:
        return TrialResult.model_validate_json(path.read_bytes())
    except ValueError:
        progress.say(f"the result {path.name} is damaged: the trial runs again")
        return None


def _described(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items())


def _outcome(result: TrialResult) -> str:
    if result.failed is not None:
        return f"left out: {result.failed}"
    if result.cut is not None:
        return result.cut
    score = "" if result.score is None else f"score {result.score:.1%}, "
    fit = f"probability {result.probability:.4f}, loss {result.loss:.4f}"
    return f"{score}{fit} after {result.steps} steps ({result.seconds + result.checking:.0f} s)"

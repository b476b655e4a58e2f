"""Searches for better training settings with Optuna: each trial is a training, and most are pruned where they validate.

The sampler is seeded by the trial's number, so that a trial's settings follow from the results before it. A search that
was killed gives Optuna its finished trials again, from their files, so Optuna's study is kept in memory only.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from pydantic import BaseModel

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress, Task
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.training_protocol import LoadedModel, TrainableModel
from tunesmith.training.batches.batch_plan import validation_parts
from tunesmith.training.schedule import TrainerState
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingSpec
from tunesmith.training.train import run_training

METHOD = f"Optuna {optuna.__version__}: TPE sampler, successive halving pruner"
_KEPT_SHARE = 3  # about one in so many is not pruned after the first validation, the third, the ninth
_RANDOM = 5  # trials before the sampler learns from them
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}

RowScores = Callable[[TrainableModel], list[float]]


class Trial(BaseModel, frozen=True):
    """A trial that has ended.

    params: as Optuna drew them. settings: the same, to write under `train:`. why: it failed. reports: the mean
    probability of the validation labels at each validation; probability: at the end. probabilities: of each validation
    row, the sum over its labels. scores: of each row, where answers were scored.
    """

    number: int
    params: dict[str, Any]
    settings: dict[str, Any]
    outcome: Literal["complete", "pruned", "failed"] = "complete"
    why: str | None = None
    seconds: float = 0.0
    reports: tuple[float, ...] = ()
    probability: float | None = None
    probabilities: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def score(self) -> float | None:
        """The mean score; None where answers were not scored."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else None

    @property
    def value(self) -> float | None:
        """What Optuna maximises: the score, and among equals the probability. None where the trial is not complete."""
        if self.probability is None or self.score is None:
            return self.probability
        return self.score + 1e-6 * self.probability


def search_space(settings: TrainSettings, rows: int) -> dict[str, BaseDistribution]:
    """What a search draws. rows: training rows, which bound the batch. The learning rate is drawn up to ten times
    around the method's default, and as far as the present one. The rank stays where an alpha belongs to it."""
    rate, default = settings.learning_rate, _default_rate(settings)
    batches = {max(1, settings.batch // 2), settings.batch, max(settings.batch, min(2 * settings.batch, rows, 4096))}
    space: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(min(rate, default / 10), max(rate, 10 * default), log=True),
        "batch": CategoricalDistribution(sorted(batches)),
    }
    if settings.method == "lora":
        space["b_rate"] = CategoricalDistribution(sorted({1.0, 4.0, settings.b_rate}))
        if settings.alpha is None:
            ranks = {max(1, settings.rank // 2), settings.rank, min(1024, 2 * settings.rank)}
            space["rank"] = CategoricalDistribution(sorted(ranks))
    return space


def search(
    spec: TrainingSpec,
    model: LoadedModel,
    work: Path,
    *,
    trials: int,
    within: float | None = None,
    scores: RowScores | None = None,
    progress: Progress = SILENT,
) -> list[Trial]:
    """Train with the settings of spec and with others; returns so many trials, the present settings first.

    within: seconds after which no further trial begins. scores: scores a model's answers to validation rows; without it
    trials are compared by the probability of the expected answers. work: an existing folder, in which a search that was
    stopped goes on with the trial that had not ended. Raises what run_training raises for other reasons than a trial's
    own settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_KEPT_SHARE)
    study = optuna.create_study(pruner=pruner, direction="maximize")
    space = search_space(spec.settings, len(spec.rows.read()))
    present = {key: getattr(spec.settings, key) for key in space}
    first = {0: present, 1: {**present, "learning_rate": _default_rate(spec.settings)}}
    done: list[Trial] = []
    with progress.task("searching", trials) as task:
        for number in range(trials):
            trial, kept, began = None, work / f"trial-{number}.json", time.perf_counter()
            with suppress(OSError, ValueError):  # not there, or damaged: it runs again
                trial = Trial.model_validate_json(kept.read_bytes())
            if trial is None and within is not None and math.fsum(each.seconds for each in done) >= within:
                break
            study.sampler = optuna.samplers.TPESampler(seed=spec.settings.seed + number, n_startup_trials=_RANDOM)
            if params := trial.params if trial else first.get(number):
                study.enqueue_trial(params)
            asked = study.ask(space)
            if trial is None:
                trial = _run(spec, model, asked, work / f"trial-{number}", scores, task)
                trial = trial.model_copy(update={"seconds": time.perf_counter() - began})
                write_atomic(kept, trial.model_dump_json().encode())
                progress.say(_described(trial))
            else:
                for place, probability in enumerate(trial.reports, 1):
                    asked.report(probability, place)
                    asked.should_prune()  # the pruner keeps what it compares
            study.tell(asked, trial.value, _STATES[trial.outcome])
            done.append(trial)
            task.advance()
    return done


def _default_rate(settings: TrainSettings) -> float:
    return TrainSettings.model_validate({"method": settings.method}).learning_rate


def _run(
    spec: TrainingSpec, model: LoadedModel, asked: optuna.Trial, folder: Path, scores: RowScores | None, task: Task
) -> Trial:
    """Train a trial and score it. One that its own settings keep from being trained (too little memory, a loss that is
    not finite) has failed; other errors are raised."""
    values = {**asked.params, "learning_rate": float(f"{asked.params['learning_rate']:.3g}")}
    fixed = {"keep": "last", "rehearse": 0.0, "checkpoint_seconds": 1e9}
    settings = TrainSettings(**{**spec.settings.model_dump(), **values, **fixed})
    given = spec.model_copy(update={"settings": settings, "work": folder, "metrics": None})
    reports, trained = list[float](), list[TrainableModel]()

    def watch(state: TrainerState, now: TrainableModel) -> None:
        task.advance(0)  # raises Stopped where the work was told to stop
        trained[:] = [now]
        for check in state.validation[len(reports) :]:
            reports.append(check["probability"])
            asked.report(reports[-1], len(reports))
            if asked.should_prune() and len(reports) < settings.validations:
                raise optuna.TrialPruned

    shutil.rmtree(folder, ignore_errors=True)  # of a search that was killed
    stated: dict[str, Any] = {}
    try:
        run_training(given, model=model, watch=watch)
        stated = _validated(trained[0], spec)
        stated["scores"] = scores(trained[0]) if scores else ()
    except optuna.TrialPruned:
        stated["outcome"] = "pruned"
    except (TunesmithError, torch.OutOfMemoryError) as error:
        if not f"{getattr(error, 'where', 'train')}.".startswith("train."):
            raise
        stated = {"outcome": "failed", "why": getattr(error, "what", str(error))}
    shutil.rmtree(folder, ignore_errors=True)
    return Trial(number=asked.number, params=asked.params, settings=values, reports=tuple(reports), **stated)


def _validated(model: TrainableModel, spec: TrainingSpec) -> dict[str, Any]:
    """How probable a trained model finds the answers of the validation rows.

    All trials are checked in the same batches: of one that learned nothing they are then exactly those of another one.
    """
    rows = spec.validation.read()
    sums = [0.0] * len(rows)
    for part in validation_parts(rows, spec.settings, share=model.shares_prefix):
        some = [rows[row] for row in part]
        losses = model.label_losses(lay_out(some, share=model.shares_prefix))
        for row, own in zip(part, losses.split([label_count(each) for each in some]), strict=True):
            sums[row] = math.fsum(own.neg().exp().tolist())
    return {"probability": math.fsum(sums) / sum(map(label_count, rows)), "probabilities": sums}


def _described(trial: Trial) -> str:
    values = ", ".join(f"{key} {value:g}" for key, value in trial.settings.items())
    said = trial.why or f"pruned after {len(trial.reports)} validations"
    if trial.probability is not None:
        score = "" if trial.score is None else f"score {trial.score:.1%}, "
        said = f"{score}probability {trial.probability:.4f} ({trial.seconds:.0f} s)"
    return f"trial {trial.number} ({values}): {said}"

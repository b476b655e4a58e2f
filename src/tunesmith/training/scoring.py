"""Validation while a training runs: the loss of validation rows, and the score of generated answers to them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.core.errors import NextStep, Refused
from tunesmith.core.progress import Progress
from tunesmith.engines.batch import Batch
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.records.training import Decisions, Estimate, ValidationScore
from tunesmith.training.batches.batch_plan import TrainingPlan
from tunesmith.training.batches.rehearsal import Rehearsal
from tunesmith.training.beside import Rival
from tunesmith.training.schedule import keep_decisions, read_decisions, warmup_steps
from tunesmith.training.settings import LEAST_SCORED, UNSCORED, TrainSettings
from tunesmith.training.steps import validation_fit

_TIMED = 32  # rows whose answers are timed before the first step, where a budget is to be divided
_FEW = 4  # rows whose answers are timed before those, and for the estimate alone
_MOST_MEASURED = 0.5  # of the budget
_ONE_SHARE = 0.04  # of the steps' time, for the answers of one validation
_ALL_SHARE = 0.2  # of the steps' time, for all validations


class BudgetTooShort(Refused):
    """A training's budget holds no step and validation. least: seconds that measuring and the first steps take."""

    def __init__(self, what: str, *, least: float, fix: str) -> None:
        super().__init__(what, where="train.budget", fix=fix)
        self.least = least


class Score(NamedTuple):
    """A mean of scores from 0 to 1, and its standard error."""

    mean: float
    error: float


class AnswerScore(NamedTuple):
    """Scores generated answers to validation rows.

    metric: the score's name. rows: how many there are. score: of a model's answers to the first so many rows; None asks
    the untrained base for answers as long as the expected ones, to see how much time they take. Raises TunesmithError
    where answers cannot be scored. rival: the untuned candidate that is shown beside the first so many rows, if any.
    """

    metric: str
    rows: int
    score: Callable[[TrainableModel | None, int], Score]
    rival: Callable[[int], Rival | None] = lambda _rows: None


def mean_score(scores: Sequence[float], groups: Sequence[str]) -> Score:
    """The mean of the rows' scores. Its error counts rows of one group together: they tend to be right or wrong
    together (the sandwich estimator with a factor for few groups: Liang and Zeger 1986, Biometrika 73). One group alone
    counts as rows."""
    mean = math.fsum(scores) / len(scores)
    names: Sequence[object] = groups if len(set(groups)) > 1 else range(len(scores))
    sums: defaultdict[object, float] = defaultdict(float)
    for score, name in zip(scores, names, strict=True):
        sums[name] += score - mean
    factor = len(sums) / max(1, len(sums) - 1)
    return Score(mean, math.sqrt(factor * math.fsum(each**2 for each in sums.values())) / len(scores))


class Validation:
    """Validates the model that is being trained."""

    def __init__(
        self,
        model: TrainableModel,
        batches: Sequence[Batch],
        score: AnswerScore | None,
        *,
        ranks: Ranks = ALONE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The answers to `rows` rows are scored, at first all; 0: none (see TrainerState.best). clock: seconds, which
        time answers and validations."""
        self.model, self.batches, self.score = model, batches, score
        self.ranks, self.clock = ranks, clock
        self.rows = 0 if score is None else score.rows

    def measure(self) -> Mapping[str, float]:
        """The validation loss and the mean probability of the labels, and the score with its standard error where
        answers are scored."""
        fit = validation_fit(self.model, self.batches, self.ranks)
        if self.score is not None and self.rows:
            score = self.score.score(self.model, self.rows)
            fit["score"], fit["score_error"] = self.ranks.agree(lambda: score)
        return fit

    def described(self) -> ValidationScore | None:
        """What answers are scored by; None where there is no score."""
        return ValidationScore(metric=self.score.metric, rows=self.rows) if self.score and self.rows else None

    def notices(self) -> list[str]:
        """Says that answers are not scored although they could be, where that is so."""
        if self.score is None or self.rows:
            return []
        return [f"{UNSCORED}: fewer than {LEAST_SCORED} answers fit into {_ONE_SHARE:.1%} of the budget"]

    def seconds(self, budget: float) -> tuple[float, float]:
        """Measured seconds of a validation loss, and of a row's answer by the untrained base.

        More rows at once take less time each. Where a few take so long that the fewest rows that are scored could not
        be answered within their share of the budget even if they took no longer than these, no more are timed.
        """
        began = self.clock()
        if self.batches:
            validation_fit(self.model, self.batches, self.ranks)
        loss, answer = self.clock() - began, self.answer_seconds()
        if answer * _FEW * LEAST_SCORED / _TIMED <= _ONE_SHARE * budget:
            answer = self.answer_seconds(_TIMED)
        return loss, answer

    def answer_seconds(self, most: int = _FEW) -> float:
        """Measured seconds of a row's answer by the untrained base, over at most so many rows; 0 without a score.

        They are as long as the expected ones, as those of a tuned model mostly are. More rows at once take less time
        each, so it is rather too much.
        """
        if self.score is None:
            return 0.0
        timed, began = min(most, self.score.rows), self.clock()
        self.score.score(None, timed)
        return (self.clock() - began) / timed


def decide_beforehand(
    settings: TrainSettings,
    plan: TrainingPlan,
    expected: Estimate,
    validation: Validation,
    rehearsal: Rehearsal,
    kept: Path,
    progress: Progress,
) -> Decisions:
    """What is decided before the first step; what an earlier run of this training decided is taken from `kept`.

    Raises BudgetTooShort for a budget that holds no step and validation.
    """
    ranks = validation.ranks
    if (before := ranks.agree(lambda: _decided(kept))) is not None:
        return Decisions.model_validate(before)
    measured, rows, steps = 0.0, validation.rows, float(len(plan))
    each: float | None = None
    every = math.ceil(steps / settings.validations)
    if (budget := settings.budget) is not None:
        began = validation.clock()
        loss, answer = validation.seconds(budget)
        measured = rehearsal.seconds + validation.clock() - began
        _check_budget(budget, measured, measured + 4 * expected.step_seconds + loss, validation, rehearsal)
        step = max(expected.step_seconds, 1e-9)
        steps = min(steps, budget / step)  # few rows are read often before a budget ends
        rows = _scored_within(budget, steps * step, answer, validation, progress)
        each = loss + rows * answer
        every = round(steps / min(settings.validations, max(1.0, _ALL_SHARE * steps * step / max(each, 1e-9))))
    made = Decisions(
        warmup=warmup_steps(settings, steps),
        validate_every=max(1, min(len(plan), every)),
        scored_rows=rows,
        seconds=measured,
        validation_seconds=each,
        rehearsed=rehearsal.answers,
        decays=(),
    )
    if ranks.first:
        keep_decisions(kept, made)
    return made


def _decided(kept: Path) -> dict[str, Any] | None:
    """What was kept; None where nothing was decided yet. Steps that a checkpoint holds obeyed what was decided."""
    try:
        if (before := read_decisions(kept)) is not None:
            return before.model_dump(mode="json")
        if not any(kept.parent.glob("step-*")):
            return None
        problem = "is missing"
    except ValueError:
        problem = "cannot be read"
    raise Refused(
        f"what this training decided before it was stopped {problem}",
        where=str(kept),
        fix=NextStep("train again from the start", "train", restart=True),
    )


def _check_budget(budget: float, measured: float, least: float, validation: Validation, rehearsal: Rehearsal) -> None:
    """measured: seconds that measuring took. least: seconds with four steps and one validation after it."""
    enough = max(least, measured / _MOST_MEASURED)
    if enough <= budget:
        return
    before = "drawing what is rehearsed and measuring" if rehearsal.answers else "measuring"
    half = ", more than half of it" if least <= budget else ""
    otherwise = "" if validation.score is None else ", or set validate_by: loss, which measures no answers"
    if 2 * rehearsal.seconds > measured:
        otherwise = ", or leave rehearse out"
    raise BudgetTooShort(
        f"the budget of {_told(budget)} is too short: {before}, four steps and one validation take "
        f"{_told(least)}, of which {before} took {_told(measured)}{half}",
        least=enough,
        fix=f"set budget to {math.ceil(10 * least)}s or more{otherwise}",
    )


def _scored_within(budget: float, seconds: float, answer: float, validation: Validation, progress: Progress) -> int:
    """How many rows each validation answers; 0 where the budget has time for too few. seconds: of all steps; answer:
    seconds of one."""
    if validation.score is None:
        return 0
    most, each = validation.score.rows, max(answer, 1e-9)
    if (affordable := min(most, int(_ONE_SHARE * budget / each))) >= LEAST_SCORED:
        return max(LEAST_SCORED, min(most, int(_ONE_SHARE * seconds / each)))
    progress.say(
        f"{UNSCORED}: within this budget {affordable} answers of {answer:.2g} s could be scored each time, and fewer "
        f"than {LEAST_SCORED} say too little"
    )
    return 0


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"

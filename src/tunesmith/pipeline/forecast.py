"""The stage `forecast`: trains on subsets of the rows, scores answers to validation rows, and extrapolates the scores.

The trainings and the answers are stages of their own, so that a forecast which was stopped goes on with what is done.
No test row can be read meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tunesmith.candidates.candidate import Candidate, load_candidate, put_candidate
from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.data.dataset import Example
from tunesmith.evaluation.gates.settings import BEST_UNTUNED, Lift
from tunesmith.evaluation.learning_curve import CONFIDENCE, Measured, extrapolate
from tunesmith.evaluation.prices import break_even, price_of
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.stats.statistics import MINIMUM_GROUPS, Floats, effective_groups
from tunesmith.pipeline.answers import answers, answers_of, scores_of
from tunesmith.pipeline.candidates import untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.training import fitted, leading_inputs, leading_scores, train_candidate
from tunesmith.project import ProjectSettings
from tunesmith.records.evaluation import AnswerPrice, AnswersBody
from tunesmith.records.training import ExpectedTraining, ForecastBody, SubsetScore, TrainingBody
from tunesmith.training.batches.rows import row_count
from tunesmith.training.estimates.estimate import subset_settings, subset_sizes
from tunesmith.training.settings import TrainSettings

_LEAST_SUBSETS = 3


def forecast(context: PipelineContext, name: str, *, rows: int | None = None, goal: float | None = None) -> str:
    """Digest of a candidate's forecast.

    rows: of the largest subset. goal: the lift from which tuning pays; None takes the lift gate's bound. Raises
    Inconclusive where there are too few rows, UsageError for a candidate that is not trained for use and for a primary
    metric that no function computes.
    """
    settings, project = context.settings_of(name), context.project.settings
    train = settings.train
    if train is None or train.permute_answers or train.canaries:
        raise UsageError(
            f"candidate {name!r} is not trained for use, so there is nothing to forecast", where=f"candidates.{name}"
        )
    context.require_one_process()
    leading_scores(context)  # before anything is asked: raises UsageError for a judge, and a function that cannot run
    context = context.without_test_rows()
    whole = row_count(context.dataset.splits["train"], train)
    sizes = _sizes(context, whole, rows)
    gate, untuned = lift_gate(project), _rivals(project)
    given = {each: answers(context, each, "validation") for each in untuned}
    plain = untrained_candidate(context, name, settings)
    subsets = {}
    for size in sizes:
        # Of four, the smallest may be left out: on a slow machine its share of a budget holds no step.
        may_fail = size == sizes[0] and len(sizes) > _LEAST_SUBSETS
        if made := _subset(context, name, plain, subset_settings(train, size, whole), may_fail=may_fail):
            subsets[size] = made
    goal = goal if goal is not None else gate.at_least if gate is not None else 0.0
    whole_training = {**fitted(context, plain, train).model_dump(include={"budget", "epochs", "seed"}), "rows": whole}
    inputs = {
        "untuned": given,
        "subsets": {str(size): digest for size, (_, digest) in subsets.items()},
        "metric": leading_inputs(context),
        "goal": goal,
        "training": whole_training,
        "prices": project.prices and project.prices.model_dump(mode="json"),
        "tokens": {each: tokens and tokens.model_dump(mode="json") for each, tokens in _tokens(project).items()},
    }

    def conclude(_work: Path) -> str:
        body = _forecast(context, name, given, subsets, whole_training, goal)
        parents = {"dataset": context.dataset.digest, **{f"answers:{each}": digest for each, digest in given.items()}}
        parents |= {f"subset:{size}": digest for size, (_, digest) in subsets.items()}
        return context.store.put_record(body.record(parents))

    return context.stages.run(f"forecast of {name}", "forecast", inputs, conclude)


def _subset(
    context: PipelineContext, name: str, plain: Candidate, train: TrainSettings, *, may_fail: bool
) -> tuple[str, str] | None:
    """Digests of a training on a subset, and of its model's answers to the validation rows.

    may_fail: None is returned where the subset's share of the budget is too short, and Refused is not raised.
    """
    from tunesmith.training.scoring import BudgetTooShort

    title = f"{name} on {train.rows} rows"
    try:
        trained = train_candidate(context, title, plain, train)
    except BudgetTooShort as error:
        what = f"{title}: its share of the budget, {train.budget:.2g} s, is too short to train"
        if may_fail:
            context.progress.say(f"{what}: it is left out")
            return None
        raise Refused(what, where="the largest subset", fix="give more rows, or a longer train.budget") from error
    made = put_candidate(context.store, plain.model_copy(update={"training": trained}))
    return trained, answers_of(context, made, "validation", title=title)


def _sizes(context: PipelineContext, whole: int, largest: int | None) -> list[int]:
    """The rows of the subsets. Raises Inconclusive where there are too few rows to forecast from."""
    sizes = subset_sizes(whole, largest)
    if len(sizes) < _LEAST_SUBSETS:
        what = f"of {whole:,} training rows, subsets of {sizes} rows are too few to forecast from"
        raise Inconclusive(what, where="data", fix="forecast from more rows, or train: so few rows take a minute")
    if (held := effective_groups([row.group for row in context.dataset.examples("validation")])) < MINIMUM_GROUPS:
        what = f"{held:.1f} groups of validation rows are too few to forecast from: it takes {MINIMUM_GROUPS}"
        raise Inconclusive(what, where="data.split.validation", fix="raise it, or collect rows of more groups")
    return sizes


def lift_gate(project: ProjectSettings) -> Lift | None:
    """The first gate that asks for a lift of the primary metric over an untuned candidate."""
    untuned = (BEST_UNTUNED, *project.untuned)
    lifts = (gate for gate in project.gates.values() if isinstance(gate, Lift) and gate.metric == project.task.leading)
    return next((gate for gate in lifts if gate.over in untuned), None)


def _rivals(project: ProjectSettings) -> list[str]:
    """Names of the candidates that a training has to beat: the one that the lift gate names, or all untuned ones."""
    gate = lift_gate(project)
    return project.untuned if gate is None or gate.over == BEST_UNTUNED else [gate.over]


def _tokens(project: ProjectSettings) -> dict[str, TokenPrice | None]:
    """Prices of endpoints' tokens."""
    return {name: each.endpoint.price for name, each in project.candidates.items() if each.endpoint}


def _forecast(
    context: PipelineContext,
    name: str,
    given: Mapping[str, str],
    subsets: Mapping[int, tuple[str, str]],
    whole: Mapping[str, Any],
    goal: float,
) -> ForecastBody:
    """given: the untuned candidates' answers. whole: settings of the training on all rows."""
    project, rows = context.project.settings, context.dataset.examples("validation")
    untuned = {each: scores_of(context, digest, "validation") for each, digest in given.items()}
    scores = {size: scores_of(context, digest, "validation") for size, (_, digest) in subsets.items()}
    measured = Measured(list(scores), _columns(scores, rows), _columns(untuned, rows), [row.group for row in rows])
    said = extrapolate(measured, whole["rows"], context.dataset.splits["test"], goal, whole["seed"])
    means = {who: rounded(fmean(values)) for who, values in untuned.items()}
    rival = max(sorted(means), key=means.__getitem__, default=None)
    trainings = {size: TrainingBody.read(context.store, one) for size, (one, _) in subsets.items()}
    largest = max(trainings)
    last, each = trainings[largest], trainings[largest].seconds / largest
    epochs = last.epochs if whole["budget"] else whole["epochs"]
    seconds = whole["budget"] or each / last.epochs * epochs * whole["rows"]
    money = None if project.prices is None else rounded(seconds / 3600.0 * project.prices.machine_hour)
    own = _price(context, subsets[largest][1])
    larger = said.from_rows
    return ForecastBody(
        **dict(said),
        name=name,
        metric=project.task.leading,
        rows=whole["rows"],
        held={"validation": len(rows)},
        seconds=rounded(sum(body.seconds for body in trainings.values())),
        confidence=CONFIDENCE,
        goal=goal,
        rival=rival,
        rivals=means,
        subsets=tuple(
            SubsetScore(rows=size, epochs=rounded(body.epochs), mean=rounded(fmean(scores[size])))
            for size, body in trainings.items()
        ),
        from_seconds=None if larger is None else rounded(each * sum(subset_sizes(whole["rows"], larger))),
        training=ExpectedTraining(seconds=rounded(seconds), epochs=rounded(epochs), money=money),
        break_even=None if rival is None else break_even(own, money, _price(context, given[rival])),
        currency=None if project.prices is None else project.prices.currency,
    )


def _columns(scores: Mapping[Any, Sequence[float]], rows: Sequence[Example]) -> Floats:
    return np.array(list(scores.values()), dtype=np.float64).reshape(len(scores), len(rows)).T


def _price(context: PipelineContext, given: str) -> AnswerPrice:
    """What 1,000 answers take and cost."""
    record = context.store.record(given, kind="answers")
    body, asked = AnswersBody.of(record), load_candidate(context.store, record.parents["candidate"])
    project, remote = context.project.settings, asked.endpoint is not None
    tokens = (body.prompt_tokens or 0, body.completion_tokens or 0)
    return price_of(body.n, (*tokens, body.seconds), project.prices, _tokens(project).get(asked.name), remote=remote)

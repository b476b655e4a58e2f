"""The stages `curve` and `forecast`: short trainings on subsets of the rows, and what they say about the whole one.

The scores are of validation rows, and of training rows that were held out of all subsets. A curve is measured with a
dataset whose test rows cannot be read. A forecast takes their groups alone, which say how much chance there is in what
they will measure. Time decides how many rows are asked and trained on. What was measured is written down before
anything is decided by it, so that a forecast that was stopped goes on with what it has.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import Composer
from tunesmith.candidates.search import tried_rows
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import Task
from tunesmith.data.dataset import Example
from tunesmith.data.splitting.duplicates import request_text
from tunesmith.evaluation.forecasting.conclude import LOSS, Wanted, conclude
from tunesmith.evaluation.forecasting.plan import (
    FIRST,
    MOST_EPOCHS,
    PILOT,
    SMALLEST,
    Answered,
    check_pilots,
    contenders,
    epochs_of,
    fitting,
    next_part,
    no_steps,
    subset_plan,
)
from tunesmith.evaluation.forecasting.rows import Reserved, reserve
from tunesmith.evaluation.gates.settings import BEST_UNTUNED, Gates, Lift
from tunesmith.evaluation.report.wording import duration
from tunesmith.evaluation.scores import column, encode_scores, rounded
from tunesmith.pipeline.candidates import answerer, candidate, untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.held_out import ask_held_out, ask_losses, kept, mean, together
from tunesmith.pipeline.training import fitted, leading_inputs, leading_scoring, scored_rows, training_inputs
from tunesmith.project import ProjectSettings
from tunesmith.store.records import Record
from tunesmith.training.batches.rows import TrainingRow, training_rows
from tunesmith.training.estimates.subsets import nested, subset_settings
from tunesmith.training.recipe import epochs_for, leaves_epochs_open
from tunesmith.training.settings import TrainSettings

if TYPE_CHECKING:
    from tunesmith.engines.training_protocol import UnloadingEngine


@dataclass(frozen=True)
class _Forecast:
    """One forecast under way. name: the candidate's; budget: seconds, by the clock; untuned: candidates, by name.

    engine: asks the models of the subsets. task: shows the seconds that are used.
    """

    context: PipelineContext
    name: str
    tuned: Candidate
    settings: TrainSettings
    untuned: Mapping[str, Candidate]
    rows: Reserved
    budget: float
    work: Path
    engine: UnloadingEngine
    task: Task
    clock: Callable[[], float]

    def part(self, file: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What make returns, kept in a file of the work folder. Raises Stopped after that where the work is to stop."""
        found = kept(self.work / file, make)
        self.task.advance(_spent(found))
        return found


def curve(context: PipelineContext, name: str, budget: float, *, clock: Callable[[], float] = time.perf_counter) -> str:
    """Digest of the scores of short trainings of a candidate, within so many seconds by the clock.

    Raises Inconclusive where there are too few rows, Refused where the budget is too short, UsageError for a candidate
    that is not trained and a primary metric that no function computes.
    """
    project = context.project.settings
    settings = context.settings_of(name)
    if settings.train is None or settings.train.permute_answers or settings.train.canaries:
        raise UsageError(
            f"candidate {name!r} is not trained for use, so there is nothing to forecast", where=f"candidates.{name}"
        )
    context.require_one_process()
    leading_scoring(context)  # before anything is asked: raises UsageError for a judge, and a function that cannot run
    context = context.without_test_rows()
    found = untrained_candidate(context, name, settings)
    untuned = {each: candidate(context, each) for each in _rivals(project)}
    inputs = {
        "training": training_inputs(context, name, found, settings.train),
        "tuned": found.untrained_digest,
        "untuned": untuned,
        "metric": leading_inputs(context),
        "budget": budget,
        "engine": context.engine_kind,
    }

    def measure(work: Path) -> str:
        assert settings.train is not None
        loaded = {each: load_candidate(context.store, digest) for each, digest in untuned.items()}
        rows = _reserved(context, settings.train, [found, *loaded.values()])
        engine = context.model.engine()
        with context.progress.task(f"forecast of {name}", budget) as task:
            made = _Forecast(context, name, found, settings.train, loaded, rows, budget, work, engine, task, clock)
            try:
                body, scores = _measured(made)
            except Refused:
                shutil.rmtree(work, ignore_errors=True)  # times are measured again: the machine may have been busy
                raise
        parents = {"base": context.base.digest, "dataset": context.dataset.digest, **found.documents_parent}
        parents |= {f"candidate:{each}": digest for each, digest in untuned.items()}
        blobs = {"scores.jsonl": context.store.put_bytes(scores)}
        return context.store.put_record(Record(kind="curve", parents=parents, blobs=blobs, body=body))

    return context.stages.run(f"curve of {name}", "curve", inputs, measure)


def forecast(
    context: PipelineContext,
    name: str,
    *,
    budget: float,
    goal: float | None,
    days: float,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """Digest of a candidate's forecast. goal: None takes the lift gate's bound. Raises what `curve` raises."""
    if goal is not None and not -1.0 <= goal <= 1.0:
        raise UsageError(f"a lift is from -1 to 1, not {goal}", where="--goal", fix="write 0.1 for ten points")
    measured = curve(context, name, budget, clock=clock)
    project = context.project.settings
    gate = lift_gate(project.gates, project.task.leading, _rivals(project))
    endpoints = {each: other.endpoint for each, other in project.candidates.items() if other.endpoint}
    wanted = Wanted(
        goal=goal if goal is not None else gate.at_least if gate is not None else 0.0,
        over=gate.over if gate is not None and gate.over != BEST_UNTUNED else None,
        days=days,
        prices=project.prices,
        tokens={each: endpoint.price for each, endpoint in endpoints.items() if endpoint.price},
    )
    inputs = {
        "curve": measured,
        "goal": wanted.goal,
        "over": wanted.over,
        "days": days,
        "prices": None if wanted.prices is None else wanted.prices.model_dump(mode="json"),
        "tokens": {each: price.model_dump(mode="json") for each, price in wanted.tokens.items()},
    }

    def decide(_work: Path) -> str:
        groups = [row.group for row in context.dataset.examples("test")]
        body = conclude(context.store, measured, groups, wanted)
        return context.store.put_record(Record(kind="forecast", parents={"curve": measured}, body=body))

    return context.stages.run(f"forecast of {name}", "forecast", inputs, decide)


def _rivals(project: ProjectSettings) -> list[str]:
    """Names of the candidates that a training has to beat: the one that the lift gate names, or all untuned ones."""
    untuned = [name for name, each in project.candidates.items() if not (each.adapted or each.version)]
    gate = lift_gate(project.gates, project.task.leading, untuned)
    return untuned if gate is None or gate.over == BEST_UNTUNED else [gate.over]


def lift_gate(gates: Gates, metric: str, untuned: Sequence[str]) -> Lift | None:
    """The first gate that asks for a lift of a metric over an untuned candidate."""
    lifts = (gate for gate in gates.values() if isinstance(gate, Lift) and gate.metric == metric)
    return next((gate for gate in lifts if gate.over in (BEST_UNTUNED, *untuned)), None)


def _reserved(context: PipelineContext, settings: TrainSettings, candidates: Sequence[Candidate]) -> Reserved:
    shown = {request_text(shot) for each in candidates for shot in each.shots}
    rows = training_rows(context.dataset.examples("train"), settings)
    project, validation = context.project.settings, context.dataset.examples("validation")
    searches = [search for each in candidates if (search := project.candidates[each.name].search) is not None]
    chose = {row.group for search in searches for row in tried_rows(validation, search)}
    by_time = project.data.split.time is not None
    return reserve(rows, validation, shown, seed=settings.seed, lend=not by_time, chose=chose)


def _measured(made: _Forecast) -> tuple[dict[str, Any], bytes]:
    """The record's body, and its scores."""
    # As the training of all rows will have them, which is how its record and this one are found to belong together.
    settings = fitted(made.context, made.settings)
    metric = made.context.project.settings.task.leading
    asking = _Asking(made)
    subsets, largest = _train_subsets(made, asking)
    everyone = {**asking.given, **{f"{each['rows']} rows": each for each in subsets}}
    columns = []
    for who, each in everyone.items():
        for what, values in ((metric, each["scores"]), (LOSS, each.get("losses", ()))):
            pairs = zip(made.rows.held[: len(values)], values, strict=True)
            columns.append(column(who, what, {one.id: (one.group, value) for one, value in pairs}))
    own = min(asking.rows, made.rows.validation)
    on_server = made.context.project.settings.server is not None
    body = {
        "name": made.name,
        "tuned": made.tuned.untrained_digest,
        "splits": list(made.context.dataset.readable),
        "metric": metric,
        "settings": settings.model_dump(mode="json"),
        "usual_epochs": leaves_epochs_open(made.settings),
        "seed": settings.seed,
        "budget": made.budget,
        "seconds": rounded(sum(_spent(each) for each in everyone.values())),
        "complete": largest and asking.rows == len(made.rows.held) and not asking.alone,  # more time adds nothing
        "rows": made.rows.whole,
        "held": {"validation": own, "train": asking.rows - own, "test": 0},
        "test": made.context.dataset.splits["test"],
        "row_seconds": rounded(subsets[-1]["row_seconds"]),
        "scored": len(scored_rows(made.context, settings)[0]),  # at each validation of the training
        "endpoints": sorted(name for name, each in made.untuned.items() if each.endpoint is not None),
        "on_server": sorted(name for name, each in made.untuned.items() if on_server and each.asks_base),
        "untuned": {name: _stated(asking.given[name]) for name in made.untuned},
        "subsets": [{"rows": each["rows"], "epochs": rounded(each["epochs"]), **_stated(each)} for each in subsets],
    }
    return body, encode_scores(columns)


class _Asking:
    """Asks the untuned candidates and the first subset's model held-out rows, in parts that are kept.

    given: answers by untuned candidate, of the first rows that it was asked. rows: that the subsets' models are asked.
    alone: whether time sufficed for further rows of the best candidate only.
    """

    def __init__(self, made: _Forecast) -> None:
        self._made, self.rows, self.alone = made, 0, False
        self.given: dict[str, dict[str, Any]] = {}
        self._answerers = {name: answerer(made.context, each) for name, each in made.untuned.items()}
        self._each: dict[str, float] = {}  # seconds of a row of the largest part
        for name in made.untuned:
            self._ask(name, PILOT)
        check_pilots(made.budget, sum(_spent(each) for each in self.given.values()))

    def first(self, trained: Mapping[str, Any], model: str) -> dict[str, Any]:
        """Ask until time or rows run out. Returns what the first subset's model answered to `rows` rows."""
        own = _answers(self._made, model, 0, PILOT)
        self.rows = PILOT
        while (part := self._next(own)) is not None:
            who, rows = part
            for name in who:
                self._ask(name, rows)
            own = together([own, _answers(self._made, model, self.rows, rows)])
            self.rows = rows
        losses = _losses(self._made, model, self.rows)
        return {**trained, **own, **losses}

    def _next(self, own: Mapping[str, Any]) -> tuple[Sequence[str], int] | None:
        made = self._made
        known = {
            name: Answered(len(each["scores"]), sum(each["scores"]), self._each[name])
            for name, each in self.given.items()
            if len(each["scores"]) == self.rows
        }
        spent = sum(each["seconds"] for each in (own, *self.given.values()))
        rates = {name: known[name].each for name in contenders(known)}
        part = next_part(self.rows, len(made.rows.held), made.budget, spent, rates, _each(own))
        self.alone = self.alone or (part is not None and len(part[0]) < len(rates))
        return part

    def _ask(self, name: str, rows: int) -> None:
        """Ask a candidate the rows up to this one that it was not asked yet."""
        made, before = self._made, self.given.get(name)
        asked = 0 if before is None else len(before["scores"])
        some, who = made.rows.held[asked:rows], made.untuned[name]
        file = f"untuned-{list(made.untuned).index(name):03d}-{asked}-{rows}.json"
        part = made.part(file, lambda: ask_held_out(made.context, self._answerers[name], who, some, clock=made.clock))
        if before is None or len(some) >= before["largest"]["rows"]:
            self._each[name] = part["seconds"] / len(some)  # with the building of a baseline
        self.given[name] = part if before is None else together([before, part])


def _train_subsets(made: _Forecast, asking: _Asking) -> tuple[list[dict[str, Any]], bool]:
    """Trainings on growing subsets, and whether more time would have planned the same.

    The first one is timed, and the budget that is left decides on the others.
    """
    settings, whole, say = made.settings, made.rows.whole, made.context.progress.say
    most, pool = epochs_for(settings, whole), nested(made.rows.pool, settings.seed)
    trained, model = _train(made, pool[:SMALLEST], min(most, MOST_EPOCHS), FIRST * made.budget)
    first = asking.first(trained, model)
    made.engine.unload(model)  # of a model trained in full, a copy of the base
    row, spent = first["row_seconds"], sum(_spent(each) for each in (*asking.given.values(), first))
    reads = epochs_of(whole, seconds=row, budget=settings.budget, epochs=most)
    answers = _besides(first)
    epochs = max(1, min(MOST_EPOCHS, round(reads)))
    ample = subset_plan(whole, len(pool), made.budget, 0.0, row=0.0, answers=0.0, epochs=epochs)  # as if none took time
    sizes, epochs = subset_plan(whole, len(pool), made.budget, spent, row=row, answers=answers, epochs=epochs)
    asked = f"{asking.rows} held-out rows asked of each model"
    if sizes:
        told = ", ".join(str(size) for size in sizes)
        say(f"{made.name}: training on {told} of {whole} rows, {epochs} times each; {asked}")
    else:
        say(f"{made.name}: {duration(spent)} of {duration(made.budget)} are used, so there is one subset; {asked}")
    subsets = [first]
    for planned in sizes:
        last, left = subsets[-1], made.budget - spent
        row, answers = last["row_seconds"], _besides(last)
        size = fitting(planned, last["rows"], left, row=row, answers=answers, epochs=epochs)
        if size < planned:
            instead = f"{size} rows instead of {planned}" if size else "no larger subset"
            say(f"{made.name}: {duration(spent)} of {duration(made.budget)} are used, so there is {instead}")
        if not size:
            break
        trained, model = _train(made, pool[:size], epochs)
        given = _answers(made, model, 0, asking.rows)
        subsets.append({**trained, **given, **_losses(made, model, asking.rows)})
        spent += _spent(subsets[-1])
        made.engine.unload(model)
    return subsets, ([each["rows"] for each in subsets[1:]], epochs) == ample


def _train(
    made: _Forecast, rows: Sequence[Example], epochs: int, budget: float | None = None
) -> tuple[dict[str, Any], str]:
    """A training on some rows, and the name under which the engine has loaded it.

    budget: seconds after which it ends, read fewer times. Raises Refused where it holds only a few steps.
    """
    from tunesmith.training.scoring import BudgetTooShort
    from tunesmith.training.train import make_spec, run_training

    context, name = made.context, f"{len(rows)}-rows"

    def run() -> dict[str, Any]:
        composer = Composer(context.store, made.tuned)
        settings = subset_settings(made.settings, len(rows), made.rows.whole, epochs, budget)
        spec = make_spec(
            base=context.base,
            dataset=context.dataset.digest,
            rows=[TrainingRow(each.id, composer.training_conversation(each)) for each in rows],
            validation=[],
            settings=settings,
            work=made.work / name,
            name=f"{made.name} on {len(rows)} rows",
            engine=context.training_engine(settings),
        )
        began = made.clock()
        try:
            trained = run_training(spec, model=context.trained_model(settings), clock=made.clock)
        except BudgetTooShort as error:
            raise no_steps(made.budget, error.least) from error
        # A training that was killed goes on from its checkpoint: its own seconds count those before, too.
        spent = max(made.clock() - began, trained.state.seconds)
        row = trained.state.seconds / (len(rows) * trained.epochs)
        return {"rows": len(rows), "epochs": trained.epochs, "spent": spent, "row_seconds": row}

    found = made.part(f"{name}.json", run)
    made.engine.load_adapter(name, made.work / name / "result")
    return found, name


def _answers(made: _Forecast, model: str, first: int, last: int) -> dict[str, Any]:
    """A subset's model's answers to some of the held-out rows."""
    context = made.context

    def ask() -> dict[str, Any]:
        answering = Answerer(context.store, made.engine, made.tuned)
        return ask_held_out(context, answering, made.tuned, made.rows.held[first:last], model, made.clock)

    return made.part(f"{model}-{first}-{last}.json", ask)


def _losses(made: _Forecast, model: str, rows: int) -> dict[str, Any]:
    """A subset's model's losses on the first held-out rows."""

    def ask() -> dict[str, Any]:
        answering = Answerer(made.context.store, made.engine, made.tuned)
        return ask_losses(made.engine, answering, made.rows.held[:rows], model, made.clock)

    return made.part(f"{model}-losses.json", ask)


def _spent(given: Mapping[str, Any]) -> float:
    """Seconds that went into answers, losses and the training before them."""
    return float(sum(given.get(key, 0.0) for key in ("seconds", "losses_seconds", "spent")))


def _besides(subset: Mapping[str, Any]) -> float:
    """Seconds that a subset takes besides its training's steps: for its model's answers, and before the first step."""
    steps = subset["rows"] * subset["epochs"] * subset["row_seconds"]
    return float(len(subset["scores"]) * _each(subset) + subset["losses_seconds"] + subset["spent"] - steps)


def _each(given: Mapping[str, Any]) -> float:
    """Seconds of one answer: of the largest part, since in a small one each takes longer."""
    return float(given["largest"]["seconds"] / given["largest"]["rows"])


def _stated(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of answers: their mean score, and what 1,000 of them take."""
    per_1000 = 1000.0 / len(given["scores"])
    return {
        "mean": rounded(mean(given["scores"])),
        "asked": len(given["scores"]),
        "seconds": rounded(given["seconds"]),
        "price": {
            "prompt_tokens_per_1000": rounded(given["prompt_tokens"] * per_1000),
            "completion_tokens_per_1000": rounded(given["completion_tokens"] * per_1000),
            "seconds_per_1000": rounded(1000.0 * _each(given)),
        },
    }

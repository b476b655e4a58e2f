"""The stages `curve` and `forecast`: short trainings on subsets of the rows, and what they say about the whole one.

Test rows are counted here and never read: the scores are of validation rows, and of training rows that were held out of
all subsets. Time decides how many rows are asked and trained on; each decision is written down before it acts, so that
a forecast that was stopped goes on with what it has.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.composing import Composer
from tunesmith.core.errors import UsageError
from tunesmith.data.dataset import Example
from tunesmith.data.splitting.duplicates import request_text
from tunesmith.evaluation.forecasting.conclude import LOSS, Wanted, conclude
from tunesmith.evaluation.forecasting.plan import (
    MOST_EPOCHS,
    SMALLEST,
    START,
    TIMED,
    epochs_of,
    held_rows,
    subset_sizes,
)
from tunesmith.evaluation.forecasting.rows import Reserved, reserve
from tunesmith.evaluation.gates.settings import Gates, Lift
from tunesmith.evaluation.scores import column, encode_scores, rounded
from tunesmith.models.base import model_width
from tunesmith.pipeline.candidates import answerer, candidate, untrained_candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.held_out import ask_held_out, ask_losses, kept, mean, together
from tunesmith.pipeline.training import training_inputs
from tunesmith.project import ProjectSettings
from tunesmith.store.records import Record
from tunesmith.training.batches.rows import TrainingRow, training_rows
from tunesmith.training.recipe import epochs_for, fit_to_rows
from tunesmith.training.settings import TrainSettings
from tunesmith.training.subsets import nested, subset_settings


@dataclass(frozen=True)
class _Forecast:
    """One forecast under way. name: the candidate's; budget: seconds; untuned: candidates, by name."""

    context: PipelineContext
    name: str
    tuned: Candidate
    settings: TrainSettings
    untuned: Mapping[str, Candidate]
    rows: Reserved
    budget: float
    work: Path


def curve(context: PipelineContext, name: str, budget: float) -> str:
    """Digest of the scores of short trainings of a candidate, within so many seconds.

    Raises Inconclusive where there are too few rows, Refused where the budget is too short, UsageError for a candidate
    that is not trained.
    """
    project = context.project.settings
    settings = context.settings_of(name)
    if settings.train is None or settings.train.permute_answers or settings.train.canaries:
        raise UsageError(
            f"candidate {name!r} is not trained for use, so there is nothing to forecast", where=f"candidates.{name}"
        )
    context.require_one_process()
    found = untrained_candidate(context, name, settings)
    untuned = {each: candidate(context, each) for each in _rivals(project)}
    inputs = {
        "training": training_inputs(context, name, found, settings.train),
        "untuned": untuned,
        "metric": project.task.leading,
        "schema": context.project.schema,
        "budget": budget,
        "engine": context.engine_kind,
    }

    def measure(work: Path) -> str:
        assert settings.train is not None
        loaded = {each: load_candidate(context.store, digest) for each, digest in untuned.items()}
        rows = _reserved(context, settings.train, [found, *loaded.values()])
        made = _Forecast(context, name, found, settings.train, loaded, rows, budget, work)
        body, scores = _measured(made)
        parents = {"base": context.base.digest, "dataset": context.dataset.digest}
        parents |= {f"candidate:{each}": digest for each, digest in untuned.items()}
        blobs = {"scores.jsonl": context.store.put_bytes(scores)}
        return context.store.put_record(Record(kind="curve", parents=parents, blobs=blobs, body=body))

    return context.stages.run(f"curve of {name}", "curve", inputs, measure)


def forecast(context: PipelineContext, name: str, *, budget: float, goal: float | None, days: float) -> str:
    """Digest of a candidate's forecast. goal: None takes the lift gate's bound. Raises what `curve` raises."""
    measured = curve(context, name, budget)
    project = context.project.settings
    gate = lift_gate(project.gates, project.task.leading)
    endpoints = {each: other.endpoint for each, other in project.candidates.items() if other.endpoint}
    wanted = Wanted(
        goal=goal if goal is not None else gate.at_least if gate is not None else 0.0,
        over=gate.over if gate is not None and gate.over in _rivals(project) else None,
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
    """Names of the candidates that a training has to beat."""
    return [name for name, each in project.candidates.items() if not (each.adapted or each.version)]


def lift_gate(gates: Gates, metric: str) -> Lift | None:
    """The first gate that asks for a lift of a metric."""
    return next((gate for gate in gates.values() if isinstance(gate, Lift) and gate.metric == metric), None)


def _reserved(context: PipelineContext, settings: TrainSettings, candidates: Sequence[Candidate]) -> Reserved:
    shown = {request_text(shot) for each in candidates for shot in each.shots}
    rows = training_rows(context.dataset.examples("train"), settings)
    by_time = context.project.settings.data.split.time is not None
    return reserve(rows, context.dataset.examples("validation"), shown, seed=settings.seed, lend=not by_time)


def _measured(made: _Forecast) -> tuple[dict[str, Any], bytes]:
    """The record's body, and its scores."""
    # As the training of all rows will have them, which is how its record and this one are found to belong together.
    settings = fit_to_rows(made.settings, made.rows.whole, model_width(made.context.base))
    metric = made.context.project.settings.task.leading
    answered, asked = _ask_untuned(made)
    subsets = _train_subsets(made, answered, asked)
    everyone = {**answered, **{f"{each['rows']} rows": each for each in subsets}}
    columns = []
    for who, each in everyone.items():
        for what, values in ((metric, each["scores"]), (LOSS, each.get("losses", ()))):
            pairs = zip(made.rows.held[: len(values)], values, strict=True)
            columns.append(column(who, what, {one.id: (one.group, value) for one, value in pairs}))
    own = min(asked, made.rows.validation)
    body = {
        "name": made.name,
        "metric": metric,
        "settings": settings.model_dump(mode="json"),
        "seed": settings.seed,
        "budget": made.budget,
        "seconds": rounded(sum(_spent(each) for each in everyone.values())),
        "rows": made.rows.whole,
        "held": {"validation": own, "train": asked - own, "test": 0},
        "test": made.context.dataset.splits["test"],
        "row_seconds": rounded(subsets[-1]["row_seconds"]),
        "start": _stated(answered[START]),
        "endpoints": sorted(name for name, each in made.untuned.items() if each.endpoint is not None),
        "untuned": {name: _stated(answered[name]) for name in made.untuned},
        "subsets": [{"rows": each["rows"], "epochs": each["epochs"], **_stated(each)} for each in subsets],
    }
    return body, encode_scores(columns)


def _train_subsets(made: _Forecast, answered: Mapping[str, Mapping[str, Any]], asked: int) -> list[dict[str, Any]]:
    """Trainings on growing subsets. The first one is timed, and the budget that is left decides on the others."""
    settings, whole = made.settings, made.rows.whole
    most, pool = epochs_for(settings, whole), nested(made.rows.pool, settings.seed)
    first = _subset(made, pool[:SMALLEST], min(most, MOST_EPOCHS), asked)

    def decided() -> dict[str, Any]:
        row = first["row_seconds"]
        reads = epochs_of(whole, seconds=row, budget=settings.budget, epochs=most)
        epochs = max(1, min(MOST_EPOCHS, round(reads)))
        spent = sum(_spent(each) for each in (*answered.values(), first))
        asking = first["seconds"] + first["losses_seconds"]
        sizes = subset_sizes(whole, len(pool), made.budget, spent, row=row, answers=asking, epochs=epochs)
        return {"sizes": sizes, "epochs": epochs}

    plan = kept(made.work / "sizes.json", decided)
    sizes = ", ".join(str(size) for size in plan["sizes"])
    made.context.progress.say(f"{made.name}: training on {sizes} of {whole} rows, {plan['epochs']} times each")
    return [first, *(_subset(made, pool[:size], plan["epochs"], asked) for size in plan["sizes"])]


def _ask_untuned(made: _Forecast) -> tuple[dict[str, dict[str, Any]], int]:
    """Each untuned candidate's answers to as many held-out rows as the budget allows, and the base's to the first.

    Returns them by name, and how many rows that are.
    """
    context, work, rows = made.context, made.work, made.rows.held
    asking = {START: (Answerer(context.store, context.model.engine(), made.tuned), made.tuned)}
    asking |= {name: (answerer(context, each), each) for name, each in made.untuned.items()}

    def ask(who: str, part: str, some: Sequence[Example]) -> dict[str, Any]:
        file = work / f"{part}-{list(asking).index(who):03d}.json"
        return kept(file, lambda: ask_held_out(context, *asking[who], some))

    timed = {who: ask(who, "timed", rows[:TIMED]) for who in asking}

    def decided() -> dict[str, Any]:
        each = {who: part["seconds"] / TIMED for who, part in timed.items()}
        return {"rows": held_rows(len(rows), made.budget, each)}

    many = kept(work / "held.json", decided)["rows"]
    context.progress.say(f"{made.name}: asking {many} rows that are held out of the subsets")
    found = {who: together([timed[who], ask(who, "rest", rows[TIMED:many])]) for who in made.untuned}
    return {START: timed[START], **found}, many


def _subset(made: _Forecast, rows: Sequence[Example], epochs: int, asked: int) -> dict[str, Any]:
    """A training on some rows, and its answers to the held-out rows."""
    from tunesmith.training.train import make_spec, run_training

    context, name = made.context, f"{len(rows)}-rows"

    def run() -> dict[str, Any]:
        composer = Composer(context.store, made.tuned)
        settings = subset_settings(made.settings, len(rows), made.rows.whole, epochs)
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
        began = time.perf_counter()
        trained = run_training(spec, model=context.trained_model(settings))
        spent = time.perf_counter() - began
        engine = context.model.engine()
        engine.load_adapter(name, trained.folder)
        answering = Answerer(context.store, engine, made.tuned)
        given = ask_held_out(context, answering, made.tuned, made.rows.held[:asked], name)
        given |= ask_losses(engine, answering, made.rows.held[:asked], name)
        row = trained.state.seconds / (len(rows) * epochs)
        return {"rows": len(rows), "epochs": epochs, "spent": spent, "row_seconds": row, **given}

    return kept(made.work / f"{name}.json", run)


def _spent(given: Mapping[str, Any]) -> float:
    """Seconds that went into answers, losses and the training before them."""
    return float(sum(given.get(key, 0.0) for key in ("seconds", "losses_seconds", "spent")))


def _stated(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of answers: their mean score, and what 1,000 of them take."""
    per_1000 = 1000.0 / len(given["scores"])
    return {
        "mean": rounded(mean(given["scores"])),
        "seconds": rounded(given["seconds"]),
        "price": {
            "prompt_tokens_per_1000": rounded(given["prompt_tokens"] * per_1000),
            "completion_tokens_per_1000": rounded(given["completion_tokens"] * per_1000),
            "seconds_per_1000": rounded(given["seconds"] * per_1000),
        },
    }

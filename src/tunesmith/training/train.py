"""Runs a training: from rows to a spec, from a spec to a folder of trained weights, and from there to a record."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.batch import label_count
from tunesmith.engines.device import device_name
from tunesmith.engines.factory import LocalEngine, load_model, training_engine
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.engines.settings import HF, is_native
from tunesmith.engines.training_protocol import LoadedModel, TrainableModel
from tunesmith.models.base import Base, check_base, count_parameters, require_context_length
from tunesmith.models.rendering import Renderer
from tunesmith.records.training import (
    Decisions,
    Environment,
    Estimate,
    RecordedSettings,
    TrainedStep,
    TrainingBody,
    ValidationPoint,
)
from tunesmith.store.store import Store
from tunesmith.training.batches.batch_plan import Step, TrainingPlan, lay_out_validation, step_tokens
from tunesmith.training.batches.rehearsal import Rehearsal, prepare_rehearsal
from tunesmith.training.batches.rows import TrainingRow, render_rows
from tunesmith.training.beside import BESIDE, GAP
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.estimates.estimate import (
    check_disk,
    check_memory,
    copied_bytes,
    estimate,
    memory_needs,
    state_bytes,
    too_few_numbers,
    trial_step,
)
from tunesmith.training.objectives import Objective, objective_of
from tunesmith.training.schedule import DECISIONS, Annealed, Schedule, TrainerState
from tunesmith.training.scoring import AnswerScore, BudgetTooShort, Validation, decide_beforehand
from tunesmith.training.settings import MetricsSettings, TrainSettings
from tunesmith.training.sinks import follower
from tunesmith.training.spec import TrainingResult, TrainingSpec, write_rows
from tunesmith.training.trainer import Trainer

# Part of a training's identity. Raise it when the arithmetic of training or the batch plan changes.
KERNEL_REVISION = 8

_ESTIMATE = "estimate.json"  # in a training's work folder


def make_spec(
    *,
    base: Base,
    dataset: str,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: TrainSettings,
    work: Path,
    name: str = "training",
    engine: LocalEngine | None = None,
    splits: Sequence[str] = (),
    metrics: MetricsSettings | None = None,
    decisions: Decisions | None = None,
    notices: Sequence[str] = (),
    documents: str | None = None,
) -> TrainingSpec:
    """Render a training's rows into its work folder; returns its spec. Loads no weights.

    engine: which trains, by default the one that
    `engine: {train: auto}` takes for one process. splits: of the dataset version, that could be read. decisions: to
    repeat. notices, documents: see TrainingSpec.
    Raises Refused or UsageError for rows that cannot be trained on.
    """
    renderer, context = Renderer(base.folder), require_context_length(base)
    checked = validation[: settings.validation_rows]
    rendered = [render_rows(renderer, some, settings, context) for some in (rows, checked)]
    return TrainingSpec(
        name=name,
        engine=engine or training_engine(base.family, settings),
        base=base,
        dataset=dataset,
        rows=write_rows(work / "rows.jsonl", [row.id for row in rows], rendered[0]),
        validation=write_rows(work / "validation.jsonl", [row.id for row in checked], rendered[1]),
        settings=settings,
        work=work.absolute(),
        splits=tuple(splits),
        metrics=metrics,
        decisions=decisions,
        notices=tuple(notices),
        documents=documents,
    )


def run_training(
    spec: TrainingSpec,
    progress: Progress = SILENT,
    *,
    model: LoadedModel | None = None,
    score: AnswerScore | None = None,
    clock: Callable[[], float] = time.perf_counter,
    ranks: Ranks = ALONE,
    watch: Callable[[TrainerState, TrainableModel], None] | None = None,
) -> TrainingResult:
    """Train as spec says, in this process. It needs the spec's files and no store.

    ranks: train together, and each of them calls this with the same spec. Rank 0's clock counts, and rank 0 writes.

    A training that was killed resumes from its work folder. model: the base's weights where they are loaded already.
    score: scores generated answers to validation rows; None: none are scored (see TrainerState.best). clock: seconds
    since some moment. watch: called with the state and the model after each step, and at the start of a resumed
    training; what it raises ends the training. Raises Refused where the base's files are not the spec's, where memory
    or disk do not suffice, where a budget is too short for a step and a validation, and where the work folder holds
    another training; TunesmithError for a loss that is not finite.
    """
    settings, objective = spec.settings, objective_of(spec.settings)
    rows, checked = spec.rows.read(), spec.validation.read()
    if model is None:
        check_base(spec.base)
    loaded = model or load_model(spec.base, spec.engine)
    trained = loaded.trainable(settings, seed=settings.seed, state_bytes=state_bytes(settings))
    now, measured = ranks.clock(clock), ranks.clock(time.perf_counter)
    if not rows:
        raise TunesmithError("the training has no step", where="data", fix="give it more rows")
    rehearsal = prepare_rehearsal(spec, loaded, len(rows), now, ranks, progress)
    plan = TrainingPlan(rows, settings, rehearsal=rehearsal.rows, share=trained.shares_prefix, ranks=ranks)
    batches = lay_out_validation(checked, settings, share=trained.shares_prefix, ranks=ranks)
    checkpoints = Checkpoints(spec.work, _identity(spec, trained, ranks, rehearsal), ranks)
    validation = Validation(trained, batches, score if batches else None, ranks=ranks, clock=measured)
    ready = _Ready(spec, plan, validation, rehearsal, progress)
    expected = _estimate(ready, objective)
    labels = sum(map(label_count, rows))
    notice = too_few_numbers(settings.rank, trained.trained_numbers, labels) if settings.method == "lora" else None
    notices = [*spec.notices, *([notice] if notice else []), *rehearsal.notices()]
    _announce(ready, len(rows), expected, notices)
    schedule = _schedule(ready, expected)
    rival = score.rival(validation.rows) if score is not None and validation.rows else None
    memory = DeviceMemory(trained.device)
    memory.reset_peak()  # after the rival's answers, which are no part of the training
    predicted = {"expected_seconds": expected.seconds, "expected_memory_bytes": float(expected.peak_memory_bytes)}
    progress.measured(spec.name, predicted if rival is None else {**predicted, f"{BESIDE}{rival.name}": rival.score})
    # The same training again has the same curves and is one run; one within a budget is another each time.
    measured_first = schedule.decisions.seconds if schedule.decisions else 0.0
    run = checkpoints.identity | ({"measured": measured_first} if measured_first else {})
    curves = follower(spec.metrics, spec.name, digest_of(run), settings, progress)
    reported = 0

    def on_step(state: TrainerState) -> None:
        """Report the steps of a state that were not reported yet, and tell whoever watches."""
        nonlocal reported
        peak, validated = memory.peak(), {each["step"]: each for each in state.validation}
        for each in state.curve[reported:]:
            scored = validated.get(each["step"], {})
            values = {"step": each["step"], "loss": each["loss"], "memory_bytes": peak}
            values |= {f"validation_{key}": scored[key] for key in ("loss", "score") if key in scored}
            if rival is not None:
                values |= zip(GAP, rival.gaps.get(int(each["step"]), ()), strict=False)
            progress.measured(spec.name, values)
        reported = len(state.curve)
        if watch is not None:
            watch(state, trained)

    state = Trainer(
        trained,
        plan,
        settings,
        checkpoints,
        objective=objective,
        schedule=schedule,
        validate=validation.measure if batches else None,
        on_checkpoint=curves.follow,
        on_step=on_step,
        progress=progress,
        clock=now,
        ranks=ranks,
        rival=rival,
    ).run()
    curves.finish()
    folder, made_by = spec.work / "result", environment(trained, ranks)
    if ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    trained.save(folder)
    epochs = state.step / plan.epoch_steps
    tokens = round(sum(len(row.ids) for row in rows) * epochs)
    paused = [f"the training was paused for {state.paused:.0f} s, which do not count"] if state.paused else []
    best = None if settings.keep == "last" else state.best
    last = state.curve[-max(1, len(state.curve) // 20) :]
    body = TrainingBody(
        settings=RecordedSettings.model_validate(settings.model_dump(mode="json")),
        splits=spec.splits,
        rows=len(rows),
        rehearsed=rehearsal.answers,
        tokens=tokens,
        tokens_computed=sum(int(step["tokens"]) for step in state.curve),
        labels=round(labels * epochs),
        parameters=trained.trained_numbers,
        base_parameters=count_parameters(spec.base.folder),
        notices=(*notices, *validation.notices(), *paused, *checkpoints.moved),
        fingerprint=spec.base.fingerprint,
        threads=made_by.threads,
        engine=trained.engine_name,
        environment=made_by,
        steps=state.step,
        seconds=state.seconds,
        epochs=epochs,
        examples_per_second=len(rows) * epochs / state.seconds,
        tokens_per_second=tokens / state.seconds,
        estimate=expected,
        final_loss=sum(step["loss"] for step in last) / len(last),
        curve=tuple(map(TrainedStep.model_validate, state.curve)),
        validation=tuple(map(ValidationPoint.model_validate, state.validation)),
        score=validation.described(),
        decisions=schedule.decisions,
        overfitting=tuple(state.overfitting),
        kept=state.step if best is None else int(state.validation[best]["step"]),
        ended=state.ended,
        peak_memory_bytes=ranks.most(memory.peak()),
        checkpoint_bytes=checkpoints.newest_bytes(),
    )
    return TrainingResult(folder=folder, body=body)


def record_training(store: Store, spec: TrainingSpec, result: TrainingResult) -> str:
    """Keep a training's files and its record; returns the record's digest."""
    blobs = {path.name: store.put_file(path) for path in sorted(result.folder.iterdir())}
    parents = {"base": spec.base.digest, "dataset": spec.dataset}
    if spec.documents is not None:
        parents["documents"] = spec.documents
    return store.put_record(result.body.record(parents, blobs))


def environment(model: TrainableModel, ranks: Ranks = ALONE) -> Environment:
    """What a training's bytes depend on besides its input: versions, the machine, the number of threads and ranks."""
    stated = {
        "kernel_revision": KERNEL_REVISION,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "ranks": ranks.size,
        "copies": ranks.copies,
        **model.environment(),
    }
    return Environment.model_validate(stated)


def _identity(spec: TrainingSpec, model: TrainableModel, ranks: Ranks, rehearsal: Rehearsal) -> dict[str, Any]:
    return {
        "base": spec.base.digest,
        "engine": model.engine_name,
        "dataset": spec.dataset,
        "rows": spec.rows.digest,
        "validation": spec.validation.digest,
        "settings": spec.settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "environment": environment(model, ranks).model_dump(),
        **({"rehearsed answers": rehearsal.digest} if rehearsal.answers else {}),
    }


class _Ready(NamedTuple):
    """A training before its first step."""

    spec: TrainingSpec
    plan: TrainingPlan
    validation: Validation
    rehearsal: Rehearsal
    progress: Progress


def _schedule(ready: _Ready, expected: Estimate) -> Schedule:
    """The schedule of a training. One that decides while it runs goes on from the decisions in the work folder."""
    spec, plan, validation, rehearsal, progress = ready
    settings, kept, first = spec.settings, spec.work / DECISIONS, validation.ranks.first
    if settings.schedule != "wsd":
        return Schedule(len(plan), settings)
    try:
        decisions = spec.decisions or decide_beforehand(settings, plan, expected, validation, rehearsal, kept, progress)
    except BudgetTooShort:
        if first:  # the machine may have been busy: the next run measures anew
            (spec.work / _ESTIMATE).unlink(missing_ok=True)
        raise
    validation.rows = decisions.scored_rows
    budget = None if spec.decisions else settings.budget
    return Annealed(len(plan), settings, decisions, kept if first else None, budget=budget)


def _estimate(ready: _Ready, objective: Objective) -> Estimate:
    """The estimate, made once: a resumed training keeps its first one. Whether there is room is checked each time."""
    (spec, plan, validation, *_), settings = ready, ready.spec.settings
    ranks, clock, batches, model = validation.ranks, validation.clock, validation.batches, validation.model
    copies = copied_bytes(model, settings, spec.base) if validation.rows and ranks.size == 1 else 0
    needs = memory_needs(model, settings, validates=bool(batches), copies=copies)
    kept = spec.work / _ESTIMATE
    check_disk(spec.work, needs)
    # A budget usually ends before later epochs, whose steps are alike.
    steps: Sequence[Step] = plan if settings.budget is None else plan.epoch(0)
    if (before := ranks.agree(lambda: _estimated(kept))) is not None:
        check_memory(steps, needs, local=ranks.local)
        return Estimate.model_validate(before)
    trial = trial_step(model, objective, ranks)
    times = min(settings.validations, len(plan))
    made = estimate(steps, step_tokens(batches), times, trial, needs, ranks=ranks, clock=clock)
    seconds = made.seconds
    if settings.budget is not None:
        seconds = min(settings.budget, seconds + (len(plan) - len(steps)) * made.step_seconds)
    elif validation.rows:
        seconds += times * validation.rows * validation.answer_seconds()
    made = made.model_copy(update={"seconds": seconds})
    if ranks.first:
        write_atomic(kept, made.model_dump_json().encode())
    return made


def _estimated(kept: Path) -> dict[str, Any] | None:
    """The estimate that was kept; None where there is none, or where it is damaged."""
    with suppress(OSError, ValueError):
        return Estimate.model_validate_json(kept.read_bytes()).model_dump()
    return None


def _announce(ready: _Ready, rows: int, expected: Estimate, notices: Sequence[str]) -> None:
    spec, plan, validation, _, progress = ready
    ranks = validation.ranks
    if ranks.size > 1:
        progress.say(f"{ranks.size} ranks train together, by transformers' modules; each holds a part of every tensor")
    elif spec.engine == HF:
        why = "" if is_native(spec.base.family) else ": the native engine does not compute this family"
        on = device_name(validation.model.device)
        progress.say(f"{spec.base.spec} ({spec.base.family}) is trained by transformers' modules on {on}{why}")
    budget = spec.settings.budget
    length = f"{len(plan)} steps" if budget is None else f"steps of {expected.step_seconds:.2g} s within its budget"
    most = "at most " if budget is None and validation.rows else ""  # as the answers are timed
    room = "GB of memory" if ranks.size == 1 else "GB of memory on a rank"
    progress.say(
        f"training {rows} rows in {length}: {most}about {expected.seconds:.0f} s, "
        f"{expected.peak_memory_bytes / 1e9:.1f} {room} and {expected.checkpoint_bytes / 1e6:.0f} MB a checkpoint"
    )
    for notice in notices:
        progress.say(notice)

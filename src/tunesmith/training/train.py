"""One training: rows in, a training record with its weights out."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.batch import Batch, label_count
from tunesmith.engines.hf.lora import HFLora
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.full import Full
from tunesmith.engines.native.adapters.lora import Lora
from tunesmith.engines.native.network.network import Network
from tunesmith.models.base import Base
from tunesmith.models.families import SLOW
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batch_plan import lay_out_epoch, lay_out_run, lay_out_validation
from tunesmith.training.checkpoints import newest_bytes
from tunesmith.training.estimate import Estimate, check_disk, check_room, estimate, needs_of, too_few_numbers
from tunesmith.training.range_test import STEPS, RateSearch, range_test
from tunesmith.training.settings import MetricsSettings, TrainSettings
from tunesmith.training.sinks import Follower, follower
from tunesmith.training.trainable import Trained, open_network
from tunesmith.training.trainer import Step, Trainer, TrainerState, complete, trial_step

# Part of what a checkpoint must agree on: bump when the engine's arithmetic or its batch plan changes.
ENGINE = 7


class TrainingRow(NamedTuple):
    """A conversation as the candidate will put it, its prompt included; the last message is the answer."""

    id: str
    messages: tuple[Message, ...]


class Job(NamedTuple):
    """One of several trainings on the same base and dataset. work: a folder of its own, for checkpoints."""

    name: str
    rows: Sequence[TrainingRow]
    validation: Sequence[TrainingRow]
    settings: TrainSettings
    work: Path


@dataclass(frozen=True)
class _Prepared:
    """A training ready to begin."""

    job: Job
    rendered: list[Rendered]
    checked: list[Rendered]
    trained: Trained
    steps: list[Step]
    validating: list[Batch]
    identity: dict[str, Any]
    expected: Estimate
    notice: str | None


def train(
    store: Store,
    *,
    base: Base,
    dataset: str,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: TrainSettings,
    work: Path,
    name: str = "training",
    restart: bool = False,
    metrics: MetricsSettings | None = None,
    progress: Progress = SILENT,
) -> str:
    """Train base, or an adapter for it, on rows; returns the training record's digest.

    dataset: digest of the record the rows come from. work: a folder of this training's own, for checkpoints; a run
    killed at any moment carries on from there, restart throws that away. metrics: where it is shown, under its name,
    while it runs. Raises Refused for rows that cannot be
    trained on or do not fit the memory, TunesmithError for a loss that is not a number.
    """
    runtime.prepare()
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    job = Job(name, rows, validation, settings, work)
    network = open_network(base)
    ready = _prepare(Renderer(base.folder), network, base, dataset, job)
    if isinstance(ready.trained, HFLora):
        progress.say(f"{base.spec} ({base.family}) {SLOW}")
    progress.say(
        f"training {len(rows)} rows in {len(ready.steps)} steps: about {ready.expected.seconds:.0f} s and "
        f"{ready.expected.peak_memory_bytes / 1e9:.1f} GB of memory, {ready.expected.checkpoint_bytes / 1e6:.0f} MB a "
        "checkpoint"
    )
    if ready.notice:
        progress.say(ready.notice)
    runtime.reset_peak_memory()
    shown = _shown(ready, metrics, progress)
    trainer = Trainer(
        ready.trained.network,
        ready.trained,
        ready.steps,
        ready.validating,
        settings,
        work,
        ready.identity,
        progress,
        shown.follow,
    )
    course = complete(trainer)
    shown.finish()
    return _record(store, base, dataset, ready, course)


def _shown(ready: _Prepared, metrics: MetricsSettings | None, progress: Progress) -> Follower:
    if metrics is None:
        return Follower(None, progress)
    return follower(metrics, ready.job.name, digest_of(ready.identity), ready.identity["settings"], progress)


def find_rate(
    *, base: Base, rows: Sequence[TrainingRow], settings: TrainSettings, progress: Progress = SILENT
) -> RateSearch:
    """A range test over a training's first steps, going on into further epochs where one has too few. Keeps nothing.

    Raises Refused for rows that cannot be trained on.
    """
    runtime.prepare()
    rendered = _render(Renderer(base.folder), rows, settings)
    trained = build_trainable(open_network(base), base.folder, settings)
    share = not isinstance(trained, HFLora)
    every = (step for epoch in count() for (step,) in lay_out_epoch(rendered, settings, epoch, 1, share=share))
    steps = list(islice(every, STEPS))
    check_room(steps, needs_of(trained, settings, validates=False))
    return range_test(trained.network, trained, steps, settings, progress)


def _prepare(renderer: Renderer, network: Network | HFModel, base: Base, dataset: str, job: Job) -> _Prepared:
    settings = job.settings
    rendered = _render(renderer, job.rows, settings)
    checked = _render(renderer, job.validation[: settings.validation_rows], settings)
    trained = build_trainable(network, base.folder, settings)
    share = not isinstance(trained, HFLora)  # which computes each row whole
    dealt = lay_out_run(rendered, settings, 1, share=share)
    steps: list[Step] = [[part for own in step for part in own] for step in dealt]
    validating = lay_out_validation(checked, settings, share=share)
    identity = {
        "base": base.digest,
        "dataset": dataset,
        "rows": digest_of([row.id for row in job.rows]),
        "tokens": digest_of([list(row.ids) for row in rendered]),
        "validation": digest_of([list(row.ids) for row in checked]),
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "environment": environment(),
    }
    expected = _expect(steps, validating, settings, trained, job.work)
    labels = sum(map(label_count, rendered))
    notice = too_few_numbers(settings.rank, trained.parameters, labels) if settings.method == "lora" else None
    return _Prepared(job, rendered, checked, trained, steps, validating, identity, expected, notice)


def build_trainable(network: Network | HFModel, base: Path, settings: TrainSettings) -> Trained:
    """The weights under training as they begin. base: the folder of the base's files."""
    if isinstance(network, HFModel):
        return HFLora(network, settings)
    return Full(network, settings, base) if settings.method == "full" else Lora(network, settings)


def _record(store: Store, base: Base, dataset: str, ready: _Prepared, course: TrainerState) -> str:
    """Keep a training that is over."""
    settings, steps = ready.job.settings, ready.steps
    labels = sum(label_count(row) for row in ready.rendered) * settings.epochs
    tokens = sum(len(row.ids) for row in ready.rendered) * settings.epochs
    rows, environment = len(ready.job.rows), ready.identity["environment"]
    body = {
        "settings": settings.model_dump(mode="json"),
        "rows": rows,
        "tokens": tokens,
        "tokens_computed": sum(part.tokens for step in steps[: course.step] for part in step),
        "labels": labels,
        "parameters": ready.trained.parameters,
        "notices": [ready.notice] if ready.notice else [],
        "fingerprint": base.fingerprint,
        "threads": environment["threads"],
        "environment": environment,
        **_measured(course, rows * settings.epochs / len(steps), tokens / len(steps), ready.expected, settings.keep),
        "peak_memory_bytes": runtime.peak_memory(),
        "checkpoint_bytes": newest_bytes(ready.job.work),
        **({"network": "transformers"} if isinstance(ready.trained, HFLora) else {}),
    }
    files = ready.trained.files(base)
    blobs = {name: store.put_bytes(data) for name, data in files.items()}
    return store.put_record(
        Record(kind="training", parents={"base": base.digest, "dataset": dataset}, blobs=blobs, body=body)
    )


def _expect(
    steps: Sequence[Step], validating: Sequence[Batch], settings: TrainSettings, trained: Trained, work: Path
) -> Estimate:
    """The estimate, taken once per training: a resumed run keeps the one it was begun with. Whether there is room is
    asked each time."""
    from tunesmith.core.files import write_atomic

    needs, kept = needs_of(trained, settings, validates=bool(validating)), work / "estimate.json"
    check_disk(work, needs)
    if kept.is_file():
        with suppress(ValueError):  # an estimate of another version
            before = Estimate.model_validate_json(kept.read_bytes())
            check_room(steps, needs)
            return before
    tokens = sum(batch.tokens for batch in validating)
    made = estimate(steps, tokens, settings.validations, trial_step(trained.network, trained), needs)
    if isinstance(trained, Lora):
        trained.release_buffers()
    write_atomic(kept, made.model_dump_json().encode())
    return made


def _render(renderer: Renderer, rows: Sequence[TrainingRow], settings: TrainSettings) -> list[Rendered]:
    rendered: list[Rendered] = []
    for row in rows:
        try:
            one = renderer.conversation(row.messages, settings.loss_on)
        except (Refused, UsageError) as error:
            raise type(error)(error.what, where=f"row {row.id}, {error.where}", fix=error.fix) from error
        if len(one.ids) > settings.max_length:
            raise Refused(
                f"row {row.id} has {len(one.ids)} tokens, more than max_length {settings.max_length}",
                where="train.max_length",
                fix="raise it, or set data.overlong so that such rows are dropped and counted",
            )
        rendered.append(one)
    return rendered


def environment() -> dict[str, Any]:
    """What a training's bytes depend on beside its input: versions, the machine, how the work was shared out."""
    return {
        "engine": ENGINE,
        "kernels": native.identity(),
        "threads": runtime.prepare(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _measured(course: TrainerState, examples: float, tokens: float, expected: Estimate, keep: str) -> dict[str, Any]:
    """examples, tokens: a step's, on average."""
    if not course.curve:
        raise TunesmithError("the training had no step", where="data", fix="give it more rows")
    best = course.best
    kept = course.step if keep == "last" or best is None else int(course.validation[best]["step"])
    tail = course.curve[-max(1, len(course.curve) // 20) :]
    return {
        "steps": course.step,
        "seconds": course.seconds,
        "examples_per_second": examples * course.step / course.seconds,
        "tokens_per_second": tokens * course.step / course.seconds,
        "estimate": expected.model_dump(),
        "final_loss": sum(step["loss"] for step in tail) / len(tail),
        "curve": asdict(course)["curve"],
        "validation": course.validation,
        "overfitting": course.overfitting,
        "kept": kept,
        "ended": course.ended,
    }

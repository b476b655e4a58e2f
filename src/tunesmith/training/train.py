"""One training: rows in, a training record with its adapter out."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.models import native, runtime
from tunesmith.models.base import BaseModel
from tunesmith.models.batch import Batch, label_count, lay_out
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weights import load_network
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batches import lay_out_step, plan
from tunesmith.training.estimate import Estimate, estimate, too_few_numbers
from tunesmith.training.loop import Course, Step, fit, trial_step
from tunesmith.training.lora import Lora
from tunesmith.training.settings import TrainSettings

# Part of what a checkpoint must agree on: bump when the engine's arithmetic or its batch plan changes.
ENGINE = 2


class TrainingRow(NamedTuple):
    """A conversation as the candidate will put it, its prompt included; the last message is the answer."""

    id: str
    messages: tuple[Message, ...]


def train(
    store: Store,
    *,
    base: BaseModel,
    dataset: str,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: TrainSettings,
    work: Path,
    restart: bool = False,
    progress: Progress = SILENT,
) -> str:
    """Train an adapter for base on rows; returns the training record's digest.

    dataset: digest of the record the rows come from. work: a folder of this training's own, for checkpoints; a run
    killed at any moment carries on from there, restart throws that away. Raises Refused for rows that cannot be
    trained on or do not fit the memory, TunesmithError for a loss that is not a number.
    """
    threads = runtime.prepare()
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    renderer = Renderer(base.folder)
    rendered = _render(renderer, rows, settings)
    checked = _render(renderer, validation[: settings.validation_rows], settings)
    network = load_network(base.folder)
    if settings.start == "pissa":
        progress.say("taking the principal singular vectors of every adapted weight")
    lora = Lora(network, settings)
    steps = [
        lay_out_step([rendered[row] for row in batch], settings.tokens)
        for epoch in range(settings.epochs)
        for batch in plan(rendered, settings.batch, settings.seed, epoch)
    ]
    validating = [lay_out([checked[row] for row in batch]) for batch in plan(checked, settings.batch, 0, 0)]
    environment = _environment(threads)
    identity = {
        "base": base.digest,
        "dataset": dataset,
        "rows": digest_of([row.id for row in rows]),
        "tokens": digest_of([list(row.ids) for row in rendered]),
        "validation": digest_of([list(row.ids) for row in checked]),
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "environment": environment,
    }
    expected = _expect(steps, validating, settings, network_trial=trial_step(network, lora), work=work)
    progress.say(
        f"training {len(rows)} rows in {len(steps)} steps: about {expected.seconds:.0f} s and "
        f"{expected.peak_memory_bytes / 1e9:.1f} GB of memory"
    )
    if notice := too_few_numbers(settings.rank, lora.parameters, sum(map(label_count, rendered))):
        progress.say(notice)
    runtime.reset_peak_memory()
    course = fit(network, lora, steps, validating, settings, work, identity, progress)
    labels = sum(label_count(row) for row in rendered) * settings.epochs
    tokens = sum(len(row.ids) for row in rendered) * settings.epochs
    body = {
        "settings": settings.model_dump(mode="json"),
        "rows": len(rows),
        "tokens": tokens,
        "tokens_computed": sum(part.tokens for step in steps[: course.step] for part in step),
        "labels": labels,
        "parameters": lora.parameters,
        "notices": [notice] if notice else [],
        "fingerprint": base.fingerprint,
        "threads": threads,
        "environment": environment,
        **_measured(course, len(rows) * settings.epochs / len(steps), tokens / len(steps), expected, settings.keep),
    }
    files = lora.files(base)
    blobs = {name: store.put_bytes(data) for name, data in files.items()}
    return store.put_record(
        Record(kind="training", parents={"base": base.digest, "dataset": dataset}, blobs=blobs, body=body)
    )


def _expect(
    steps: Sequence[Step], validating: Sequence[Batch], settings: TrainSettings, *, network_trial: Any, work: Path
) -> Estimate:
    """The estimate, taken once per training: a resumed run keeps the one it was begun with."""
    from tunesmith.core.files import write_atomic

    kept = work / "estimate.json"
    if kept.is_file():
        return Estimate.model_validate_json(kept.read_bytes())
    tokens = sum(batch.tokens for batch in validating)
    made = estimate(steps, tokens, settings.validations, network_trial)
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


def _environment(threads: int) -> Mapping[str, Any]:
    return {
        "engine": ENGINE,
        "kernels": native.identity(),
        "threads": threads,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _measured(course: Course, examples: float, tokens: float, expected: Estimate, keep: str) -> dict[str, Any]:
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
        "peak_memory_bytes": runtime.peak_memory(),
        "estimate": expected.model_dump(),
        "final_loss": sum(step["loss"] for step in tail) / len(tail),
        "curve": asdict(course)["curve"],
        "validation": course.validation,
        "kept": kept,
        "ended": course.ended,
    }

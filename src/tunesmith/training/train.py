"""One training: rows in, a training record with its weights out."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.models import native, runtime
from tunesmith.models.base import BaseModel
from tunesmith.models.batch import Batch, label_count
from tunesmith.models.families import SLOW
from tunesmith.models.foreign import Foreign
from tunesmith.models.four_bit import described
from tunesmith.models.network import Network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batches import lay_out_epoch, lay_out_run, lay_out_validation
from tunesmith.training.checkpoints import newest_bytes
from tunesmith.training.estimate import Estimate, check_disk, check_room, estimate, needs_of, too_few_numbers
from tunesmith.training.foreign import ForeignLora
from tunesmith.training.full import Full
from tunesmith.training.loop import Course, Run, Step, complete, trial_step
from tunesmith.training.lora import Lora
from tunesmith.training.rate import STEPS, RateSearch, range_test
from tunesmith.training.settings import MetricsSettings, TrainSettings
from tunesmith.training.sinks import Follower, follower
from tunesmith.training.together import fit_together
from tunesmith.training.trainable import Trained, open_network

if TYPE_CHECKING:
    from tunesmith.training.machines import Crew

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
    """A training ready to begin. dealt: of each step the parts of every process; steps: the same, undivided."""

    job: Job
    rendered: list[Rendered]
    checked: list[Rendered]
    trained: Trained
    dealt: list[list[list[Batch]]]
    steps: list[Step]
    validating: list[Batch]
    identity: dict[str, Any]
    expected: Estimate
    notice: str | None


def train(
    store: Store,
    *,
    base: BaseModel,
    dataset: str,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: TrainSettings,
    work: Path,
    name: str = "training",
    restart: bool = False,
    metrics: MetricsSettings | None = None,
    progress: Progress = SILENT,
    crew: Crew | None = None,
) -> str:
    """Train base, or an adapter for it, on rows; returns the training record's digest.

    dataset: digest of the record the rows come from. work: a folder of this training's own, for checkpoints; a run
    killed at any moment carries on from there, restart throws that away. metrics: where it is shown, under its name,
    while it runs. crew: the processes to share it with, which this one leads. Raises Refused for rows that cannot be
    trained on or do not fit the memory, TunesmithError for a loss that is not a number.
    """
    runtime.prepare()
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    job = Job(name, rows, validation, settings, work)
    processes = 1 if crew is None else crew.size
    network = open_network(base, settings.quantize, processes)
    ready = _prepare(Renderer(base.folder), network, base, dataset, job, processes)
    on = device_of(ready.trained)
    if isinstance(ready.trained, ForeignLora):
        progress.say(f"{base.spec} ({base.family}) {SLOW}")
    progress.say(
        f"training {len(rows)} rows in {len(ready.steps)} steps: about {ready.expected.seconds:.0f} s and "
        f"{ready.expected.peak_memory_bytes / 1e9:.1f} GB of memory, {ready.expected.checkpoint_bytes / 1e6:.0f} MB a "
        "checkpoint"
        + (f" in each of {processes} processes, beside what they send each other" if crew else "")
        + (f" on {on} ({runtime.name_of(on)})" if on.type != "cpu" else "")
    )
    if ready.notice:
        progress.say(ready.notice)
    runtime.reset_peak_memory(device_of(ready.trained))
    shown = _shown(ready, metrics, progress)
    given = _given(ready, progress, shown)
    course = complete(Run(*given)) if crew is None else _lead(crew, store, base, ready, given)
    shown.finish()
    return _record(store, base, dataset, ready, course)


# What a Run is made of.
_Given = tuple[
    Network | Foreign,
    Trained,
    Sequence[Step],
    Sequence[Batch],
    TrainSettings,
    Path,
    Mapping[str, Any],
    Progress,
    Callable[[Course], None],
]


def _given(ready: _Prepared, progress: Progress, shown: Follower) -> _Given:
    trained, steps, validating, job = ready.trained, ready.steps, ready.validating, ready.job
    return (trained.network, trained, steps, validating, job.settings, job.work, ready.identity, progress, shown.follow)


def _lead(crew: Crew, store: Store, base: BaseModel, ready: _Prepared, given: _Given) -> Course:
    """Train with the other processes of a crew."""
    from tunesmith.training import machines

    files = {name: each["digest"] for name, each in store.record(base.digest).body["files"].items()}
    alike = {"base": files, "start": machines.start_of(ready.trained), **ready.identity["environment"]}
    share = machines.share_of(crew, ready.dealt, ready.validating)
    run = machines.SharedRun(crew, share, *given)
    return machines.lead(run, base.folder, alike, ready.rendered, ready.checked)


def train_together(
    store: Store,
    *,
    base: BaseModel,
    dataset: str,
    jobs: Sequence[Job],
    metrics: MetricsSettings | None = None,
    progress: Progress = SILENT,
) -> list[str | TunesmithError]:
    """Train several adapters in one process and on one copy of the base; each ends in the bytes of a training alone.

    Returns each job's record, or the error that ended it: the others go on. Raises as train does for what is wrong
    before a first step. Every job's settings must say that it `joins`.
    """
    runtime.prepare()
    renderer, network = Renderer(base.folder), open_network(base)
    if isinstance(network, Foreign):
        raise Refused("bases of other families are trained one after another", where=f"base {base.spec}")
    ready = [_prepare(renderer, network, base, dataset, job) for job in jobs]
    names = [job.name for job in jobs]
    _check_room(ready)
    progress.say(
        f"training {', '.join(names)}: {sum(each.expected.seconds for each in ready):.0f} s one after another, "
        "less in one pass"
    )
    for each in ready:
        if each.notice:
            progress.say(f"{each.job.name}: {each.notice}")
    runtime.reset_peak_memory(network.device)
    shown = [_shown(each, metrics, progress) for each in ready]
    runs = [Run(*_given(each, progress, told)) for each, told in zip(ready, shown, strict=True)]
    made: dict[int, str] = {}

    def keep(place: int) -> None:
        shown[place].finish()
        others = [name for name in names if name != names[place]]
        made[place] = _record(store, base, dataset, ready[place], runs[place].course, others)

    failed = fit_together(network, runs, progress, keep)
    return [failed[place] if place in failed else made[place] for place in range(len(jobs))]


def _shown(ready: _Prepared, metrics: MetricsSettings | None, progress: Progress) -> Follower:
    if metrics is None:
        return Follower(None, progress)
    return follower(metrics, ready.job.name, digest_of(ready.identity), ready.identity["settings"], progress)


def find_rate(
    *, base: BaseModel, rows: Sequence[TrainingRow], settings: TrainSettings, progress: Progress = SILENT
) -> RateSearch:
    """A range test over a training's first steps, going on into further epochs where one has too few. Keeps nothing.

    Raises Refused for rows that cannot be trained on.
    """
    runtime.prepare()
    rendered = _render(Renderer(base.folder), rows, settings)
    trained = untrained(open_network(base, settings.quantize), base.folder, settings)
    share = not isinstance(trained, ForeignLora)
    every = (step for epoch in count() for (step,) in lay_out_epoch(rendered, settings, epoch, 1, share=share))
    steps = list(islice(every, STEPS))
    check_room(steps, needs_of(trained, settings, validates=False))
    return range_test(trained.network, trained, steps, settings, progress)


def _check_room(ready: Sequence[_Prepared]) -> None:
    """Raises Refused where AdamW's moments and the best weights of all do not fit the memory; where a step has several
    parts, with a gradient of each."""
    numbers = sum(master.numel() for each in ready for master in each.trained.masters)
    needed, free = (
        numbers * (16 if any(len(step) > 1 for each in ready for step in each.steps) else 12),
        runtime.available_memory(device_of(ready[0].trained)),
    )
    if needed > free:
        raise Refused(
            f"training {len(ready)} adapters at once takes {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
            where="train.rank",
            fix="train them one after another: `tunesmith train NAME` for each; or lower their ranks",
        )


def _prepare(
    renderer: Renderer, network: Network | Foreign, base: BaseModel, dataset: str, job: Job, processes: int = 1
) -> _Prepared:
    settings = job.settings
    rendered = _render(renderer, job.rows, settings)
    checked = _render(renderer, job.validation[: settings.validation_rows], settings)
    trained = untrained(network, base.folder, settings)
    share = not isinstance(trained, ForeignLora)  # which computes each row whole
    if processes > 1 and not share:
        raise Refused(
            f"a base of family {base.family} is not trained by several processes",
            where="torchrun",
            fix="train it in one",
        )
    dealt = lay_out_run(rendered, settings, processes, share=share)
    steps: list[Step] = [[part for own in step for part in own] for step in dealt]
    validating = lay_out_validation(checked, settings, share=share)
    identity = {
        "base": base.digest,
        "dataset": dataset,
        "rows": digest_of([row.id for row in job.rows]),
        "tokens": digest_of([list(row.ids) for row in rendered]),
        "validation": digest_of([list(row.ids) for row in checked]),
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "environment": environment(processes, device_of(trained))
        | ({"quantized": described()} if settings.quantize else {}),
    }
    own: list[Step] = [step[0] for step in dealt]  # this process's share: all of it where it is alone
    expected = _expect(own, validating[::processes], settings, trained, job.work)
    labels = sum(map(label_count, rendered))
    notice = too_few_numbers(settings.rank, trained.parameters, labels) if settings.method == "lora" else None
    return _Prepared(job, rendered, checked, trained, dealt, steps, validating, identity, expected, notice)


def untrained(network: Network | Foreign, base: Path, settings: TrainSettings) -> Trained:
    """The weights under training as they begin. base: the folder of the base's files."""
    if isinstance(network, Foreign):
        return ForeignLora(network, settings)
    return Full(network, settings, base) if settings.method == "full" else Lora(network, settings)


def device_of(trained: Trained) -> torch.device:
    """Where a training's weights lie, and where it computes."""
    return trained.masters[0].device


def _record(
    store: Store, base: BaseModel, dataset: str, ready: _Prepared, course: Course, together: Sequence[str] = ()
) -> str:
    """Keep a training that is over. together: names of those it shared its passes with."""
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
        "peak_memory_bytes": runtime.peak_memory(device_of(ready.trained)),
        "checkpoint_bytes": newest_bytes(ready.job.work),
        **({"together": list(together)} if together else {}),
        **({"network": "transformers"} if isinstance(ready.trained, ForeignLora) else {}),
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
        trained.rest()
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


def environment(processes: int, on: torch.device = runtime.CPU) -> dict[str, Any]:
    """What a training's bytes depend on beside its input: versions, the machine, how the work was shared out."""
    there = on.type != "cpu"
    return {
        "engine": ENGINE,
        "kernels": "portable" if there else native.identity(),
        "threads": runtime.prepare(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        **({"processes": processes} if processes > 1 else {}),
        **({"device": runtime.name_of(on)} if there else {}),
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
        "estimate": expected.model_dump(),
        "final_loss": sum(step["loss"] for step in tail) / len(tail),
        "curve": asdict(course)["curve"],
        "validation": course.validation,
        "overfitting": course.overfitting,
        "kept": kept,
        "ended": course.ended,
    }

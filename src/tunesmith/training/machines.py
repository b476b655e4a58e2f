"""One training by several processes, on one machine or on several, as torchrun starts them (data parallelism).

Each holds the whole base. The first one leads: it walks the chain and has the lock, the optimiser, the checkpoints and
the course of the run, as a training alone has. The others wait until a training is due, are told what it consists of,
and then compute their share of the rows of each step. A round: the leader sends the masters, every process takes its
share's gradients of the mean loss over the whole step's labels, and their sum in fp32 arrives at the leader.

So only the leader has something to keep, and nothing to agree on; what it costs is what an all-reduce costs, half of it
before the step and half behind. What is sent is numbers and JSON, never a pickle, to whoever joined: neither is
encrypted or authenticated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import Progress
from tunesmith.models import runtime
from tunesmith.models.base import base_files
from tunesmith.models.batch import Batch
from tunesmith.models.rendering import Rendered
from tunesmith.models.weights import load_network
from tunesmith.training.batches import lay_out_run, lay_out_validation
from tunesmith.training.loop import Course, Run, Step, complete, gradients, label_total, validation_loss
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainable import Trained

# How long a process waits for another within a training: for the slowest step, and for the leader to load the base, to
# update the weights and to write a checkpoint. One that died is noticed at once, one that hangs after this.
TIMEOUT = timedelta(minutes=10)
_LOOK = 0.5  # seconds between two looks whether a training is due
_DUE = "tunesmith/training"
_END, _STEP, _VALIDATION = range(3)


class Crew:
    """The processes that torchrun started. rank: which of them this one is, the leader being 0; size: how many."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._called = False
        with _others():
            self._store: Any = next(iter(rendezvous("env://", rank, size, timeout=TIMEOUT)))[0]

    def call(self, job: Mapping[str, Any]) -> None:
        """Leader: tell the others that a training is due, and what it is (JSON)."""
        with _others():
            self._store.set(_DUE, b"due")
            self._called = True
            self._join()
            data = torch.frombuffer(bytearray(json.dumps(job).encode()), dtype=torch.uint8)
            dist.broadcast(torch.tensor([data.numel()]), 0)
            dist.broadcast(data, 0)

    def called(self) -> dict[str, Any] | None:
        """Follower: wait until a training is due, for as long as the leader is there; None where none was."""
        with _others():
            while not self._store.check([_DUE]):
                time.sleep(_LOOK)
            if self._store.get(_DUE) != b"due":
                return None
            self._join()
            size = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(size, 0)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0)
            found: dict[str, Any] = json.loads(data.numpy().tobytes())
            return found

    def dismiss(self) -> None:
        """Leader: let the others end, where no training was due."""
        if not self._called:
            with _others():
                self._store.set(_DUE, b"none")

    def say(self, what: int, place: int) -> None:
        """Leader: begin a round."""
        with _others():
            dist.broadcast(torch.tensor([what, place]), 0)

    def hear(self) -> tuple[int, int]:
        """Follower: which round begins."""
        said = torch.zeros(2, dtype=torch.int64)
        with _others():
            dist.broadcast(said, 0)
        what, place = said.tolist()
        return what, place

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Make all processes' tensors the leader's."""
        with _others():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Make the leader's tensors the sums of all processes'; the others' are spent."""
        with _others():
            for tensor in tensors:
                dist.reduce(tensor, 0)

    def _join(self) -> None:
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)


@contextlib.contextmanager
def joined() -> Iterator[Crew | None]:
    """The processes that torchrun started with this one; None where there are no others. Leaves them at the end.

    Raises UsageError where the environment says only half of it, and where they would compute on GPUs.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield None
        return
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR")}
    wrong = [name for name, value in told.items() if not (value if name == "MASTER_ADDR" else value.isdecimal())]
    if wrong:
        raise UsageError(
            f"WORLD_SIZE is {size}, as torchrun sets it, and {wrong[0]} is {told[wrong[0]] or 'missing'}",
            where="environment",
            fix="start it with torchrun; or unset WORLD_SIZE to train in one process",
        )
    if (on := runtime.device()).type != "cpu":
        raise UsageError(
            f"processes share a training on their processors alone, and this one computes on {on}",
            where="TUNESMITH_DEVICE",
            fix="set it to cpu; or unset WORLD_SIZE to train in one process",
        )
    crew = Crew(int(os.environ["RANK"]), int(size))
    try:
        yield crew
        if crew.rank == 0:
            crew.dismiss()
    except BaseException:
        if crew.rank == 0:
            with contextlib.suppress(TunesmithError):
                crew.dismiss()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Share(NamedTuple):
    """What one process computes of a run: its parts of every step, and of the validation. labels: of all processes."""

    steps: Sequence[Step]
    labels: Sequence[float]
    validation: Step
    validation_labels: float


def share_of(crew: Crew, dealt: Sequence[Sequence[Step]], validation: Sequence[Batch]) -> Share:
    """This process's share of a run whose steps were dealt to all of a crew."""
    labels = [label_total([part for share in step for part in share]) for step in dealt]
    own = [step[crew.rank] for step in dealt]
    return Share(own, labels, validation[crew.rank :: crew.size], label_total(validation))


class SharedRun(Run):
    """A run whose gradients and validation losses are summed over a crew. run: what loop.Run is made of."""

    def __init__(self, crew: Crew, share: Share, *run: Any) -> None:
        super().__init__(*run)
        self.crew, self.share, self.processes = crew, share, crew.size

    def compute(self) -> float:
        """Leave the due step's gradients on the masters; returns its loss."""
        return self._round(_STEP, self.course.step)

    def measure(self) -> float:
        """The validation loss."""
        return self._round(_VALIDATION, 0)

    def _round(self, what: int, place: int) -> float:
        self.crew.say(what, place)
        return _take_part(self.crew, self.trained, self.share, what, place)


def lead(
    run: SharedRun, folder: Path, alike: Mapping[str, Any], rows: Sequence[Rendered], checked: Sequence[Rendered]
) -> Course:
    """Train to the end with the others. folder: the base's. alike: JSON that every process must say the same of itself:
    its base's files, the weights it begins with, its environment."""
    run.crew.call(
        {
            "folder": str(folder.absolute()),
            "alike": dict(alike),
            "settings": run.settings.model_dump(mode="json"),
            "rows": [_written(row) for row in rows],
            "validation": [_written(row) for row in checked],
        }
    )
    course = complete(run)
    run.crew.say(_END, 0)
    return course


def follow(crew: Crew, progress: Progress) -> None:
    """Wait for the leader's training and compute this process's share of it until it is over.

    Raises Refused where this process has another base or would compute otherwise.
    """
    from tunesmith.training.train import environment, untrained

    runtime.prepare()
    job = crew.called()
    if job is None:
        return
    folder, settings = Path(job["folder"]), TrainSettings.model_validate(job["settings"])
    if not folder.is_dir():
        raise Refused("the base model is not here", where=str(folder), fix="put it where the first process has it")
    files = {path.name: digest_file(path) for path in base_files(folder)}
    trained = untrained(load_network(folder), folder, settings)
    check_alike(job["alike"], {"base": files, "start": start_of(trained), **environment(crew.size)})
    rows, checked = ([_read(row) for row in job[key]] for key in ("rows", "validation"))
    share = share_of(crew, lay_out_run(rows, settings, crew.size), lay_out_validation(checked, settings))
    progress.say(f"process {crew.rank + 1} of {crew.size} computes its share")
    while (round_ := crew.hear())[0] != _END:
        _take_part(crew, trained, share, *round_)
        for master in trained.masters:
            master.grad = None


def start_of(trained: Trained) -> str:
    """Digest of the weights a training begins with."""
    hasher = hashlib.sha256()
    for master in trained.masters:
        hasher.update(master.numpy().data)
    return f"sha256:{hasher.hexdigest()}"


def _take_part(crew: Crew, trained: Trained, share: Share, what: int, place: int) -> float:
    """One process's part of a round; the leader gets the loss, and after a step the gradients, of all."""
    crew.send([master.detach() for master in trained.masters])
    if crew.rank > 0:
        with torch.no_grad():
            trained.refresh_copies()
    if what == _STEP:
        own = gradients(trained.network, trained, share.steps[place], share.labels[place])
    else:
        own = validation_loss(trained.network, trained, share.validation, share.validation_labels)
    loss = torch.tensor([own], dtype=torch.float64)
    crew.sum([loss])
    if what == _STEP:
        for master in trained.masters:
            if master.grad is None:  # a share without rows
                master.grad = torch.zeros_like(master)
            crew.sum([master.grad])
    return float(loss)


def check_alike(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises Refused where this process would compute something else than the leader, or round otherwise."""
    own = json.loads(json.dumps(own))
    differs = sorted(key for key in theirs.keys() | own.keys() if theirs.get(key) != own.get(key))
    if differs:
        raise Refused(
            f"this process has another {', '.join(differs)} than the first one: their sums would mean nothing",
            where="torchrun",
            fix="use one kind of machine, the same versions and base, and one TUNESMITH_THREADS for all",
        )


def _written(row: Rendered) -> list[Any]:
    return [list(row.ids), "".join("01"[trained] for trained in row.trained)]


def _read(row: list[Any]) -> Rendered:
    ids, trained = row
    return Rendered(tuple(ids), tuple(each == "1" for each in trained))


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """What goes wrong between processes, as an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise TunesmithError(
            f"another process of this training ended, or did not answer for {TIMEOUT.total_seconds():.0f} s",
            where=f"torchrun: {str(error).splitlines()[0][:200]}",
            fix="see what it said; the same command carries on from the last whole checkpoint",
        ) from error

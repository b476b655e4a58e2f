"""The processes that train one model together (ranks), and what they tell each other.

Tensors on GPUs travel over NCCL; messages and tensors on CPUs over gloo. Values travel as JSON and never as pickles.
`ALONE` stands for one process, for which nothing here does anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.system.machine import end_with_parent, started_by_torchrun
from tunesmith.engines.device import backends, computing_device

Value = TypeVar("Value")

_PATIENCE = timedelta(days=365)  # rank 0 may build data for hours before the others have anything to do


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, as one of them sees them.

    rank: this process's number, from 0. size: how many there are. local: how many of them run on this machine.
    copies: of the model, each of which is sharded over a part of the ranks. patient: the group whose messages may take
    longer than a step.
    """

    rank: int = 0
    size: int = 1
    local: int = 1
    copies: int = 1
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def agree(self, make: Callable[[], Value]) -> Value:
        """What make returns on rank 0, on every rank. It must be JSON where there are several ranks.

        Where make raises on rank 0, the others raise TunesmithError.
        """
        if self.size == 1:
            return make()
        if not self.first:
            told = self._broadcast(None)
            if "stopped" in told:
                raise TunesmithError(f"rank 0 stopped: {told['stopped']}")
            value: Value = told["value"]
            return value
        try:
            made = make()
        except BaseException as error:
            self._broadcast({"stopped": str(error) or type(error).__name__})
            raise
        self._broadcast({"value": made})
        return made

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        mine = _encoded(value)
        lengths = [torch.zeros((), dtype=torch.long) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, torch.tensor(len(mine)))
        longest = int(max(lengths))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        torch.distributed.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        each = zip(parts, map(int, lengths), strict=True)
        return [json.loads(part[:length].numpy().tobytes()) for part, length in each]

    def total(self, value: float) -> float:
        """The sum of a number over all ranks: added in their order, so that it is the same everywhere."""
        return float(sum(self.gather(value)))

    def most(self, value: int) -> int:
        """The largest value that a rank has."""
        return int(max(self.gather(value)))

    def clock(self, own: Callable[[], float]) -> Callable[[], float]:
        """A clock that gives every rank rank 0's reading, so that all decide alike. All ranks read it together."""
        return own if self.size == 1 else lambda: self.agree(own)

    def spread(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, src=0)

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        encoded = _encoded(value)
        length = torch.tensor(len(encoded))
        torch.distributed.broadcast(length, src=0, group=self.patient)
        if not self.first:
            encoded = torch.empty(int(length), dtype=torch.uint8)
        torch.distributed.broadcast(encoded, src=0, group=self.patient)
        return json.loads(encoded.numpy().tobytes())


ALONE = Ranks()


@contextmanager
def joined(copies: int = 1) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected until the end; ALONE where it started only one process.

    copies: of the model. Raises UsageError where they do not divide the ranks.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    end_with_parent(os.getppid())  # torchrun, which starts this process in a session of its own
    if (size := int(os.environ["WORLD_SIZE"])) % copies:
        raise UsageError(
            f"{size} processes cannot hold {copies} copies of the model",
            where="copies of the model",
            fix="start a multiple of that many",
        )
    store, rank, size = next(rendezvous("env://"))
    # torchrun gives the same store again after a restart, with the addresses of the processes that ended.
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    computing_device()  # before the first collective operation, which uses the current GPU
    torch.distributed.init_process_group(backends(), store=store, rank=rank, world_size=size)
    try:
        yield connected_ranks(copies)
    except RuntimeError as error:
        if not any(name in str(error).lower() for name in ("gloo", "nccl")):
            raise
        raise TunesmithError(
            "another rank has ended, and this one cannot go on without it; its message says why",
            fix="start the same command again: it goes on from the newest checkpoint",
        ) from error
    # Not after an error: the others may wait for this rank. torchrun notices that it ended, and ends them.
    torch.distributed.destroy_process_group()


def connected_ranks(copies: int = 1) -> Ranks:
    """The ranks of torch's process group."""
    distributed = torch.distributed
    return Ranks(
        rank=distributed.get_rank(),
        size=distributed.get_world_size(),
        local=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        copies=copies,
        patient=distributed.new_group(backend="gloo", timeout=_PATIENCE),
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over the ranks, all of which call this; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def held(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded over the ranks; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def first_row(tensor: Any) -> int:
    """Where this rank's rows of a sharded tensor begin; 0 for any other tensor."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    mesh = tensor.device_mesh
    parts, mine = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return int(min(len(tensor), mine * -(-len(tensor) // parts)))


def _encoded(value: Any) -> Tensor:
    """The value's JSON as bytes in torch's own memory: gloo's thread may be the last to hold them, and Python's memory
    can be freed only by a thread that enters the interpreter."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()

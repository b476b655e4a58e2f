"""Where a worker has jobs performed: processes on this machine, each in a slot. A Ray cluster: on_ray.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Protocol

from tunesmith.core.errors import TunesmithError
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.slots import HeldSlot, Slot

# Seconds that a process may take to start and to renew its lease itself. The worker renews it so long.
STARTING = 300.0


class JobProcess(Protocol):
    """A process that performs a job."""

    def is_alive(self) -> bool:
        """Whether it has not ended."""

    def is_starting(self) -> bool:
        """Whether it may not renew its lease itself yet."""

    def terminate(self) -> None:
        """Tell it to stop between two of its steps."""

    def kill(self) -> None:
        """End it at once."""

    def ending(self) -> TunesmithError:
        """How it ended; UsageError or Refused where it could not perform the job there. Waits for the end."""


class Place(Protocol):
    """Where one job at a time is performed."""

    def take(self) -> bool:
        """Keep others from using it; False where they do."""

    def start(self, lease: Lease) -> JobProcess:
        """Start a process that performs a job. Only after take."""

    def leave(self) -> None:
        """Let others use it."""


class LocalPlace:
    """A slot of this machine. start: starts a process with its lease and slot."""

    def __init__(self, slot: Slot, start: Callable[[Lease, HeldSlot], BaseProcess]) -> None:
        self._slot, self._start = slot, start
        self._held: HeldSlot | None = None

    def __str__(self) -> str:
        """The slot."""
        return str(self._slot)

    def take(self) -> bool:
        """Lock the slot."""
        self._held = self._slot.take()
        return self._held is not None

    def start(self, lease: Lease) -> LocalProcess:
        """Start a process on the slot's cores."""
        assert self._held is not None
        with self._held.cores():
            return LocalProcess(self._start(lease, self._held))

    def leave(self) -> None:
        """Unlock the slot, once the job's process has ended too."""
        if self._held is not None:
            self._held.release()
            self._held = None


class LocalProcess:
    """A child of the worker. It stops between two steps at SIGTERM."""

    def __init__(self, process: BaseProcess) -> None:
        self._process, self._began = process, time.monotonic()
        self.is_alive, self.terminate, self.kill = process.is_alive, process.terminate, process.kill

    def is_starting(self) -> bool:
        """Whether it was started a short time ago; on a busy machine that takes long."""
        return time.monotonic() - self._began < STARTING

    def ending(self) -> TunesmithError:
        """Its signal or exit code."""
        self._process.join()
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return TunesmithError(f"its process ended with {how}")

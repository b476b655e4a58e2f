"""Has jobs performed by processes on the nodes of a Ray cluster. Ray sends Python objects by pickle.

An actor on a node starts the job's process and waits for it. Both end with the worker, and with the node.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.system.ray_cluster import actor_options, limit_to
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.places import STARTING, LocalProcess

_ANSWERS = 30.0  # seconds until an actor that has ended says how
# Checks on a node that a job can be performed there. Gets a path that only the worker's own folder has, or "".
Check = Callable[[Lease, str], None]
# Performs a job in the process that calls it. Gets the number of the process that started it.
Perform = Callable[[Lease, int], None]


class RayPlace:
    """Room for one job on a cluster. ray: the connected module.

    resources: what a job takes of a node. check, perform: functions of modules that the nodes have too. marked: a
    folder that every node must see, in which a mark is made meanwhile; None where nodes need not share one.
    """

    def __init__(
        self, ray: Any, resources: Mapping[str, float], check: Check, perform: Perform, marked: Path | None
    ) -> None:
        self._ray, self._resources, self._given, self._marked = ray, dict(resources), (check, perform), marked
        self._mark = contextlib.ExitStack()

    def take(self) -> bool:
        """Nothing: Ray has a job wait until a node has room for it."""
        return True

    def start(self, lease: Lease) -> RayProcess:
        """Start the actor. It may wait for a node."""
        mark = "" if self._marked is None else str(self._mark.enter_context(scratch_folder(self._marked)))
        options = {**actor_options(self._resources), "max_concurrency": 2}
        try:
            actor = self._ray.remote(_Performer).options(**options).remote()
            return RayProcess(self._ray, actor, actor.perform.remote(self._resources, *self._given, lease, mark))
        except self._ray.exceptions.RayError as error:
            raise TunesmithError(f"Ray starts no process: {error}", where="jobs") from error

    def leave(self) -> None:
        """Remove the mark."""
        self._mark.close()


class RayProcess:
    """A job's process on a node. ended: Ray's reference to what the actor returns at the end."""

    def __init__(self, ray: Any, actor: Any, ended: Any) -> None:
        self._ray, self._actor, self._ended = ray, actor, ended
        self._ready, self._began = actor.__ray_ready__.remote(), -1.0

    def is_alive(self) -> bool:
        """Whether the actor still waits for a node or for the process."""
        return not self._ray.wait([self._ended], timeout=0)[0]

    def is_starting(self) -> bool:
        """Whether it waits for a node, or had one a short time ago."""
        if self._began < 0 and self._ray.wait([self._ready], timeout=0)[0]:
            self._began = time.monotonic()
        return self._began < 0 or time.monotonic() - self._began < STARTING

    def terminate(self) -> None:
        """Tell it to stop between two of its steps."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """End the actor, with which the process ends."""
        self._ray.kill(self._actor)

    def ending(self) -> TunesmithError:
        """What the actor says, or that it was lost with its node."""
        try:
            answer: TunesmithError = self._ray.get(self._ended, timeout=_ANSWERS)
        except self._ray.exceptions.RayTaskError as error:
            return TunesmithError(f"its process could not be started: {error.cause}")
        except self._ray.exceptions.RayError as error:
            return TunesmithError(f"it was lost with its node or its actor: {' '.join(str(error).split())[:300]}")
        finally:
            self._ray.kill(self._actor)  # it would keep the node's resources
        return answer


class _Performer:
    """An actor of Ray that has one job performed by a child process. It returns errors; Ray would wrap raised ones."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._stopped = False
        self._changing = threading.Lock()

    def perform(
        self, resources: Mapping[str, float], check: Check, perform: Perform, lease: Lease, mark: str
    ) -> TunesmithError:
        """How the process ended, which performs the job."""
        limit_to(resources)
        try:
            check(lease, mark)
        except TunesmithError as error:
            return error
        process = multiprocessing.get_context("spawn").Process(target=perform, args=(lease, os.getpid()))
        with self._changing:
            if self._stopped:
                return TunesmithError("it was told to stop before it began")
            process.start()
            self._process = process
        return LocalProcess(process).ending()

    def stop(self) -> None:
        """Tell the process to stop between two of its steps."""
        with self._changing:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()

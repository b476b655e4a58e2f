"""The worker: takes jobs from the queue and has each performed by a process of its own, in a place of its own.

A job's process renews its lease itself, so that a job whose process hangs is taken back. The worker notices at once
where a process ended without recording what came of its job, as after `kill -9` or without memory.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import TunesmithError
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import LEASE_SECONDS, Lease, LeaseLost, worker_name
from tunesmith.jobs.performing import record_error
from tunesmith.jobs.places import JobProcess, Place
from tunesmith.store.store import Store

# Seconds between two looks at the queue and at the processes.
_POLL = 0.5
# Seconds that a process may take to stop by itself between two of its steps. It is killed then; its checkpoints stay.
_GRACE_SECONDS = 60.0
# Seconds between two looks at what may add jobs.
_ALSO_SECONDS = 300.0


@dataclass
class _Child:
    lease: Lease
    place: Place
    process: JobProcess
    renewed: float  # when the worker renewed the lease last
    told: float | None = None  # when it was told to stop, or a person asked for that


class Worker:
    """Performs the jobs of one project until it is told to stop.

    places: where jobs are performed, one at a time in each. say: shows a line to a person. stopping: once set, no job
    is taken, and those that are performed go back into the queue. also: may add jobs; it is called at the start, and
    again every five minutes.
    """

    def __init__(
        self,
        store: Store,
        project: str,
        kinds: Collection[str],
        places: Sequence[Place],
        *,
        lease_seconds: float = LEASE_SECONDS,
        say: Callable[[str], None] = lambda _: None,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self._also, self._also_at = also, -math.inf
        self.stopping = threading.Event()
        self._store, self._project, self._kinds, self._places = store, project, kinds, places
        self._lease_seconds, self._say = lease_seconds, say
        self._name = worker_name()
        self._children: list[_Child] = []
        self._complaint = ""

    def run(self, *, until_empty: bool = False) -> None:
        """Perform jobs. until_empty: return once no job is queued or performed.

        A database that cannot be reached is reported, and tried again.
        """
        try:
            while True:
                idle = False
                try:
                    idle = self._turn()
                except TunesmithError as error:
                    self._complain(str(error))
                if not self._children and (self.stopping.is_set() or (until_empty and idle)):
                    return
                time.sleep(_POLL) if self.stopping.is_set() else self.stopping.wait(_POLL)
        finally:
            for child in self._children:
                child.process.kill()
                child.process.ending()
                child.place.leave()
                with contextlib.suppress(TunesmithError):  # otherwise the lease runs out
                    leases.stop(self._store, child.lease, "its worker was ended")

    def _turn(self) -> bool:
        """Look after the processes and take new jobs. Returns whether no job waits or is performed."""
        for child in list(self._children):
            self._look_after(child)
        if not self.stopping.is_set() and time.monotonic() - self._also_at >= _ALSO_SECONDS:
            self._also_at = time.monotonic()
            try:
                self._also()
            except Exception as error:  # noqa: BLE001 - jobs are performed, whatever keeps others from being added
                self._say(f"nothing was added: {error}")
        waits = queue.is_waiting(self._store, self._project)
        free = False
        for place in self._places:
            if self.stopping.is_set() or any(child.place is place for child in self._children):
                continue
            if place.take():
                free = True
                if not self._begin(place):
                    break
        if waits and not free and not self._children and not self.stopping.is_set():
            self._complain(f"jobs of other workers hold {' and '.join(map(str, self._places))}")
        else:
            self._complaint = ""
        return not self._children and not waits

    def _begin(self, place: Place) -> bool:
        """Start the next job in a place that was taken. Returns whether there was one; the place is left otherwise."""
        lease = None
        try:
            lease = leases.claim(
                self._store, self._name, self._kinds, project=self._project, seconds=self._lease_seconds
            )
            if lease is not None:
                process = place.start(lease)
                self._children.append(_Child(lease, place, process, renewed=time.monotonic()))
                self._say(f"job {lease.job}: started")
                return True
        except TunesmithError:
            place.leave()  # first, since the database may be away or the lease lost
            if lease is not None:
                leases.stop(self._store, lease, "its process could not be started", busy=True)
            raise
        place.leave()
        return False

    def _complain(self, what: str) -> None:
        """Say why nothing is done, once and not at every turn."""
        if what != self._complaint:
            self._complaint = what
            self._say(f"waiting: {what}")

    def _look_after(self, child: _Child) -> None:
        """Tell a process to stop, kill it where it does not, and record how it ended where it did not do so itself."""
        process, lease = child.process, child.lease
        if process.is_alive():
            job = queue.get(self._store, lease.job)
            lost = job.fence != lease.fence
            if not (self.stopping.is_set() or job.wanted or lost):
                child.told = None  # a pause may be taken back
            elif child.told is None:
                child.told = time.monotonic()
                if self.stopping.is_set():
                    process.terminate()
            if child.told is None or time.monotonic() - child.told <= _GRACE_SECONDS:
                self._renew(child)
                return
            process.kill()
        ending = process.ending()
        with contextlib.suppress(LeaseLost):  # it has recorded how it ended, or another worker has the job
            if child.told is not None:
                leases.stop(self._store, lease, "its process did not stop in time and was killed")
            else:
                record_error(self._store, lease, ending, "process_ended")
        self._children.remove(child)
        child.place.leave()
        job = queue.get(self._store, lease.job)
        self._say(f"job {job.id}: {job.state}{': ' + str(job.error['what']) if job.error else ''}")

    def _renew(self, child: _Child) -> None:
        """Renew the lease of a process that may still be starting, which takes long on a busy machine."""
        now = time.monotonic()
        if child.process.is_starting() and now - child.renewed > child.lease.seconds / 4:
            with contextlib.suppress(LeaseLost):  # the next look notices that
                leases.renew(self._store, child.lease)
            child.renewed = now

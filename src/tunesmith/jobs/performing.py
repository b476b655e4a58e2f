"""Performs a job in this process: renews its lease, mirrors progress and log, and records what came of it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import NamedTuple

from tunesmith.core import telemetry
from tunesmith.core.errors import Inconclusive, Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress, Stopped, Task
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.telemetry import names
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.queue import Curve, JobError, JobStep
from tunesmith.store.locks import LockHeld
from tunesmith.store.store import Store

# Seconds between two signs of life, at most.
_BEAT = 2.0
_LOGGED_NOTES = 20  # of a step, at most
_MOST_TRAININGS = 50  # of a job
_LONGEST_NAME = 256  # of a training
_CODES: Mapping[type[TunesmithError], str] = {
    UsageError: "wrong_usage",
    Refused: "refused",
    Inconclusive: "inconclusive",
}


class Outcome(NamedTuple):
    """What came of a job that was performed to its end. error: why it failed nevertheless."""

    result: JsonObject
    error: JobError | None = None


class JobProgress:
    """A core.progress.Progress that the job's row and log show, besides another one.

    Once `stopping` is set, the next report of a finished part raises Stopped. logged: the step whose notes are lines of
    the log, too, some of them: clients of fine-tuning jobs read a training's loss there.
    """

    logged = ""

    def __init__(self, store: Store, lease: Lease, shown: Progress, stopping: threading.Event | None = None) -> None:
        self.stopping = stopping or threading.Event()
        self._store, self._lease, self._shown = store, lease, shown
        self._tasks: list[_JobTask] = []
        self._curves: dict[str, Curve] = {}
        self._changed: set[str] = set()
        self._noting = threading.Lock()  # one thread measures, another one notes the curves

    def say(self, text: str) -> None:
        """Add a line to the job's log."""
        self._shown.say(text)
        leases.log(self._store, self._lease, text)

    def measured(self, name: str, values: Mapping[str, float]) -> None:
        """Add a point to the curve of a training. Trainings beyond the most that a job may have are left out."""
        name = name[:_LONGEST_NAME]
        with self._noting:
            if name in self._curves or len(self._curves) < _MOST_TRAININGS:
                self._curves.setdefault(name, Curve()).add(values)
                self._changed.add(name)

    def changed_curves(self) -> dict[str, Curve]:
        """Copies of the curves that changed since the last call, by the training's name."""
        with self._noting:
            names, self._changed = self._changed, set()
            return {name: deepcopy(self._curves[name]) for name in sorted(names)}

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """Open a step of total units."""
        self.go_on()
        with telemetry.span(title), self._shown.task(title, total) as shown:
            task = _JobTask(self, shown, title, total)
            self._tasks.append(task)
            try:
                yield task
            finally:
                self._tasks.remove(task)

    def go_on(self) -> None:
        """Raise Stopped where the job is to be stopped."""
        if self.stopping.is_set():
            raise Stopped

    def document(self) -> JsonObject:
        """The innermost step that is open; {} where none is."""
        tasks = list(self._tasks)
        return tasks[-1].step().document() if tasks else {}


class _JobTask:
    def __init__(self, progress: JobProgress, shown: Task, title: str, total: float) -> None:
        self._progress, self._shown, self._title, self._total = progress, shown, title, total
        self._done, self._note, self._began = 0.0, "", time.monotonic()
        self._logs_from = 0.0 if title == progress.logged else math.inf

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount
        self._shown.advance(amount)
        self._progress.go_on()

    def note(self, text: str) -> None:
        self._note = text
        self._shown.note(text)
        if self._done >= self._logs_from:
            self._progress.say(f"{self._title.capitalize()} is {self._done / self._total:.0%} done: {text}")
            self._logs_from = self._done + self._total / _LOGGED_NOTES

    def step(self) -> JobStep:
        seconds = time.monotonic() - self._began
        left = seconds * (self._total - self._done) / self._done if self._done else None
        return JobStep(
            step=self._title,
            done=self._done,
            total=self._total,
            note=self._note,
            seconds=seconds,
            seconds_left=None if left is None else max(0.0, left),
        )


def perform(
    store: Store,
    lease: Lease,
    work: Callable[[JobProgress], Outcome],
    *,
    shown: Progress = SILENT,
    stopping: threading.Event | None = None,
) -> None:
    """Do a job's work and record what came of it. Meanwhile `store` writes only as long as the lease is held.

    shown: also shows the progress. stopping: once set, the job is given back at the end of the step that is running.
    Raises what work raises, after recording it; Stopped where the job was stopped; LeaseLost where it was taken back.
    """
    progress = JobProgress(store, lease, shown, stopping)
    try:
        job = queue.get(store, lease.job)
        stated: Mapping[str, str | int] = {names.JOB: job.id, names.JOB_KIND: job.kind, names.PROJECT: job.project}
        fenced = store.fenced(lambda session: leases.check(session, lease))
        with fenced, _beating(store, lease, progress), telemetry.span(names.JOB_SPAN, stated):
            outcome = work(progress)
        leases.finish(store, lease, outcome.result, outcome.error)
    except BaseException as error:
        with contextlib.suppress(TunesmithError):  # where nothing can be recorded, the lease runs out
            _record(store, lease, error)
        raise


@contextlib.contextmanager
def _beating(store: Store, lease: Lease, progress: JobProgress) -> Iterator[None]:
    """Renew the lease in the background. Stops the work where a person wants that, or where the lease is lost."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(min(_BEAT, lease.seconds / 4)):
            try:
                if leases.renew(store, lease, progress.document(), progress.changed_curves()):
                    progress.stopping.set()
            except LeaseLost:
                progress.stopping.set()
                return
            except TunesmithError:  # the database cannot be reached: the next turn may renew the lease
                continue

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(TunesmithError):  # the newest points; the job's end says what matters more
            leases.renew(store, lease, curves=progress.changed_curves())


def _record(store: Store, lease: Lease, error: BaseException) -> None:
    """Record why a job's work ended early. Raises LeaseLost where the job was taken back."""
    if isinstance(error, LeaseLost):
        return
    if isinstance(error, Stopped):
        leases.stop(store, lease, "its worker was told to stop")
    elif isinstance(error, LockHeld) and not lease.own:
        leases.stop(store, lease, f"{error.what} ({error.where})", busy=True)
    elif isinstance(error, TunesmithError):
        record_error(store, lease, error, "failed")
    elif isinstance(error, Exception):
        leases.log(store, lease, "".join(traceback.format_exception(error)))
        what = f"{type(error).__name__}: {error}"
        leases.fail(store, lease, JobError(code="internal", what=what), retry=True)
    else:
        leases.fail(store, lease, JobError(code="interrupted", what="it was interrupted"), retry=False)


def record_error(store: Store, lease: Lease, error: TunesmithError, code: str) -> None:
    """Record why a job failed. code: of an error that may pass, such as a full disk or a lost connection: the job is
    tried again then. What was refused once is refused again. Raises LeaseLost where the job was taken back."""
    lasting = _CODES.get(type(error))
    leases.fail(store, lease, JobError.of(error, code=lasting or code), retry=lasting is None)

"""The thread that decodes the rows of all requests as one running batch."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tunesmith.engines.native import runtime
from tunesmith.engines.native.decoding.running_batch import Row, RunningBatch
from tunesmith.engines.process import prepare_process

Result = TypeVar("Result")
_SCHEDULERS: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_IDLE_SECONDS = 2.0  # after so long without work the thread ends; the next row starts another


class Scheduler:
    """Takes rows and work from any thread and does all arithmetic in one thread.

    Each thread that computes starts OpenMP workers of its own, and two such sets would compete for the cores. So
    threads that computed something before (laying out weights, say) stop theirs here: see runtime.release_threads.
    """

    def __init__(self, batch: RunningBatch) -> None:
        runtime.release_threads()
        self._batch = batch
        self._changed = threading.Condition()
        self._work: list[Callable[[], object]] = []
        self._thread: threading.Thread | None = None
        self._stopping = False
        _SCHEDULERS.add(self)

    def submit(self, rows: Sequence[Row]) -> None:
        """Decode these rows from the next step on."""
        runtime.release_threads()
        self._do(lambda: self._batch.waiting.extend(rows))

    def cancel(self, rows: Sequence[Row]) -> None:
        """Stop decoding these rows. A listener may still receive one more token."""
        self._do(lambda: self._batch.drop(rows))

    def run(self, work: Callable[[], Result]) -> Result:
        """Do other work between two steps; returns its result."""
        runtime.release_threads()
        future: Future[Result] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)

        self._do(do)
        return future.result()

    def stop(self) -> None:
        """End the thread after the current step. Rows that are being decoded get no more tokens."""
        with self._changed:
            self._stopping, thread = True, self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _do(self, work: Callable[[], object]) -> None:
        """Have the thread do something before its next step."""
        with self._changed:
            self._work.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._decode, name="tunesmith-decoding", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _decode(self) -> None:
        try:
            self._decode_all()
        except BaseException:
            with self._changed:  # the next row starts another thread
                self._thread = None
            raise

    def _decode_all(self) -> None:
        torch.set_num_threads(prepare_process())
        while True:
            with self._changed:
                due = self._changed.wait_for(lambda: self._stopping or self._work or self._batch, _IDLE_SECONDS)
                if not due or self._stopping:
                    self._thread = None
                    return
                work, self._work = self._work, []
            for do in work:
                do()
            if self._batch:
                try:
                    self._batch.step()
                except BaseException as error:  # noqa: BLE001 - raised where the rows' answers are awaited
                    self._batch.fail(error)


@atexit.register
def _stop_all() -> None:
    """Stop all threads before the interpreter ends: a thread in compiled code would make the whole process abort."""
    for scheduler in list(_SCHEDULERS):
        scheduler.stop()

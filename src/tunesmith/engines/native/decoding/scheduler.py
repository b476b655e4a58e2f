"""One thread that decodes for all threads that ask: their rows are one batch."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from tunesmith.engines.native import runtime
from tunesmith.engines.native.decoding.decoder import Batch
from tunesmith.engines.native.decoding.rows import Row

Result = TypeVar("Result")
_LIVE: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_LINGERS = 2.0  # seconds without work after which the thread ends; the next row starts another


class Scheduler:
    """Takes rows and work from any thread. All arithmetic is done by one: a second would bring a second set of threads
    for its products, and the two would fight for the cores. What others computed before (weights are laid out as they
    are read) has left them such a set too: see runtime.rest."""

    def __init__(self, batch: Batch) -> None:
        runtime.release_threads()
        self._batch = batch
        self._change = threading.Condition()
        self._come: list[Row] = []
        self._gone: list[Row] = []
        self._work: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._ending = False
        _LIVE.add(self)

    def submit(self, rows: Sequence[Row]) -> None:
        """Decode these too, from the next step on."""
        runtime.release_threads()
        with self._change:
            self._come += rows
            self._wake()

    def leave(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these any more. A listener may be told of one more token."""
        with self._change:
            self._gone += rows
            self._wake()

    def run(self, work: Callable[[], Result]) -> Result:
        """Do other work between two steps; returns what it gives."""
        runtime.release_threads()
        future: Future[Result] = Future()
        with self._change:
            self._work.append((work, future))
            self._wake()
        return future.result()

    def end(self) -> None:
        """Let the thread end after the step it is in. Rows under way get no more tokens."""
        with self._change:
            self._ending, thread = True, self._thread
            self._change.notify_all()
        if thread is not None:
            thread.join()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._decode, name="tunesmith-decoding", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _decode(self) -> None:
        try:
            self._decode_all()
        except BaseException:
            with self._change:  # the next row starts another
                self._thread = None
            raise

    def _decode_all(self) -> None:
        torch.set_num_threads(runtime.prepare())
        while True:
            with self._change:
                if not self._change.wait_for(self._anything, _LINGERS) or self._ending:
                    self._thread = None
                    return
                come, gone, work = self._come, self._gone, self._work
                self._come, self._gone, self._work = [], [], []
            self._batch.waiting.extend(come)
            self._batch.drop(gone)
            for each, future in work:
                _do(each, future)
            if self._batch:
                try:
                    self._batch.step()
                except BaseException as error:  # noqa: BLE001 - whoever waits for a row is told, and the next are decoded
                    self._batch.fail(error)

    def _anything(self) -> bool:
        return bool(self._ending or self._batch or self._come or self._gone or self._work)


@atexit.register
def _end_all() -> None:
    """The interpreter tears down threads it finds running as it ends, and the whole process aborts where one is in
    compiled code."""
    for scheduler in list(_LIVE):
        scheduler.end()


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
        future.set_exception(error)

"""Writes rows of requests to the database, many in one transaction, before their answers leave."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

_LOG = logging.getLogger("tunesmith.server")
_WAITING = 64  # rows that wait to be written; a thread that brings more waits


class RequestRows:
    """Rows that are written as they come. Thread-safe. lost: called with how many rows could not be written.

    A thread that finds another one writing leaves its row and goes on. The rows that gather share a transaction.
    """

    def __init__(self, store: Store, lost: Callable[[int], object]) -> None:
        self._store, self._lost = store, lost
        self._lock = threading.Lock()
        self._waiting: list[tuple[Mapping[str, Any], list[Callable[[], object]]]] = []  # rows, and calls after each
        self._writing = False  # a thread writes
        self._writer = ThreadPoolExecutor(1, "tunesmith-recording")

    def write(self, row: Mapping[str, Any], *after: Callable[[], object]) -> None:
        """Write a row, then make calls, in any thread; they are made for a lost row too."""
        calls, written = list(after), None
        with self._lock:
            leads, self._writing = not self._writing, True
            if not leads and len(self._waiting) >= _WAITING:
                written = threading.Event()
                calls.append(written.set)
            self._waiting.append((row, calls))
        if leads and self._write_waiting():
            # Other rows came meanwhile. They must not keep this thread from its next request.
            try:
                self._writer.submit(self._write_all)
            except RuntimeError:  # the server has stopped
                self._write_all()
        elif written is not None:
            written.wait()

    def waiting(self) -> int:
        """How many rows no thread has begun to write."""
        return len(self._waiting)

    def stop(self, seconds: float) -> None:
        """Write what waits, for at most this many seconds."""
        wait([self._writer.submit(int)], seconds)  # done when everything before it is
        self._writer.shutdown(wait=False)

    def _write_all(self) -> None:
        while self._write_waiting():
            pass

    def _write_waiting(self) -> bool:
        """Write the rows that wait, and make the calls after each; returns whether others have come since."""
        with self._lock:
            written, self._waiting = self._waiting, []
        try:
            if lost := self.store([row for row, _ in written]):
                self._lost(lost)
        finally:
            for _, calls in written:
                for call in calls:
                    call()
            with self._lock:
                more = self._writing = bool(self._waiting)
        return more

    def store(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows in one transaction, or one by one where that fails; returns how many were lost."""
        try:
            database.append(self._store.engine, RequestRow, rows)
        except Exception as error:  # noqa: BLE001 - their answers wait for it
            if isinstance(error, SQLAlchemyError) and len(rows) > 1:  # one of them has a value that does not fit
                return sum(self.store([row]) for row in rows)
            _LOG.exception("%d requests could not be recorded", len(rows))
            return len(rows)
        return 0

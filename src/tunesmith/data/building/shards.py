"""Divides source files into shards and examines their rows, in this process or in several.

A shard's result depends only on the shard and the rules, and the order of the results does not matter. So the dataset
is the same for any number of shards and workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, Protocol

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import Progress
from tunesmith.core.system.machine import end_with_parent, wanted_threads
from tunesmith.data.building.examine import ExaminedRows, Examiner, RowRules, renamed
from tunesmith.data.formats.row_formats import RowFormat, format_of
from tunesmith.data.formats.row_readers import WHOLE, Part, SourceRow
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources.files import SourceFile, fetched, find_files, open_source

SHARD_BYTES = 2 << 20
_ROWS_TOGETHER = 2000
_BYTES_TOGETHER = 8 << 20  # long rows: fewer at once
# For less data, starting processes takes longer than they save.
_WORTH_WORKERS = 4 << 20
_AHEAD = 2  # shards per worker that may wait to be consumed


class Shard(NamedTuple):
    """A part of a file. bytes: its size, for progress."""

    file: SourceFile
    part: Part
    bytes: int


class PlannedFile(NamedTuple):
    """A source file to read. digest: of its bytes before the first row was read."""

    file: SourceFile
    digest: str
    bytes: int
    shards: list[Shard]


def examined_shard(examiner: Examiner, shard: Shard) -> Iterator[ExaminedRows]:
    """The shard's examined rows, a few thousand at a time. Raises the error of the first invalid row."""
    with open_source(shard.file, digested=False) as opened:
        rows: list[SourceRow] = []
        begun = opened.position()
        for row in opened.read(shard.part):
            rows.append(row)
            if len(rows) == _ROWS_TOGETHER or opened.position() - begun > _BYTES_TOGETHER:
                yield examiner.examine(rows, shard.file.source)
                rows, begun = [], opened.position()
        if rows:
            yield examiner.examine(rows, shard.file.source)


class ShardRunner(Protocol):
    """Runs shard workers over shards: LocalRunner here, RayRunner on a cluster."""

    def run(self, rules: RowRules, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Iterable[ExaminedRows]]]:
        """Every shard with its examined rows, in the order of the shards."""
        ...


class LocalRunner(NamedTuple):
    """Processes of this machine. workers: their number; None: one per core ($TUNESMITH_THREADS is the limit) where
    there is enough data.
    """

    workers: int | None = None

    def run(self, rules: RowRules, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Iterable[ExaminedRows]]]:
        """Every shard with its examined rows, in the order of the shards."""
        workers = self.workers or self._worth(shards)
        here = Examiner(rules)
        if workers == 1:
            yield from ((shard, examined_shard(here, shard)) for shard in shards)
            return
        # Forked, so that patterns, models and the tokenizer are loaded once. A worker needs none of our threads.
        global _examiner
        _examiner = here
        here.scanner.findings(["a text"])  # loads now what the first row would load
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool:
            waiting: deque[tuple[Shard, Future[list[ExaminedRows]] | None]] = deque()
            todo = iter(shards)
            try:
                while True:
                    while len(waiting) < _AHEAD * workers and (shard := next(todo, None)) is not None:
                        # A shard that could not be cut may be too large to send between processes: it is read here.
                        waiting.append((shard, pool.submit(_work, shard) if _cut(shard) else None))
                    if not waiting:
                        return
                    shard, future = waiting.popleft()
                    yield shard, examined_shard(here, shard) if future is None else future.result()
            except BrokenProcessPool as error:
                raise TunesmithError(
                    "a worker process died",
                    where="data",
                    fix="check the memory, or set TUNESMITH_THREADS=1",
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _worth(self, shards: Sequence[Shard]) -> int:
        cut = [shard for shard in shards if _cut(shard)]
        if sum(shard.bytes for shard in cut) < _WORTH_WORKERS:
            return 1
        allowed = wanted_threads() or len(os.sched_getaffinity(0))
        return max(1, min(allowed, len(cut)))


def _cut(shard: Shard) -> bool:
    return shard.part != WHOLE or shard.bytes <= SHARD_BYTES


_examiner: Examiner | None = None  # set before the fork, so that the processes share what it loaded


def _begin(parent: int) -> None:
    """Prepare a new worker process: it dies with its parent, and leaves ctrl-C to it."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(shard: Shard) -> list[ExaminedRows]:
    assert _examiner is not None
    return list(examined_shard(_examiner, shard))


def plan(
    settings: DataSettings, root: Path, folder: Path, undo: contextlib.ExitStack
) -> tuple[list[PlannedFile], dict[str, RowFormat]]:
    """(the sources' files, cut into shards; the row format of each source's path).

    A format is what the settings say, or is detected from the first row of the source's first file. folder: for copies
    of remote files, which exist until undo is closed.
    """
    planned, formats = [], dict[str, RowFormat]()
    for file in find_files(settings.sources, root):
        here, source = undo.enter_context(fetched(file, folder)), file.source
        with open_source(here) as opened:
            parts = opened.parts(SHARD_BYTES)
            shards = [Shard(here, part, opened.bytes // len(parts)) for part in parts]
            planned.append(PlannedFile(here, opened.digest, opened.bytes, shards))
            if source.path not in formats:
                row = next(opened.read(WHOLE), None)
                if row is None:
                    raise UsageError("the file holds no rows", where=file.name)
                formats[source.path] = format_of(source.format, renamed(row, source.rename))
    return planned, formats


def examined_rows(
    planned: Sequence[PlannedFile], rules: RowRules, runner: ShardRunner, progress: Progress
) -> Iterator[ExaminedRows]:
    """The examined rows of all files. Raises UsageError for a file without rows, TunesmithError for one that
    changed."""
    read: set[str] = set()
    shards = [shard for one in planned for shard in one.shards]
    with progress.task("reading rows", sum(one.bytes for one in planned)) as task:
        for shard, pieces in runner.run(rules, shards):
            for piece in pieces:
                read.update(piece.account.read)
                yield piece
            task.advance(shard.bytes)
    for one in planned:
        if one.file.name not in read:
            raise UsageError("the file holds no rows", where=one.file.name)
        if one.file.digest() != one.digest:
            raise TunesmithError("the file changed while it was read", where=one.file.name, fix="run again")

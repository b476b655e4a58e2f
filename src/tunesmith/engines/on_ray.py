"""Answers with the workers of a Ray cluster. Each holds the base; they share the requests, which are answered once.

Every worker must see the base under the same path. Adapters reach it through Ray, which sends Python objects by pickle.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.ray_cluster import actor_options, check_room, connected, limit_to
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.engines.factory import LocalEngine, load_model
from tunesmith.engines.protocol import Completion, Engine, Generation, Question, loaded
from tunesmith.engines.settings import RaySettings
from tunesmith.models.base import Base, check_base

_WHERE = "engine.ray"
_MOST_TOGETHER = 32  # requests that a worker gets at once
_MOST_LOST = 3  # workers that may end in one call
_Method = Literal["generate", "choose"]


class RayEngine(Engine):
    """Implements engines.protocol.Engine. The workers start with the first request; calls are answered one by one."""

    follows_grammars = True

    def __init__(self, base: Base, kind: LocalEngine, settings: RaySettings, progress: Progress = SILENT) -> None:
        """kind: the engine that each worker runs. progress: is told of workers that ended."""
        self._base, self._kind, self._settings, self._progress = base, kind, settings, progress
        self._adapters: dict[str, Any] = {}  # Ray's references to the files, by name
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}  # workers that load or answer, by the reference of what they return
        self._lock = threading.Lock()

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its answer may have together."""
        return self._base.context_length

    def load_adapter(self, name: str, folder: Path) -> None:
        """Keep a training's folder for the workers, which load it when they first need it."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        with self._connected() as ray:
            self._adapters[name] = ray.put(files)

    def holds(self, name: str) -> bool:
        """Whether an adapter of this name was loaded."""
        return name in self._adapters

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        return self._share("generate", requests, adapter, progress)

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        return self._share("choose", questions, adapter, progress)

    def release(self) -> None:
        """End the workers, so that a training can have their places. The next request starts others."""
        with self._lock, self._connected() as ray:
            self._end(ray)

    def _share(self, method: _Method, asked: Sequence[Any], adapter: str | None, progress: Progress) -> list[Any]:
        """What the workers' engines answer, in the order of asked.

        What a lost worker was asked is asked again. Raises TunesmithError where more than three are lost.
        """
        files = [loaded(self._adapters, adapter)]  # in a list, Ray sends it when it is needed
        size = max(1, min(_MOST_TOGETHER, -(-len(asked) // (2 * self._settings.workers))))
        open_parts = deque(range(0, len(asked), size))
        given: dict[int, list[Any]] = {}  # the answers to a part, by its first place
        wanted: dict[Any, int] = {}  # the part that a reference will answer
        lost = 0
        with self._lock, self._connected() as ray, progress.task("answering", len(asked)) as task:
            if not self._idle and not self._busy:
                own = self._settings
                check_room(ray, own.workers, own.resources, _WHERE, own.address, self._progress)
                for _ in range(own.workers):
                    self._start(ray)
            while len(given) * size < len(asked):
                while open_parts and self._idle:
                    worker, place = self._idle.pop(), open_parts.popleft()
                    reference = worker.answer.remote(method, list(asked[place : place + size]), adapter, files)
                    self._busy[reference], wanted[reference] = worker, place
                task.advance(0)  # raises Stopped where the work was told to stop
                for reference in ray.wait(list(self._busy), num_returns=1, timeout=1.0)[0]:
                    worker, place = self._busy.pop(reference), wanted.pop(reference, -1)
                    try:
                        returned = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise TunesmithError(f"a worker that answers failed: {error.cause}", where=_WHERE) from error
                    except ray.exceptions.RayError as error:  # it ended, or its machine did
                        lost += 1
                        if lost > _MOST_LOST:
                            raise TunesmithError(f"{lost} workers that answer ended: {error}", where=_WHERE) from error
                        self._progress.say("a worker that answers ended; others are asked again, and one is started")
                        if place >= 0:
                            open_parts.appendleft(place)
                        self._start(ray)
                        continue
                    if isinstance(returned, TunesmithError):
                        raise returned
                    self._idle.append(worker)
                    if place >= 0:
                        given[place] = returned
                        task.advance(len(returned))
        return [answer for place in sorted(given) for answer in given[place]]

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray. After an error all workers end: what they still answer belongs to no call."""
        with connected(_WHERE, self._settings.address) as ray:
            try:
                yield ray
            except BaseException:
                self._end(ray)
                raise

    def _end(self, ray: Any) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            ray.kill(worker)
        self._idle, self._busy = [], {}

    def _start(self, ray: Any) -> None:
        """Start a worker, which loads the base."""
        worker = ray.remote(_Worker).options(**actor_options(self._settings.resources)).remote()
        self._busy[worker.load.remote(self._base, self._kind, dict(self._settings.resources))] = worker


class _Worker:
    """An actor of Ray that holds the base. It returns TunesmithErrors, to be raised by the command that asked."""

    def load(self, base: Base, kind: LocalEngine, resources: dict[str, float]) -> TunesmithError | None:
        """Load the base."""
        limit_to(resources)
        try:
            check_base(base)
            self._engine: Engine = load_model(base, kind).engine()
        except TunesmithError as error:
            return error
        return None

    def answer(
        self, method: _Method, asked: list[Any], adapter: str | None, files: list[Any]
    ) -> list[Any] | TunesmithError:
        """What the engine answers. files: Ray's reference to the adapter's."""
        import ray

        try:
            if adapter is not None and not self._engine.holds(adapter):
                with scratch_folder() as folder:
                    for name, content in ray.get(files[0]).items():
                        (folder / name).write_bytes(content)
                    self._engine.load_adapter(adapter, folder)
            return list(getattr(self._engine, method)(asked, adapter))
        except TunesmithError as error:
            return error

"""Versions promoted and rolled back under load, on two servers with one PostgreSQL and one folder of blobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fabricate import NAME, OPERATOR, Scene, build_scene
from tests.postgresql_server import moved_to_postgresql, postgresql_server

from engine_parts.report import Line
from service_parts.gateway import asked_of, with_champion
from service_parts.kept import Found
from service_parts.load import Connection
from service_parts.processes import found_by, free_port, listening, script
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import promote, rollback, start
from tunesmith.rollout.settings import RolloutSettings

REQUESTS, CONNECTIONS, MOST_SECONDS = 10_000, 8, 1.0


def measure() -> Found:
    """Failed requests, and how long a change takes until both servers answer by it."""
    with tempfile.TemporaryDirectory() as folder, postgresql_server(Path(folder) / "sql") as url:
        work = Path(folder)
        scene = build_scene(work / "store")
        token = with_champion(scene)
        second = scene.version(2)
        scene.store = moved_to_postgresql(scene.store, url)
        with two_servers(scene, url, work) as ports:
            told = [asked_of(port, token) for port in ports]
            loads = _Loads(told)
            changes = _change_until(loads.ended, scene, second, told)
            found = loads.found()
    requests, failed = sum(one["requests"] for one in found), sum(one["failed"] for one in found)
    slowest, answers, late = max(changes.seconds), changes.answers, changes.late
    figures = {"loads": found, "seconds_until_visible": changes.seconds, "answers_after": answers, "late": late}
    for one in found:
        print(f"  {one['requests']} requests, {one['failed']} failed {one['first_failures']}", flush=True)
    lines = [
        Line(
            f"requests failed while {len(changes.seconds)} times a version was promoted or rolled back, two servers",
            f"{failed} of {requests:,}",
            shown="-",
            wanted="0",
            reached=failed == 0 and requests >= REQUESTS,
        ),
        Line(
            "until both servers answer by the change",
            f"{slowest:.2f} s at most",
            shown="-",
            wanted=f"< {MOST_SECONDS:g} s",
            reached=slowest < MOST_SECONDS,
        ),
        Line(
            "answers by the version before, after that",
            f"{late} of {answers:,}",
            shown="-",
            wanted="0",
            reached=late == 0,
        ),
    ]
    return Found(lines, figures)


@contextlib.contextmanager
def two_servers(scene: Scene, url: str, work: Path) -> Iterator[list[int]]:
    """The ports of two servers over one store."""
    with contextlib.ExitStack() as stack:
        ports = [free_port(), free_port()]
        for port in ports:
            told = {"root": str(scene.store.root), "url": url, "base": scene.base, "port": port}
            stack.enter_context(listening(script("run_server.py", json.dumps(told)), port, work / f"{port}.log"))
        yield ports


class _Loads:
    """A load generator for each server, in processes of their own."""

    def __init__(self, told: list[dict[str, Any]]) -> None:
        self._found: list[dict[str, Any]] = []
        self._threads = [threading.Thread(target=self._ask, args=(one,)) for one in told]
        for thread in self._threads:
            thread.start()

    def _ask(self, told: dict[str, Any]) -> None:
        more = {"connections": CONNECTIONS, "seconds": 600, "requests": REQUESTS // 2, "must_have": f'"{NAME}@v'}
        self._found.append(found_by(script("load.py", json.dumps({**told, **more}))))

    def ended(self) -> bool:
        """Whether every request was answered."""
        return not any(thread.is_alive() for thread in self._threads)

    def found(self) -> list[dict[str, Any]]:
        """What they found."""
        for thread in self._threads:
            thread.join()
        return self._found


class _Changes(NamedTuple):
    """seconds: until both servers answered by each change. answers: of the half seconds after that; late: those of them
    that are not by the change."""

    seconds: list[float]
    answers: int
    late: int


def _change_until(ended: Callable[[], bool], scene: Scene, second: Version, told: list[dict[str, Any]]) -> _Changes:
    """Promote version 2 and roll back, over and over."""
    steps = RolloutSettings.model_validate({"steps": [{"setWeight": 50}, {"pause": {}}, {"setWeight": 100}]}).steps
    seen: list[tuple[float, list[bool]]] = []
    while not seen or not ended():
        begun = start(scene.store, name=NAME, version=second, steps=steps, actor=OPERATOR)
        promote(scene.store, begun.id, actor=OPERATOR)
        seen.append(asyncio.run(_seen(told, f'"{NAME}@v2"')))
        rollback(scene.store, name=NAME, actor=OPERATOR, reason="measured")
        seen.append(asyncio.run(_seen(told, f'"{NAME}@v1"')))
    after = [right for _, answers in seen for right in answers]
    return _Changes([seconds for seconds, _ in seen], len(after), after.count(False))


async def _seen(told: list[dict[str, Any]], label: str) -> tuple[float, list[bool]]:
    """Seconds until each server answers with a label, and whether each answer of the half second after that does."""
    began = time.perf_counter()
    connections = [Connection(server) for server in told]

    async def right(connection: Connection) -> bool:
        await asyncio.sleep(0.01)
        return label.encode() in (await connection.ask())[1]

    async def becomes_right(connection: Connection) -> None:
        while not await right(connection):
            pass

    await asyncio.gather(*(becomes_right(one) for one in connections))
    seconds = time.perf_counter() - began
    answers: list[bool] = []
    while time.perf_counter() < began + seconds + 0.5:
        answers += await asyncio.gather(*(right(one) for one in connections))
    for one in connections:
        one.close()
    return seconds, answers

"""Two server processes on one database."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.forked import forkserver
from tests.server.conftest import CERTIFICATES, HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.server.test_held import MONEY, holder
from tunesmith.registry.versions import list_versions
from tunesmith.rollout import commands, transitions
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import Rollout
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store


@dataclass
class Servers:
    """Two running servers. processes: kill -9 them as you like."""

    scene: Scene
    urls: list[str]
    processes: list[BaseProcess]

    def begin(self, number: int, *steps: dict[str, Any]) -> Rollout:
        version = list_versions(self.scene.store)[number - 1]
        plan = RolloutSettings.model_validate({"steps": list(steps)}).steps
        return commands.start(self.scene.store, name=NAME, version=version, steps=plan, actor=OPERATOR)

    def http(self, server: int = 0, user: str = OPERATOR) -> httpx.Client:
        """A client of one server. A user's next client ends the token of the one before."""
        headers = {"Authorization": f"Bearer {issue_token(self.scene.store, user, actor=OWNER)}"}
        return httpx.Client(base_url=self.urls[server], headers=headers, timeout=300, verify=CERTIFICATES)


def ask(http: httpx.Client, url: str = "") -> httpx.Response:
    return http.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": HELLO})


def serve(root: Path, url: str, base: str, said: Connection, killed_at: int, holds: bool) -> None:
    """A server's process. killed_at: it is killed inside the transaction of this transition of its own; 0: in none.
    holds: all its answers wait for a reviewer."""
    apply, made, engine = transitions.apply, 0, FakeEngine(base)

    def counted(*given: Any) -> Rollout:
        nonlocal made
        found, made = apply(*given), made + 1
        if made == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    transitions.apply = counted
    if holds:
        engine.answer = lambda _request, _adapter: MONEY
    more: dict[str, Any] = {"holder": holder(wait=120)} if holds else {"check_seconds": 0.02}
    with running(Scene(Store(root, url), base, ""), engine, **more) as served:
        said.send(served.url)
        said.recv()


@contextlib.contextmanager
def two_servers(scene: Scene, killed_at: int = 0, *, holds: bool = False) -> Iterator[Servers]:
    """Two servers, of which the first may be killed."""
    processes, urls, pipes = [], [], []
    try:
        for number in (killed_at, 0):
            here, there = forkserver().Pipe()
            given = (scene.store.root, scene.store.url, scene.base, there, number, holds)
            processes.append(forkserver().Process(target=serve, args=given, daemon=True))
            processes[-1].start()
            assert here.poll(120)
            urls.append(here.recv())
            pipes.append(here)
        yield Servers(scene, urls, processes)
    finally:
        for process in processes:
            process.kill()
            process.join()

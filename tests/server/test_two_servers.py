"""Two server processes on one database: they share a rollout, one is killed, and both show a change at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.forked import forkserver
from tests.server.conftest import CERTIFICATES, HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.waiting import until
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import list_versions
from tunesmith.rollout import commands, transitions
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.store import audit, database
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store

pytestmark = pytest.mark.slow

STEPS: list[dict[str, Any]] = [
    step for weight in range(10, 70, 10) for step in ({"setWeight": weight}, {"pause": {"seconds": 0.1}})
]


@dataclass
class Servers:
    """Two running servers. processes: kill -9 them as you like."""

    scene: Scene
    urls: list[str]
    processes: list[BaseProcess]
    token: str

    def begin(self, number: int, *steps: dict[str, Any]) -> Rollout:
        version = list_versions(self.scene.store)[number - 1]
        plan = RolloutSettings.model_validate({"steps": list(steps)}).steps
        return commands.start(self.scene.store, name=NAME, version=version, steps=plan, actor=OPERATOR)

    def ask(self, http: httpx.Client, url: str) -> str:
        """The version that answered one request."""
        answer = http.post(f"{url}/v1/chat/completions", json={"model": NAME, "messages": HELLO})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model"])

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(headers=headers, timeout=300, verify=CERTIFICATES)


def serve(root: Path, url: str, base: str, killed_at: int, said: Connection) -> None:
    """A server's process. killed_at: it is killed inside the transaction of this transition of its own; 0: in none."""
    apply, made = transitions.apply, 0

    def counted(*given: Any) -> Rollout:
        nonlocal made
        found, made = apply(*given), made + 1
        if made == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    transitions.apply = counted
    with running(Scene(Store(root, url), base, ""), FakeEngine(base), check_seconds=0.02) as served:
        said.send(served.url)
        said.recv()


@contextlib.contextmanager
def two(scene: Scene, killed_at: int = 0) -> Iterator[Servers]:
    """Two servers, of which the first may be killed."""
    processes, urls, pipes = [], [], []
    try:
        for number in (killed_at, 0):
            here, there = forkserver().Pipe()
            given = (scene.store.root, scene.store.url, scene.base, number, there)
            processes.append(forkserver().Process(target=serve, args=given, daemon=True))
            processes[-1].start()
            assert here.poll(120)
            urls.append(here.recv())
            pipes.append(here)
        yield Servers(scene, urls, processes, issue_token(scene.store, OPERATOR, actor=OWNER))
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.attack("crash", "kill -9 of one of two servers inside a transition")
def test_the_other_server_carries_the_rollout_on_and_makes_each_step_once(serving: Scene) -> None:
    with two(serving, killed_at=5) as servers:
        rollout = servers.begin(2, *STEPS, {"setWeight": 100})
        until(lambda: not servers.processes[0].is_alive())
        assert servers.processes[0].exitcode == -signal.SIGKILL
        before = get_rollout(serving.store, rollout.id)
        assert before.live, "it was killed too late"
        until(lambda: (now := get_rollout(serving.store, rollout.id)).step > before.step or not now.live)
        until(lambda: not get_rollout(serving.store, rollout.id).live)
        with servers.http() as http:
            assert servers.ask(http, servers.urls[1]) == f"{NAME}@v2"
    done = get_rollout(serving.store, rollout.id)
    assert (done.status, done.weight) == ("promoted", 100)
    steps = Counter((each["action"], each["step"]) for each in done.history)
    assert set(steps.values()) == {1}, "a step was made twice"
    with database.reading(serving.store.engine) as session:
        made = Counter(each.action for each in audit.entries(session) if each.detail.get("rollout") == rollout.id)
        champion = get_alias(session, NAME, "champion")
    assert made == {
        "rollout.start": 1,
        "rollout.weight": len(STEPS) // 2 + 1,
        "rollout.pause": len(STEPS) // 2,
        "rollout.resume": len(STEPS) // 2,
        "rollout.promote": 1,
    }
    assert champion is not None
    assert champion.revision == 2
    assert verify_log(serving.store) == []


@pytest.mark.attack("race", "promote and roll back under load, two servers")
def test_both_servers_show_a_promotion_and_a_rollback_at_once_and_no_request_fails(serving: Scene) -> None:
    with two(serving) as servers:
        asked: list[tuple[float, float, str]] = []
        failed: list[BaseException] = []
        ended = threading.Event()

        def load(url: str) -> None:
            with servers.http() as http:
                while not ended.is_set():
                    began = time.monotonic()
                    try:
                        version = servers.ask(http, url)
                        asked.append((began, time.monotonic(), version))
                    except BaseException as error:  # noqa: BLE001 - shown below
                        failed.append(error)

        threads = [threading.Thread(target=load, args=(url,)) for url in servers.urls]
        for thread in threads:
            thread.start()
        changes: list[tuple[float, float, str]] = []  # when it was called, when it returned, what serves then

        def change(call: Callable[[], object], version: str) -> None:
            called = time.monotonic()
            call()
            returned = time.monotonic()
            changes.append((called, returned, version))
            with servers.http() as http:  # each server's next request, however soon
                assert [servers.ask(http, url) for url in servers.urls] == [version] * 2
            until(lambda: failed or any(began > returned for began, _, _ in list(asked)))

        try:
            for _ in range(2):
                rollout = servers.begin(2, {"pause": {}}, {"setWeight": 100})
                change(lambda: commands.promote(serving.store, rollout.id, actor=OPERATOR), f"{NAME}@v2")  # noqa: B023
                back = {"name": NAME, "actor": OPERATOR, "reason": "no"}
                change(lambda: commands.rollback(serving.store, **back), f"{NAME}@v1")  # noqa: B023
        finally:
            ended.set()
            for thread in threads:
                thread.join()
    assert failed == []
    ends = [called for called, *_ in changes[1:]] + [float("inf")]
    during = 0
    for (_, returned, version), end in zip(changes, ends, strict=True):
        seen = {found for began, answered, found in asked if began > returned and answered < end}
        assert seen <= {version}, "a request that began afterwards was answered by the version before"
        during += len(seen)
    assert during == len(changes), "no request came between two changes: the test did not test"

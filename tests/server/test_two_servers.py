"""Two server processes on one database: one is killed, and both show a change at once, of rollouts and held answers."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acting import do
from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene
from tests.forked import forkserver
from tests.server.conftest import CERTIFICATES, HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.server.test_held import MONEY, decide, held_answer, holder
from tests.waiting import until
from tunesmith.core.errors import Refused
from tunesmith.holding import queue
from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import get_alias, list_versions
from tunesmith.rollout import commands, transitions
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.services import review
from tunesmith.store import audit, database
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, HeldRow

pytestmark = pytest.mark.slow


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


def serve(root: Path, url: str, base: str, said: Connection, killed_at: int, often: float, holds: bool) -> None:
    """A server's process. killed_at: it is killed inside the transaction of this transition of its own; 0: in none.
    often: seconds between its looks at rollouts. holds: all its answers wait for a reviewer."""
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
    more: dict[str, Any] = {"holder": holder(wait=120)} if holds else {"check_seconds": often}
    with running(Scene(Store(root, url), base, ""), engine, **more) as served:
        said.send(served.url)
        said.recv()


@contextlib.contextmanager
def two_servers(scene: Scene, killed_at: int = 0, *, holds: bool = False) -> Iterator[Servers]:
    """Two servers, of which the first may be killed: the other looks seldom then, and leaves it its transitions."""
    processes, urls, pipes = [], [], []
    try:
        for number, often in ((killed_at, 0.02), (0, 0.25 if killed_at else 0.02)):
            here, there = forkserver().Pipe()
            given = (scene.store.root, scene.store.url, scene.base, there, number, often, holds)
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


STEPS: list[dict[str, Any]] = [
    step for weight in range(10, 70, 10) for step in ({"setWeight": weight}, {"pause": {"seconds": 0.1}})
]


@pytest.mark.attack("crash", "kill -9 of one of two servers inside a transition")
def test_the_other_server_carries_the_rollout_on_and_makes_each_step_once(serving: Scene) -> None:
    with two_servers(serving, killed_at=5) as servers:
        rollout = servers.begin(2, *STEPS, {"setWeight": 100})
        until(lambda: not servers.processes[0].is_alive())
        assert servers.processes[0].exitcode == -signal.SIGKILL
        before = get_rollout(serving.store, rollout.id)
        assert before.live, "it was killed too late"
        until(lambda: (now := get_rollout(serving.store, rollout.id)).step > before.step or not now.live)
        until(lambda: not get_rollout(serving.store, rollout.id).live)
        with servers.http(1) as http:
            assert ask(http).json()["model"] == f"{NAME}@v2"
    done = get_rollout(serving.store, rollout.id)
    assert (done.status, done.weight) == ("promoted", 100)
    steps = Counter((each["action"], each["step"]) for each in done.history)
    assert set(steps.values()) == {1}, "a step was made twice"
    with database.reading(serving.store.engine) as session:
        made = Counter(each.action for each in audit.entries(session) if each.detail.get("rollout") == rollout.id)
        champion = get_alias(session, NAME)
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
    with two_servers(serving) as servers, servers.http() as http:
        asked: list[tuple[float, float, str]] = []
        failed: list[BaseException] = []
        ended = threading.Event()

        def load(url: str) -> None:
            while not ended.is_set():
                began = time.monotonic()
                try:
                    found = ask(http, url).json()["model"]
                    asked.append((began, time.monotonic(), found))
                except BaseException as error:  # noqa: BLE001 - shown below
                    failed.append(error)

        pool = ThreadPoolExecutor(len(servers.urls))
        pool.map(load, servers.urls)
        changes: list[tuple[float, float, str]] = []  # when it was called, when it returned, what serves then

        def change(call: Callable[[], object], version: str) -> None:
            called = time.monotonic()
            call()
            returned = time.monotonic()
            changes.append((called, returned, version))
            # Each server's next request, however soon.
            assert [ask(http, url).json()["model"] for url in servers.urls] == [version] * 2
            until(lambda: failed or any(began > returned for began, _, _ in list(asked)))

        try:
            for _ in range(2):
                rollout = servers.begin(2, {"pause": {}}, {"setWeight": 100})
                change(lambda: commands.promote(serving.store, rollout.id, actor=OPERATOR), f"{NAME}@v2")  # noqa: B023
                back = {"name": NAME, "actor": OPERATOR, "reason": "no"}
                change(lambda: commands.rollback(serving.store, **back), f"{NAME}@v1")  # noqa: B023
        finally:
            ended.set()
            pool.shutdown()
    assert failed == []
    ends = [called for called, *_ in changes[1:]] + [float("inf")]
    during = 0
    for (_, returned, version), end in zip(changes, ends, strict=True):
        seen = {found for began, answered, found in asked if began > returned and answered < end}
        assert seen <= {version}, "a request that began afterwards was answered by the version before"
        during += len(seen)
    assert during == len(changes), "no request came between two changes: the test did not test"


@pytest.mark.attack("crash", "kill -9 of a server while an answer waits for a reviewer")
def test_an_answer_outlives_its_server_and_any_server_decides(serving: Scene) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        with contextlib.suppress(httpx.HTTPError):
            answers.append(ask(caller, servers.urls[0]))

    with two_servers(serving, holds=True) as servers, servers.http(1) as caller, servers.http(1, STEWARD) as steward:
        # A request that is open on the first server is answered by a decision on the second one.
        asking = threading.Thread(target=send)
        asking.start()
        until(lambda: steward.get("/api/held").json()["held"])
        (waiting,) = steward.get("/api/held").json()["held"]
        assert decide(steward, {"url": f"/api/held/{waiting['id']}"}, "release").status_code == 200
        asking.join(120)
        assert answers[0].json()["choices"][0]["message"]["content"] == MONEY
        assert answers[0].headers["x-tunesmith-review"] == "released"

        # The next one waits when its server is killed.
        asking = threading.Thread(target=send)
        asking.start()
        until(lambda: steward.get("/api/held").json()["held"])
        servers.processes[0].kill()
        asking.join(120)
        assert len(answers) == 1
        (left,) = caller.get("/api/held").json()["held"]  # the caller finds it by their list
        with database.writing(serving.store.engine) as session:
            session.get_one(HeldRow, left["id"]).deadline = time.time() - 1
        until(lambda: caller.get(f"/api/held/{left['id']}").json()["state"] == "refused")
    with database.reading(serving.store.engine) as session:
        made = [row.action for row in session.query(AuditRow).where(AuditRow.subject == left["id"])]
    assert made == ["answer.expire"]
    assert verify_log(serving.store) == []


@pytest.mark.attack("race", "two reviewers decide at once")
def test_each_answer_is_decided_once_whoever_is_first(serving: Scene) -> None:
    """Two reviewers, in threads, and for the second half of the answers the deadline; on each kind of database."""
    settings = holder(at_most=10).settings
    for number in range(10):
        queue.put(serving.store, held_answer(serving, number), settings, 100)
    with pytest.raises(queue.QueueFull):
        queue.put(serving.store, held_answer(serving, 10), settings, 100)
    with database.writing(serving.store.engine) as session:
        for row in session.query(HeldRow).where(HeldRow.id >= f"{5:032x}"):
            row.deadline = time.time() + 0.3
    barrier = threading.Barrier(4)

    def reviewer(name: str, decision: queue.Decision) -> None:
        barrier.wait(300)
        for number in range(10):
            with contextlib.suppress(Refused):
                fields = {"identifier": f"{number:032x}", "decision": decision, "reason": "why"}
                do(serving.store, review.decide_held, actor=name, **fields)

    def tidy() -> None:
        barrier.wait(300)
        end = time.monotonic() + 300
        while review.count_held(serving.store):
            assert time.monotonic() < end
            queue.tidy(serving.store)

    with ThreadPoolExecutor(4) as pool:
        deciding = [pool.submit(reviewer, STEWARD, "release"), pool.submit(reviewer, APPROVER, "refuse")]
        deciding += [pool.submit(tidy), pool.submit(tidy)]
    assert [each.result() for each in deciding] == [None] * 4
    with database.reading(serving.store.engine) as session:
        entries = list(session.query(AuditRow).where(AuditRow.action.like("answer.%")))
        rows = {row.id: row for row in session.query(HeldRow)}
    assert sorted(entry.subject for entry in entries) == sorted(rows)
    for entry in entries:
        assert (entry.detail["state"], entry.actor) == (rows[entry.subject].state, rows[entry.subject].decided_by)
    assert verify_log(serving.store) == []

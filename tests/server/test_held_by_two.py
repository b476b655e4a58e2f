"""Held answers with two server processes on one database, of which one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import pytest

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene
from tests.forked import forkserver
from tests.server.conftest import CERTIFICATES, HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.server.test_held import MONEY, decide, holder
from tests.waiting import until
from tunesmith.core.errors import Refused
from tunesmith.holding import queue
from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import Version, list_versions
from tunesmith.services.traffic import held
from tunesmith.store import database
from tunesmith.store.people.identities import get_user
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, HeldRow

pytestmark = pytest.mark.slow


def serve(root: Path, url: str, base: str, said: Connection) -> None:
    """A server's process, whose answers are all held."""
    engine = FakeEngine(base)
    engine.answer = lambda _request, _adapter: MONEY
    with running(Scene(Store(root, url), base, ""), engine, holder=holder(wait=120)) as served:
        said.send(served.url)
        said.recv()


@pytest.fixture
def two(serving: Scene) -> Iterator[list[tuple[str, BaseProcess]]]:
    """(url, process) of two servers."""
    servers: list[tuple[str, BaseProcess]] = []
    pipes = []
    try:
        for _ in range(2):
            here, there = forkserver().Pipe()
            given = (serving.store.root, serving.store.url, serving.base, there)
            process = forkserver().Process(target=serve, args=given, daemon=True)
            process.start()
            assert here.poll(120)
            servers.append((here.recv(), process))
            pipes.append(here)
        yield servers
    finally:
        for _, process in servers:
            process.kill()
            process.join()


def client(url: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=120, verify=CERTIFICATES)


@pytest.mark.attack("crash", "kill -9 of a server while an answer waits for a reviewer")
def test_an_answer_outlives_its_server_and_any_server_decides(
    serving: Scene, two: list[tuple[str, BaseProcess]]
) -> None:
    (first, process), (second, _) = two
    token = issue_token(serving.store, OPERATOR, actor=OWNER)
    with client(first, token) as one, client(second, token) as other:
        # A request that is open on the first server is answered by a decision on the second one.
        answers: list[httpx.Response] = []

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(one.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO}))

        with client(second, issue_token(serving.store, STEWARD, actor=OWNER)) as steward:
            asking = threading.Thread(target=ask)
            asking.start()
            until(lambda: steward.get("/api/held").json()["held"])
            (waiting,) = steward.get("/api/held").json()["held"]
            assert decide(steward, {"url": f"/api/held/{waiting['id']}"}, "release").status_code == 200
            asking.join(120)
            assert answers[0].json()["choices"][0]["message"]["content"] == MONEY
            assert answers[0].headers["x-tunesmith-review"] == "released"

            # The next one waits when its server is killed.
            asking = threading.Thread(target=ask)
            asking.start()
            until(lambda: steward.get("/api/held").json()["held"])
            os.kill(process.pid or 0, signal.SIGKILL)
            asking.join(120)
            process.join(120)
            assert len(answers) == 1
            (left,) = other.get("/api/held").json()["held"]  # the caller finds it by their list
            with database.writing(serving.store.engine) as session:
                session.get_one(HeldRow, left["id"]).deadline = time.time() - 1
            until(lambda: other.get(f"/api/held/{left['id']}").json()["state"] == "refused")
    with database.reading(serving.store.engine) as session:
        made = [row.action for row in session.query(AuditRow).where(AuditRow.subject == left["id"])]
    assert made == ["answer.expire"]
    assert verify_log(serving.store) == []


def held_answer(scene: Scene, number: int, version: Version | None = None) -> queue.HeldAnswer:
    version = version or list_versions(scene.store)[0]
    return queue.HeldAnswer(
        id=f"{number:032x}", name=version.name, version=version.digest, scope=version.scope, caller=OPERATOR,
        reasons=("r",), messages=(), text=MONEY, response={"choices": [{"message": {}}]},
    )  # fmt: skip


def test_each_answer_is_decided_once_whoever_is_first(serving: Scene) -> None:
    """Two reviewers and the deadline, in threads, on each kind of database."""
    settings = holder(at_most=10).settings
    for number in range(10):
        queue.put(serving.store, held_answer(serving, number), settings, 100)
    with pytest.raises(queue.QueueFull):
        queue.put(serving.store, held_answer(serving, 10), settings, 100)
    with database.writing(serving.store.engine) as session:
        for row in session.query(HeldRow):
            row.deadline = time.time() + 0.3
    barrier = threading.Barrier(4)

    def review(name: str, decision: queue.Decision) -> None:
        user = get_user(serving.store, name)
        barrier.wait(300)
        for number in range(10):
            with contextlib.suppress(Refused):
                held.decide(serving.store, user, f"{number:032x}", decision, reason="why")

    def tidy() -> None:
        barrier.wait(300)
        end = time.monotonic() + 300
        while held.waiting(serving.store):
            assert time.monotonic() < end
            held.tidy(serving.store)

    threads = [
        threading.Thread(target=review, args=(STEWARD, "release")),
        threading.Thread(target=review, args=(APPROVER, "refuse")),
        threading.Thread(target=tidy),
        threading.Thread(target=tidy),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with database.reading(serving.store.engine) as session:
        entries = list(session.query(AuditRow).where(AuditRow.action.like("answer.%")))
        rows = {row.id: row for row in session.query(HeldRow)}
    assert sorted(entry.subject for entry in entries) == sorted(rows)
    for entry in entries:
        assert (entry.detail["state"], entry.actor) == (rows[entry.subject].state, rows[entry.subject].decided_by)
    assert verify_log(serving.store) == []

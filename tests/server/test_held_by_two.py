"""Held answers with two server processes on one database, of which one is killed."""

from __future__ import annotations

import contextlib
import threading
import time

import httpx
import pytest

from tests.fabricate import APPROVER, OPERATOR, STEWARD, Scene
from tests.server.test_held import MONEY, decide, holder
from tests.server.two_servers import ask, two_servers
from tests.waiting import until
from tunesmith.core.errors import Refused
from tunesmith.holding import queue
from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import Version, list_versions
from tunesmith.services.traffic import held
from tunesmith.store import database
from tunesmith.store.people.identities import get_user
from tunesmith.store.tables import AuditRow, HeldRow

pytestmark = pytest.mark.slow


@pytest.mark.attack("crash", "kill -9 of a server while an answer waits for a reviewer")
def test_an_answer_outlives_its_server_and_any_server_decides(serving: Scene) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        with contextlib.suppress(httpx.HTTPError):
            answers.append(ask(caller, servers.urls[0]))

    with (
        two_servers(serving, holds=True) as servers,
        servers.http(1) as caller,
        servers.http(1, STEWARD) as steward,
    ):
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

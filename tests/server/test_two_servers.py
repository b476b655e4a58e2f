"""Two server processes on one database: they share a rollout, one is killed, and both show a change at once."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.fabricate import NAME, OPERATOR, Scene
from tests.server.two_servers import ask, two_servers
from tests.waiting import until
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.history import verify_log
from tunesmith.rollout import commands
from tunesmith.rollout.state import get_rollout
from tunesmith.store import audit, database

pytestmark = pytest.mark.slow

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
    with two_servers(serving) as servers, servers.http() as http:
        asked: list[tuple[float, float, str]] = []
        failed: list[BaseException] = []
        ended = threading.Event()

        def load(url: str) -> None:
            while not ended.is_set():
                began = time.monotonic()
                try:
                    asked.append((began, time.monotonic(), ask(http, url).json()["model"]))
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

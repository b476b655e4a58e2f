"""What changes while a request waits for its turn counts when the turn comes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.server.conftest import HELLO, engine, made, running, scene, versions
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.waiting import until
from tunesmith.registry.versions import Version
from tunesmith.store.people.identities import deactivate
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.store import Store

__all__ = ["engine", "made", "scene", "versions"]

CHANGES: dict[str, tuple[Callable[[Store], object], int]] = {
    "deactivated": (lambda store: deactivate(store, "neighbour", actor=OWNER), 401),
    "new token": (lambda store: issue_token(store, "neighbour", actor=OWNER), 401),
}


@pytest.mark.attack("people", "a user is shut out while their request waits")
@pytest.mark.parametrize("change", CHANGES)
def test_who_is_shut_out_while_waiting_is_not_answered(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened, change: str
) -> None:
    shut_out, status = CHANGES[change]
    with running(scene, engine, together=1) as served, ThreadPoolExecutor(2) as pool:
        served.begin(versions[1])
        served.ask()
        token = neighbour(served)

        def ask(token: str) -> httpx.Response:
            with served.http(token) as http:
                return http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})

        engine.gate.clear()
        first = pool.submit(ask, served.token)
        until(lambda: engine.calls == 2)
        second = pool.submit(ask, token)
        until(lambda: served.worker.waiting() == 1)
        shut_out(scene.store)
        engine.gate.set()
        assert first.result(300).status_code == 200
        assert second.result(300).status_code == status
        assert engine.calls == 2
    assert {row.caller for row in served.rows()} == {OPERATOR}
    happened(f"refused, {status}, and not recorded")

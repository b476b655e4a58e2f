"""One user's feedback, lists and half-sent bodies leave the server to the others."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import NAME, Scene
from tests.server.conftest import HELLO, Served, engine, made, running, scene, served, versions
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.server.test_faults import head, raw
from tests.waiting import SECONDS, until
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import abort
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import Router
from tunesmith.server.intake import limits
from tunesmith.services.releases import rollouts as service

__all__ = ["engine", "made", "scene", "served", "versions"]


class Held:
    """A call that waits for the gate. begun: the users whose call began, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = threading.Event()

    def wait(self, user: str) -> None:
        self.begun.append(user)
        assert self.gate.wait(SECONDS)


def waits(served: Served, user: str) -> bool:
    """Whether a call of the user waits to be scored."""
    return served.serving.scoring._turns.held_by(user) > 0


def chat(served: Served, token: str | None) -> httpx.Response:
    with served.http(token) as http:
        return http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})


def feedback(served: Served, token: str | None, request: str, **given: object) -> int:
    with served.http(token) as http:
        return http.post("/api/feedback", json={"request_id": request, **given}).status_code


@pytest.mark.attack("serving", "one user's feedback waits to be scored")
def test_feedback_of_one_user_does_not_stall_others(
    served: Served, monkeypatch: pytest.MonkeyPatch, happened: Happened
) -> None:
    held, scored = Held(), Recorder._scored

    def slow(self: Recorder, user: object, request: str, expected: str) -> dict[str, float]:
        held.wait(user.name)  # type: ignore[attr-defined]
        return scored(self, user, request, expected)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "_scored", slow)
    other = neighbour(served)
    mine = [served.ask().id for _ in range(limits.FEEDBACK + 1)]
    theirs = [chat(served, other).json()["id"] for _ in range(2)]
    with ThreadPoolExecutor(20) as pool:
        try:
            given = [pool.submit(feedback, served, None, one, expected="{}") for one in mine]
            until(lambda: sum(one.done() for one in given) == 1)
            assert [one.result() for one in given if one.done()] == [429]
            assert held.begun == ["olga"]
            assert feedback(served, other, theirs[0], score={"mine": 1.0}) == 200
            turn = pool.submit(feedback, served, other, theirs[1], expected="{}")
            until(lambda: waits(served, "neighbour"))
        finally:
            held.gate.set()
        assert turn.result(SECONDS) == 200
        assert sorted(one.result(SECONDS) for one in given) == [200] * limits.FEEDBACK + [429]
    assert held.begun.index("neighbour") <= 2, held.begun
    happened("scores at once, expected texts at the next turn", 2)


@pytest.mark.attack("serving", "one user's lists of models and rollouts at once")
@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{NAME}", "/api/rollouts", "/api/rollouts/1"])
def test_lists_of_one_user_are_few_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, happened: Happened, path: str
) -> None:
    held = Held()
    whole = {(Router, "models"): Router.models}
    whole |= {(service, name): getattr(service, name) for name in ("visible_to", "one_visible_to")}
    for (where, name), call in whole.items():

        def slow(first: object, user: object, *more: object, call: object = call) -> object:
            held.wait(user.name)  # type: ignore[attr-defined]
            return call(first, user, *more)  # type: ignore[operator]

        monkeypatch.setattr(where, name, slow)

    def get(token: str | None) -> int:
        with served.http(token) as http:
            return http.get(path).status_code

    other = neighbour(served)
    with ThreadPoolExecutor(12) as pool:
        try:
            mine: list[Future[int]] = [pool.submit(get, None) for _ in range(10)]
            until(lambda: sum(one.done() for one in mine) == 10 - limits.LISTS)
            assert held.begun == ["olga"]
            theirs = pool.submit(get, other)
            until(lambda: held.begun == ["olga", "neighbour"])
            assert chat(served, other).status_code == 200
        finally:
            held.gate.set()
        assert sorted(one.result(SECONDS) for one in mine) == [200] * limits.LISTS + [429] * (10 - limits.LISTS)
        assert theirs.result(SECONDS) in (200, 404)
    happened("4 answered, 429 beyond; others begin at once", 10)


def test_one_rollout_is_read_alone(
    served: Served, versions: dict[int, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = served.begin(versions[2], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    abort(served.scene.store, second.id, actor="olga", reason="enough")
    seen, view_of = [], service.view_of

    def viewing(store: object, rollout: object, *more: object, **named: object) -> object:
        seen.append(rollout.id)  # type: ignore[attr-defined]
        return view_of(store, rollout, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(service, "view_of", viewing)
    with served.http() as http:
        assert http.get(f"/api/rollouts/{second.id}").json()["rollout"] == second.id
        assert seen == [second.id]
        for number in ("0", "01", "99", "9" * 30, "-1", "x"):
            assert http.get(f"/api/rollouts/{number}").status_code == 404


@pytest.mark.attack("serving", "one user sends bodies that never end")
def test_half_sent_bodies_count_and_have_a_budget(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened
) -> None:
    with running(scene, engine, per_user=40, body_bytes=65_536) as served, contextlib.ExitStack() as stack:
        served.begin(versions[1])
        other = neighbour(served)
        few = [stack.enter_context(raw(served, head(served, 60_000) + b"{")) for _ in range(60)]
        until(lambda: sum(closed_or_told(one) for one in few) == 20)
        assert served.post().status_code == 429
        assert chat(served, other).status_code == 200
        for one in few:
            one.close()
        until(lambda: served.post().status_code == 200)
        large = head(served, 65_000) + b"x" * 64_000
        much = [stack.enter_context(raw(served, large)) for _ in range(30)]
        until(lambda: sum(closed_or_told(one) for one in much) == 30 - limits.BODIES_OF_USER)
        assert chat(served, other).status_code == 200
    happened("429 beyond the user's requests", 20)
    happened("429 beyond the user's bytes", 30 - limits.BODIES_OF_USER)


def closed_or_told(connection: socket.socket) -> bool:
    """Whether an answer waits to be read, or the connection has ended."""
    return bool(select.select([connection], [], [], 0)[0])

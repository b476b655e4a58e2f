"""One caller sends as much as it can; another tenant's requests are answered meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.attack_table import Happened
from tests.fabricate import NAME, Scene
from tests.server.conftest import HELLO, Served, engine, made, running, scene, served, versions
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.server.test_faults import head, raw
from tests.server.tiny_engine import TinyEngine
from tests.waiting import SECONDS, until
from tunesmith.registry.versions import Version
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import Router
from tunesmith.server.intake import limits
from tunesmith.services.releases import rollouts as service


class Flood:
    """Requests of one caller that are all sent at once, from a thread with its own event loop."""

    def __init__(self, served: Served, count: int, **body: Any) -> None:
        self._served, self._count, self._body = served, count, {"model": NAME, "messages": HELLO, **body}
        self.answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)
        self._thread.start()

    async def _send(self) -> None:
        headers = {"Authorization": f"Bearer {self._served.token}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._served.url, headers=headers, timeout=600, limits=limits) as http:

            async def one() -> None:
                self.answers.append(await http.post("/v1/chat/completions", json=self._body))

            await asyncio.gather(*(one() for _ in range(self._count)))

    def end(self) -> list[httpx.Response]:
        """The answers, once all are there."""
        self._thread.join(300)
        assert len(self.answers) == self._count
        return self.answers


@pytest.mark.attack("serving", "one caller fills the queue and the threads")
def test_another_users_request_begins_at_once(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened
) -> None:
    with running(scene, engine, together=4, waiting=24, per_user=12) as served, ThreadPoolExecutor(1) as pool:
        served.begin(versions[1])
        served.ask()
        engine.gate.clear()
        flood = Flood(served, 40)
        until(lambda: len(flood.answers) == 28 and engine.calls == 1 + 3 and served.worker.waiting() == 9)
        for refused in flood.answers:
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"]) == (
                429, "rate_limit_error", "rate_limit_exceeded",
            )  # fmt: skip
            assert "12 requests" in error["message"]
            assert refused.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            served.ask()
        other = pool.submit(served.client(neighbour(served)).chat.completions.create, model=NAME, messages=HELLO)
        until(lambda: engine.calls == 1 + 4)  # begun, while every request of the first caller stands still
        engine.gate.set()
        assert other.result(300).choices
        assert sorted(answer.status_code for answer in flood.end()) == [200] * 12 + [429] * 28
        assert served.ask().choices
    happened("429 beyond the caller's share", 29)
    happened("the other user's began at once")


@pytest.mark.attack("serving", "one caller fills the queue with requests it leaves")
def test_who_leaves_holds_no_place(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened
) -> None:
    with running(scene, engine, together=2, waiting=8, per_user=8) as served:
        served.begin(versions[1])
        served.ask()
        engine.gate.clear()
        flood = Flood(served, 1)
        until(lambda: engine.calls == 2)
        for _ in range(10):
            with served.http() as http, pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO}, timeout=0.1)
        until(lambda: all(job.left for job in served.worker._turns.waiting()))
        engine.gate.set()
        assert served.ask().choices
        flood.end()
    happened("not counted, and never decoded", 10)


@pytest.mark.slow
@pytest.mark.attack("serving", "feedback that takes seconds to score")
def test_feedback_on_long_answers_holds_up_nobody_else(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version], happened: Happened
) -> None:
    pytest.importorskip("rouge_score")
    engine.answer = lambda _request, _adapter: "a\nb\n" * 200  # one fake token
    with running(scene, engine, scorers=("rougeL",)) as served, ThreadPoolExecutor(12) as pool:
        served.begin(versions[1])
        asked = [served.ask().id for _ in range(12)]
        expected = "b\nc\n" * 200

        def feedback(identifier: str) -> httpx.Response:
            with served.http() as http:
                return http.post("/api/feedback", json={"request_id": identifier, "expected": expected})

        given, token = [pool.submit(feedback, one) for one in asked], neighbour(served)
        with served.http(token) as http:
            while not all(one.done() for one in given):
                assert http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO}).status_code == 200
        statuses = [one.result().status_code for one in given]
        assert set(statuses) <= {200, 429}
        assert 200 in statuses
        too_long = "b\nc\n" * 2500
        engine.answer = lambda _request, _adapter: "a\nb\n" * 2500
        with served.http() as http:
            body = {"request_id": served.ask().id, "expected": too_long}
            refused = http.post("/api/feedback", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expected")
    happened("scored or 429; the other tenant answered meanwhile", 12)
    happened("refused, 400, with the way out")


@pytest.mark.slow
@pytest.mark.attack("serving", "many long requests of one caller, tiny model")
def test_a_short_request_next_to_long_ones(
    scene: Scene, versions: dict[int, Version], tmp_path: Path, happened: Happened
) -> None:
    tiny: Any = TinyEngine(scene.base, tmp_path / "tiny")
    tiny.gate = threading.Event()
    with running(scene, tiny) as served:
        served.begin(versions[1])
        flood = Flood(served, 64, temperature=2.0, max_tokens=10_000)
        answered = 0
        with served.http(neighbour(served)) as http:
            while len(flood.answers) < 64:
                body = {"model": NAME, "messages": HELLO, "max_tokens": 2}
                assert http.post("/v1/chat/completions", json=body).status_code == 200
                answered += 1
        assert {answer.status_code for answer in flood.end()} <= {200, 429}
        assert answered
    happened("the other tenant answered meanwhile", 64)


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

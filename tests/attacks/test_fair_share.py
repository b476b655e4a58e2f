"""One caller sends as much as it can; another tenant's requests are answered meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.attack_table import Happened
from tests.fabricate import NAME, Scene
from tests.server.conftest import HELLO, Served, engine, made, running, scene, versions
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import SECONDS, neighbour
from tests.server.tiny_engine import TinyEngine
from tests.waiting import until
from tunesmith.registry.versions import Version

__all__ = ["engine", "made", "scene", "versions"]


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
    engine.answer = lambda _request, _adapter: "a\nb\n" * 700  # one fake token
    with running(scene, engine, scorers=("rougeL",)) as served, ThreadPoolExecutor(20) as pool:
        served.begin(versions[1])
        asked = [served.ask().id for _ in range(20)]
        expected = "b\nc\n" * 700

        def feedback(identifier: str) -> httpx.Response:
            with served.http() as http:
                return http.post("/api/feedback", json={"request_id": identifier, "expected": expected})

        given, worst, token = [pool.submit(feedback, one) for one in asked], 0.0, neighbour(served)
        with served.http(token) as http:
            while not all(one.done() for one in given):
                began = time.monotonic()
                assert http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO}).status_code == 200
                worst = max(worst, time.monotonic() - began)
        statuses = [one.result().status_code for one in given]
        print(f"{statuses.count(200)} scored; another tenant's request took at most {worst:.3f} s")
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 8
        assert worst < SECONDS
        too_long = "b\nc\n" * 2500
        engine.answer = lambda _request, _adapter: "a\nb\n" * 2500
        with served.http() as http:
            body = {"request_id": served.ask().id, "expected": too_long}
            refused = http.post("/api/feedback", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expected")
    happened("scored or 429; the other tenant in seconds", 20)
    happened("refused, 400, with the way out")


@pytest.mark.slow
@pytest.mark.attack("serving", "256 long requests of one caller, tiny model")
def test_a_short_request_next_to_256_long_ones(
    scene: Scene, versions: dict[int, Version], tmp_path: Path, happened: Happened
) -> None:
    tiny: Any = TinyEngine(scene.base, tmp_path / "tiny")
    tiny.gate = threading.Event()
    with running(scene, tiny) as served:
        served.begin(versions[1])
        with served.http(neighbour(served)) as http:

            def short() -> float:
                began = time.monotonic()
                body = {"model": NAME, "messages": HELLO, "max_tokens": 2}
                assert http.post("/v1/chat/completions", json=body).status_code == 200
                return time.monotonic() - began

            alone = [short() for _ in range(5)][1:]
            flood = Flood(served, 256, temperature=2.0, max_tokens=10_000)
            times = []
            while len(flood.answers) < 256:
                times.append(short())
            print(f"alone {max(alone):.3f} s; meanwhile {len(times)} requests, at most {max(times):.3f} s, "
                  f"median {sorted(times)[len(times) // 2]:.3f} s")  # fmt: skip
            assert max(times) < SECONDS
            assert {answer.status_code for answer in flood.end()} == {200, 429}
    happened("the other tenant answered within seconds", 256)

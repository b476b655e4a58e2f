"""One caller sends as much as it can, or makes answers bad by its own parameters: others are answered meanwhile, and no
arm of a rollout is blamed."""

import contextlib
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import pytest

from tests.fabricate import NAME
from tests.server.conftest import Served, StartServer, engine, made, scene, served, start_server, tiny, versions
from tests.server.fake_engine import VALID, FakeEngine
from tests.server.test_costs import meanwhile, neighbour
from tests.server.test_faults import head, raw, sent
from tests.waiting import SECONDS, until
from tunesmith.registry.versions import Version
from tunesmith.rollout.traffic import arms
from tunesmith.server import limits
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import Router
from tunesmith.services import rollouts as service


@pytest.mark.attack("serving", "one caller fills the queue and the threads", "429 beyond the caller's share")
def test_another_users_request_begins_at_once(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(together=4, waiting=24, per_user=12)
    with ThreadPoolExecutor(41) as pool:
        served.ask()
        engine.gate.clear()
        flood = [pool.submit(served.post) for _ in range(40)]
        until(lambda: sum(one.done() for one in flood) == 28 and engine.calls == 1 + 3 and served.worker.waiting() == 9)
        for refused in [one.result() for one in flood if one.done()]:
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"], refused.headers["retry-after"]) == (
                429, "rate_limit_error", "rate_limit_exceeded", "1",
            )  # fmt: skip
            assert "12 requests" in error["message"]
        with pytest.raises(openai.RateLimitError):
            served.ask()
        other = pool.submit(served.post, neighbour(served))
        until(lambda: engine.calls == 1 + 4)  # begun, while every request of the first caller stands still
        engine.gate.set()
        assert other.result(SECONDS).status_code == 200
        assert sorted(one.result(SECONDS).status_code for one in flood) == [200] * 12 + [429] * 28
        assert served.ask().choices


@pytest.mark.attack("serving", "one caller fills the queue with requests it leaves", "not counted, and never decoded")
def test_who_leaves_holds_no_place(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(together=2, waiting=8, per_user=8)
    with ThreadPoolExecutor(1) as pool:
        served.ask()
        engine.gate.clear()
        first, begun = pool.submit(served.post), sent(served, neighbour(served), stream=True)
        until(lambda: engine.calls == 3)
        waiting = [sent(served) for _ in range(7)]
        until(lambda: served.worker.waiting() == 7)
        for connection in (begun, *waiting):
            connection.close()
        until(lambda: all(job.left for job in served.worker._turns.waiting()))
        until(lambda: sum(job.left for job in served.worker._busy_since) == 1)
        engine.gate.set()
        assert served.ask().choices
        assert first.result(SECONDS).status_code == 200
        assert engine.calls == 4
        until(lambda: len(served.rows()) == 4)
        assert [row.features.get("left") for row in served.rows() if row.caller == "neighbour"] == [True]


@pytest.mark.slow
@pytest.mark.attack("serving", "feedback that takes seconds to score")
def test_feedback_on_long_answers_holds_up_nobody_else(start_server: StartServer, engine: FakeEngine) -> None:
    pytest.importorskip("rouge_score")
    engine.answer = lambda _request, _adapter: "a\nb\n" * 200  # one fake token
    served = start_server(scorers=("rougeL",))
    asked = [served.ask().id for _ in range(12)]
    scored, _ = meanwhile(served, [partial(served.feedback, one, expected="b\nc\n" * 200) for one in asked])
    statuses = {answer.status_code for answer in scored}
    assert 200 in statuses <= {200, 429}
    engine.answer = lambda _request, _adapter: "a\nb\n" * 2500
    refused = served.feedback(served.ask().id, expected="b\nc\n" * 2500)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expected")


@pytest.mark.slow
@pytest.mark.attack("serving", "many long requests of one caller, tiny model", "the other tenant answered meanwhile")
def test_a_short_request_next_to_long_ones(tiny: Served) -> None:
    other = neighbour(tiny)
    with ThreadPoolExecutor(64) as pool:
        long = [pool.submit(tiny.post, temperature=2.0, max_tokens=10_000) for _ in range(64)]
        until(tiny.worker.waiting)  # all places are filled
        assert tiny.post(other, max_tokens=2).status_code == 200
        assert sum(one.done() for one in long) < 32, "it waited for them"


__all__ = ["engine", "made", "scene", "served", "start_server", "tiny", "versions"]


class Held:
    """A method whose calls wait for the gate. begun: the users whose call began, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, where: object, name: str) -> None:
        self.begun: list[str] = []
        self.gate = threading.Event()
        whole = getattr(where, name)

        def slow(first: Any, *more: Any) -> object:
            self.begun.append((getattr(first, "user", None) or more[0]).name)
            assert self.gate.wait(SECONDS)
            return whole(first, *more)

        patch.setattr(where, name, slow)


@pytest.mark.attack("serving", "one user's feedback waits to be scored")
def test_feedback_of_one_user_does_not_stall_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, Recorder, "_scored")
    other = neighbour(served)
    mine = [served.ask().id for _ in range(limits.FEEDBACK + 1)]
    theirs = [served.post(other).json()["id"] for _ in range(2)]
    with ThreadPoolExecutor(20) as pool:
        try:
            given = [pool.submit(served.feedback, one, expected="{}") for one in mine]
            until(lambda: sum(one.done() for one in given) == 1)
            assert [one.result().status_code for one in given if one.done()] == [429]
            assert held.begun == ["olga"]
            assert served.feedback(theirs[0], other, score={"mine": 1.0}).status_code == 200
            turn = pool.submit(served.feedback, theirs[1], other, expected="{}")
            until(lambda: served.serving.scoring._turns.held_by("neighbour") > 0)
        finally:
            held.gate.set()
        assert turn.result(SECONDS).status_code == 200
        assert sorted(one.result(SECONDS).status_code for one in given) == [200] * limits.FEEDBACK + [429]
    assert held.begun.index("neighbour") <= 2, held.begun


@pytest.mark.attack("serving", "one user's lists of models and rollouts at once")
@pytest.mark.parametrize(
    ("path", "where", "name"),
    [
        ("/v1/models", Router, "models"),
        (f"/v1/models/{NAME}", Router, "models"),
        ("/api/rollouts", service, "status"),
        ("/api/rollouts/1", service, "one_visible_to"),
    ],
)
def test_lists_of_one_user_are_few_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, where: object, name: str
) -> None:
    held = Held(monkeypatch, where, name)

    other = neighbour(served)
    with ThreadPoolExecutor(12) as pool:
        try:
            mine = [pool.submit(served.get, path) for _ in range(10)]
            until(lambda: sum(one.done() for one in mine) == 10 - limits.LISTS)
            assert held.begun == ["olga"]
            theirs = pool.submit(served.get, path, other)
            until(lambda: held.begun == ["olga", "neighbour"])
            assert served.post(other).status_code == 200
        finally:
            held.gate.set()
        statuses = sorted(one.result(SECONDS).status_code for one in mine)
        assert statuses == [200] * limits.LISTS + [429] * (10 - limits.LISTS)
        assert theirs.result(SECONDS).status_code in (200, 404)


@pytest.mark.attack("serving", "one user sends bodies that never end", "429 beyond the user's requests")
def test_half_sent_bodies_count_and_have_a_budget(start_server: StartServer) -> None:
    def told(several: list[socket.socket]) -> int:
        """On how many an answer waits to be read, or the connection has ended."""
        return len(select.select(several, [], [], 0)[0])

    served = start_server(per_user=40, body_bytes=65_536)
    with contextlib.ExitStack() as stack:
        other = neighbour(served)
        few = [stack.enter_context(raw(served, head(served, 60_000) + b"{")) for _ in range(60)]
        until(lambda: told(few) == 20)
        assert served.post().status_code == 429
        assert served.post(other).status_code == 200
        for one in few:
            one.close()
        until(lambda: served.post().status_code == 200)
        large = head(served, 65_000) + b"x" * 64_000
        much = [stack.enter_context(raw(served, large)) for _ in range(30)]
        until(lambda: told(much) == 30 - limits.BODIES_OF_USER)
        assert served.post(other).status_code == 200


# Parameters that cut VALID, whose fake tokens are its two words.
CUTS: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_completion_tokens": 1},
    {"max_tokens": 1, "stream": True},
    {"stop": ["{"]},
    {"stop": "}"},
    {"stop": ["never", " "], "max_tokens": 2},
]
WHOLE: list[dict[str, Any]] = [{}, {"max_tokens": 1000}, {"max_tokens": 2}, {"stop": ["never"]}, {"temperature": 2.0}]


@pytest.mark.attack("rollout", "max_tokens and stop texts that make answers invalid", "recorded, not scored")
def test_answers_that_the_request_cut_are_not_scored(served: Served) -> None:
    for parameters in CUTS:
        answer = served.ask(**parameters)
        assert (list(answer)[-1] if parameters.get("stream") else answer).choices[0].finish_reason
    for parameters in WHOLE:
        assert served.ask(**parameters).choices[0].message.content == VALID
    rows = served.rows()
    assert [(row.ok, row.cut, row.scores) for row in rows[: len(CUTS)]] == [(True, True, {})] * len(CUTS)
    assert [(row.cut, row.scores) for row in rows[len(CUTS) :]] == [(False, {"json_valid": 1.0})] * len(WHOLE)
    assert f'outcome="cut"}} {len(CUTS)}.0' in served.get("/metrics").text
    for row in rows[: len(CUTS)]:
        found = served.feedback(row.id, expected=VALID).json()
        assert (found["scores"], set(found["not_scored"])) == ({}, {"json_valid", "exact_match"})


@pytest.mark.attack("rollout", "max_tokens and stop texts that make answers invalid", "counted as cut")
def test_scores_given_for_cut_answers_count_for_no_arm(served: Served, versions: dict[int, Version]) -> None:
    rollout = served.begin(versions[2], {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    for number in range(10):
        answer = served.ask(max_tokens=1, user=f"user {number}")
        given = served.feedback(answer.id, score={"exact_match": 0.0})
        assert given.json()["error"]["code"] == "answer_cut"
    steps = {row.features["step"] for row in served.rows() if row.rollout == rollout.id}
    found = [arm for step in steps for arm in arms(served.scene.store, rollout.id, step, "exact_match", None)]
    assert [list(arm.scores) for arm in found] == [[]] * len(found)
    assert sum(arm.cut for arm in found) == sum(arm.requests for arm in found) == 10


@pytest.mark.attack("rollout", "max_tokens and stop texts, native engine", "recorded, not scored")
def test_the_native_engine_says_what_ended_an_answer(tiny: Served) -> None:
    text = tiny.ask(temperature=1.0, seed=3).choices[0].message.content
    tiny.ask(temperature=1.0, seed=3, max_tokens=2)
    tiny.ask(temperature=1.0, seed=3, stop=[text[1]])
    tiny.ask(temperature=1.0, seed=3, max_tokens=100_000)
    assert [row.cut for row in tiny.rows()] == [False, True, True, False]

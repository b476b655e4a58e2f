"""Bad clients and a bad engine: each gets its answer, the others theirs, and what was begun is recorded."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from tests.fabricate import NAME, Scene
from tests.server.conftest import HELLO, Served, running
from tests.server.fake_engine import VALID, FakeEngine
from tests.waiting import until
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.engines.protocol import Completion
from tunesmith.registry.versions import Version
from tunesmith.server.intake import limits
from tunesmith.store import database


def raw(served: Served, data: bytes) -> socket.socket:
    """A connection on which data was sent."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall(data)
    return connection


def head(served: Served, length: int | str) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


# Clients


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b'{"model": "home", "model": "home", "messages": []}',
        b'{"temperature": NaN}',
        b'{"model": "\\ud800"}',
        b'{"model": "home\xff"}',
        b"{",
        b"null",
        b'\xef\xbb\xbf{"model": "home"}',
    ],
)
def test_what_is_not_one_plain_json_object_is_400(shared: Served, body: bytes) -> None:
    with shared.http() as http:
        response = http.post("/v1/chat/completions", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "said"),
    [
        ("GET", "/v1/files/%00", None, 404, "There is nothing at this address."),
        ("GET", "/api/versions/home%00/1", None, 404, "There is nothing at this address."),
        ("GET", "/v1/files?purpose=%00", None, 400, "The address holds a NUL character."),
        ("POST", "/api/feedback", {"request_id": "\0", "score": {"a": 1}}, 400, "The body holds a NUL character."),
    ],
)
def test_nul_never_reaches_the_database(
    shared: Served, method: str, url: str, body: object, status: int, said: str
) -> None:
    with shared.http() as http:
        answer = http.request(method, url, json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, said)


KEYS = st.sampled_from(["model", "messages", "role", "content", "stop", "stream", "user", "x"])
LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_no_json_makes_the_server_fail(shared: Served, body: Any) -> None:
    with shared.http() as http:
        response = http.post("/v1/chat/completions", content=json.dumps(body).encode())
    assert response.status_code in (400, 404)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_request_and_a_slow_body_cost_only_themselves(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version]
) -> None:
    with running(scene, engine, body_seconds=3) as served:
        served.begin(versions[1])
        half = raw(served, b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
        slow = raw(served, head(served, 500) + b'{"model": ')
        assert served.ask().choices
        answer = b"".join(iter(lambda: slow.recv(4096), b""))  # head and body may come apart
        assert b" 408 " in answer
        assert b"body_too_slow" in answer
        gone = raw(served, head(served, 500) + b'{"model": ')
        gone.close()
        assert served.ask().choices
        half.close()
        slow.close()


@pytest.mark.slow
def test_200_parallel_requests_get_an_answer_or_429(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version]
) -> None:
    with running(scene, engine, waiting=64, together=16) as served:
        served.begin(versions[1])
        served.ask()
        engine.gate.clear()
        # httpx's pool closes connections beyond its bounds, now and then one that another thread is about to use.
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)
        with httpx.Client(base_url=served.url, limits=bounds) as http, ThreadPoolExecutor(200) as pool:
            token = {"Authorization": f"Bearer {served.token}"}
            calls = [
                pool.submit(
                    http.post,
                    "/v1/chat/completions",
                    json={"model": NAME, "messages": HELLO},
                    headers=token,
                    timeout=120,
                )
                for _ in range(200)
            ]
            try:
                until(lambda: sum(call.done() for call in calls) >= 100)
            finally:
                engine.gate.set()
            responses = [call.result() for call in calls]
        said = Counter(response.status_code for response in responses)
        assert set(said) == {200, 429}
        assert said[200] >= 64
        turned_away = next(response for response in responses if response.status_code == 429)
        assert turned_away.headers["retry-after"] == "1"
        assert turned_away.json()["error"]["code"] == "queue_full"
        assert engine.busiest == 14  # of 16: two are kept for other users
        assert len({response.json()["id"] for response in responses if response.status_code == 200}) == said[200]
        assert len(served.rows()) == said[200] + 1
        assert served.client(retries=2).chat.completions.create(model=NAME, messages=HELLO).choices


def decoding_slowly(served: Served) -> list[int]:
    """Let the engine take minutes for an answer; returns the words it has decoded, which grow."""
    decoded = []

    def slow(_request: Any, _adapter: Any) -> Any:
        for number in range(20_000):
            time.sleep(0.005)
            decoded.append(number)
            yield "word "
        yield Completion("word " * 20_000, "stop", 1, 20_000)

    served.engine.stream = slow  # type: ignore[method-assign]
    return decoded


@pytest.mark.slow
def test_client_leaving_mid_stream_stops_the_engine(served: Served) -> None:
    decoded = decoding_slowly(served)
    with (
        served.http() as http,
        http.stream(
            "POST", "/v1/chat/completions", json={"model": NAME, "messages": HELLO, "stream": True}
        ) as response,
    ):
        next(response.iter_lines())
    row = until(served.rows)[0]
    assert row.ok
    assert row.completion_tokens == len(decoded) < 20_000
    assert row.scores == {}  # half an answer is no invalid one
    del served.engine.stream  # as it was
    assert served.ask().choices


def test_client_leaving_frees_its_place_without_stream(served: Served) -> None:
    decoded = decoding_slowly(served)
    body = json.dumps({"model": NAME, "messages": HELLO}).encode()
    connection = raw(served, head(served, len(body)) + body)
    until(lambda: decoded)
    connection.close()
    until(lambda: not served.worker._busy_since)
    assert len(decoded) < 20_000
    (row,) = served.rows()
    assert (row.ok, row.scores, row.features["left"]) == (True, {}, True)
    assert 0 < row.completion_tokens <= len(decoded)


def test_a_client_that_leaves_before_the_first_token_was_not_answered(served: Served) -> None:
    served.ask()
    served.engine.gate.clear()
    body = json.dumps({"model": NAME, "messages": HELLO, "stream": True}).encode()
    connection = raw(served, head(served, len(body)) + body)
    until(lambda: served.engine.calls == 2)
    connection.close()
    until(lambda: all(job.left for job in list(served.worker._busy_since)))
    served.engine.gate.set()
    until(lambda: len(served.rows()) == 2)
    assert [row.features.get("left") for row in served.rows()] == [None, True]


def test_clients_leaving_the_queue_cost_no_decoding(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version]
) -> None:
    with running(scene, engine, together=1) as served:
        served.begin(versions[1])
        served.ask()
        engine.gate.clear()
        body = json.dumps({"model": NAME, "messages": HELLO}).encode()
        first = threading.Thread(target=served.ask)
        first.start()
        until(lambda: engine.calls == 2)
        waiting = [raw(served, head(served, len(body)) + body) for _ in range(20)]
        until(lambda: served.worker.waiting() == 20)
        for connection in waiting:
            connection.close()
        until(lambda: all(job.left for job in served.worker._turns.waiting()))
        engine.gate.set()
        first.join()
        served.ask()
        assert engine.calls == len(served.rows()) == 3


# The engine


def crash(_request: Any, _adapter: Any) -> str:
    raise RuntimeError("CUDA error: secret path /srv/models/x")


def test_an_engine_error_is_500_without_its_details(served: Served) -> None:
    served.engine.answer = crash
    for more in ({}, {"stream": True}):
        response = served.post(**more)
        assert response.status_code == 500
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert error["message"] == "The engine failed on this request."
    rows = served.rows()
    assert [(row.ok, row.scores) for row in rows] == [(False, {"json_valid": 0.0})] * 2
    served.engine.answer = lambda _request, _adapter: VALID
    assert served.ask().choices


def test_one_bad_request_of_a_batch_does_not_fail_the_others(served: Served) -> None:
    served.ask()
    served.engine.answer = lambda request, _: crash(0, 0) if "bad" in request.messages[-1].content else VALID
    served.engine.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        blocker = pool.submit(served.post)
        until(lambda: served.engine.calls == 2)
        texts = ["good", "bad", "good", "good", "bad"]
        calls = [pool.submit(served.post, messages=[{"role": "user", "content": text}]) for text in texts]
        until(lambda: served.engine.calls == 7)
        served.engine.gate.set()
        assert blocker.result().status_code == 200
        assert [call.result().status_code for call in calls] == [200, 500, 200, 200, 500]


@pytest.mark.parametrize(
    ("where", "status", "param", "recorded"), [("messages", 400, "messages", []), ("task.schema", 500, None, [False])]
)
def test_a_request_that_its_own_words_break_counts_against_no_arm(
    served: Served, where: str, status: int, param: str | None, recorded: list[bool]
) -> None:
    def refuse(_request: Any, _adapter: Any) -> str:
        raise UsageError("answers cannot be held to this", where=where)

    served.engine.answer = refuse
    response = served.post()
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert [row.ok for row in served.rows()] == recorded


def test_an_engine_error_mid_stream_ends_the_stream(served: Served) -> None:
    def breaking(_request: Any, _adapter: Any) -> Any:
        yield "one"
        raise RuntimeError("died")

    served.engine.stream = breaking  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="The engine failed"):
        list(served.ask(stream=True))
    assert [row.ok for row in served.rows()] == [False]


@pytest.mark.slow
def test_a_hanging_engine_times_out_and_is_not_ready(
    scene: Scene, engine: FakeEngine, versions: dict[int, Version]
) -> None:
    with running(scene, engine, waiting=2, together=2) as served, served.http() as http:
        served.begin(versions[1])
        served.ask()
        until(lambda: http.get("/readyz").status_code == 200)
        engine.gate.clear()
        served.change(answer_seconds=2)
        with ThreadPoolExecutor(8) as pool:
            statuses = [call.result().status_code for call in [pool.submit(served.post) for _ in range(8)]]
        assert set(statuses) <= {504, 429}
        assert 504 in statuses
        # The engine took the batch a moment after its requests came in, so they give up a moment before it is late.
        until(lambda: http.get("/readyz").status_code == 503)
        assert http.get("/readyz").json()["engine"] is False
        assert http.get("/healthz").status_code == 200
        failed = [row for row in served.rows() if not row.ok]
        assert failed
        served.change(answer_seconds=120)
        engine.gate.set()
        until(lambda: http.get("/readyz").status_code == 200)
        assert served.ask().choices
        # What the engine gave too late was not recorded a second time.
        assert len([row for row in served.rows() if not row.ok]) == len(failed)


def test_an_answer_is_not_withheld_when_it_cannot_be_recorded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(database, "append", full)
        assert served.ask().choices[0].message.content == VALID
    assert len(served.rows()) == 1
    with served.http() as http:
        assert "tunesmith_unrecorded_requests_total 1.0" in http.get("/metrics").text


def test_feedback_on_a_full_database_says_so_and_stores_nothing(served: Served) -> None:
    """A SQLite file that may not grow by one more page."""
    number = served.ask().id
    engine = served.scene.store.engine
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")  # VACUUM leaves no free pages inside the file
        connection.exec_driver_sql("VACUUM")
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    def stays(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    def scores(turn: int) -> dict[str, float]:
        return {f"{'m' * 58}_{turn:02}_{place:02}": 0.5 for place in range(limits.SCORES)}

    with served.http() as http:

        def add(turn: int) -> httpx.Response:
            return http.post("/api/feedback", json={"request_id": number, "score": scores(turn)})

        event.listen(engine, "connect", stays)
        engine.dispose()
        answers = [add(turn) for turn in range(10)]  # the first ones may fit into the row's page
        event.remove(engine, "connect", stays)
        engine.dispose()
        fitted = [turn for turn, answer in enumerate(answers) if answer.status_code == 200]
        full = answers[len(fitted)]
        assert (full.status_code, len(fitted) < 8) == (507, True)
        error = full.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "storage_full")
        assert "operator must free space" in error["message"]
        kept = set(served.rows()[0].scores)
        assert kept >= {name for turn in fitted for name in scores(turn)}
        assert not kept & scores(len(fitted)).keys(), "nothing was stored"
        assert add(len(fitted)).status_code == 200


def test_feedback_without_a_database_may_be_sent_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    number = served.ask().id

    def locked(*_: Any) -> Any:
        raise TunesmithError("the database cannot be used: database is locked")

    with served.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(database, "writing", locked)
            answer = http.post("/api/feedback", json={"request_id": number, "score": {"m": 0.5}})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "storage_failed"
        assert http.post("/api/feedback", json={"request_id": number, "score": {"m": 0.5}}).status_code == 200


def test_stopping_answers_what_waits(scene: Scene, engine: FakeEngine, versions: dict[int, Version]) -> None:
    with running(scene, engine, together=1) as served:
        served.begin(versions[1])
        served.ask()
        engine.gate.clear()
        with ThreadPoolExecutor(4) as pool:
            blocked = pool.submit(served.post)
            until(lambda: engine.calls == 2)
            waiting = pool.submit(served.post, model=f"{NAME}@v2")
            until(lambda: served.worker.waiting() == 1)
            stop = pool.submit(served.worker.stop, 60)
            until(lambda: served.worker.waiting() == 0)
            assert not blocked.done()
            engine.gate.set()
            stop.result()
            assert blocked.result().status_code == 200
            assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "stopping")
            assert served.post().status_code == 503

"""Bad clients and a bad engine: each gets its answer, the others theirs, and what was begun is recorded."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served, StartServer
from tests.server.fake_engine import VALID, FakeEngine
from tests.waiting import until
from tunesmith.core.errors import UsageError
from tunesmith.engines.protocol import Completion


def raw(served: Served, data: bytes, room: int = 0) -> socket.socket:
    """A connection on which data was sent. room: bytes that the client takes before it reads; 0: as many as usual."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(120)
    if room:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def head(served: Served, length: int | str) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


# Clients


def test_a_full_queue_is_429(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(waiting=3, together=2)
    served.ask()
    engine.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(served.post)]
        until(lambda: engine.calls == 2)
        calls += [pool.submit(served.post) for _ in range(7)]
        until(lambda: sum(call.done() for call in calls) == 4)
        engine.gate.set()
        answers = sorted((call.result() for call in calls), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 4
    error = answers[-1].json()["error"]
    assert (answers[-1].headers["retry-after"], error["code"], error["type"]) == (
        "1", "queue_full", "rate_limit_error",
    )  # fmt: skip
    assert engine.busiest == 1, "the other place is kept for another user"
    assert len({answer.json()["id"] for answer in answers[:4]}) == 4
    assert len(served.rows()) == 5
    served.worker.stop(60)
    stopping = served.post()
    assert (stopping.status_code, stopping.json()["error"]["code"]) == (503, "stopping")


def sent(served: Served, token: str = "", **more: Any) -> socket.socket:
    """A connection on which a request was sent. token: in place of the server's own."""
    body = json.dumps({"model": NAME, "messages": HELLO, **more}).encode()
    start = head(served, len(body)).replace(served.token.encode(), (token or served.token).encode())
    return raw(served, start + body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine(served: Served, stream: bool) -> None:
    decoded = []

    def slow(_request: Any, _adapter: Any) -> Any:
        for number in range(20_000):
            time.sleep(0.005)
            decoded.append(number)
            yield "word "
        yield Completion("word " * 20_000, "stop", 1, 20_000)

    served.engine.stream = slow  # type: ignore[method-assign]
    connection = sent(served, stream=stream)
    if stream:
        until(lambda: b"word" in connection.recv(4096))
    else:
        until(lambda: decoded)
    connection.close()
    until(lambda: not served.worker._busy_since)
    (row,) = until(served.rows)
    assert (row.ok, row.scores) == (True, {}), "half an answer is no invalid one"
    assert row.features.get("left") is (None if stream else True)
    assert 0 < row.completion_tokens <= len(decoded) < 20_000
    if stream:
        assert row.completion_tokens == len(decoded)
    del served.engine.stream  # as it was
    assert served.ask().choices


# The engine


@pytest.mark.parametrize(
    ("error", "status", "code", "param", "recorded"),
    [
        (RuntimeError("CUDA error: secret path /srv/models/x"), 500, "engine_error", None, [(False, 0.0)] * 2),
        (UsageError("cannot be held to this", where="task.schema"), 500, "engine_error", None, [(False, 0.0)] * 2),
        (UsageError("cannot be held to this", where="messages"), 400, "invalid_value", "messages", []),
    ],
)
def test_an_engine_error_is_500_without_its_details_unless_the_requests_own_words_break_it(
    served: Served, error: Exception, status: int, code: str, param: str | None, recorded: list[tuple[bool, float]]
) -> None:
    def fail(_request: Any, _adapter: Any) -> str:
        raise error

    served.engine.answer = fail
    for stream in (False, True):
        response = served.post(stream=stream)
        found = response.json()["error"]
        assert (response.status_code, found["code"], found["param"]) == (status, code, param)
        assert found["type"] == ("server_error" if status == 500 else "invalid_request_error")
        assert (found["message"] == "The engine failed on this request.") == (status == 500)
    assert [(row.ok, row.scores["json_valid"]) for row in served.rows()] == recorded
    served.engine.answer = lambda _request, _adapter: VALID
    assert served.ask().choices


def test_an_engine_error_mid_stream_ends_the_stream(served: Served) -> None:
    def breaking(_request: Any, _adapter: Any) -> Any:
        yield "one"
        raise RuntimeError("died")

    served.engine.stream = breaking  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="The engine failed"):
        list(served.ask(stream=True))
    assert [row.ok for row in served.rows()] == [False]


@pytest.mark.slow
def test_a_hanging_engine_times_out_and_is_not_ready(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(waiting=2, together=2)
    with served.http() as http:
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


# The database: attacks/test_unusable_database.py


def test_a_row_that_does_not_fit_costs_no_other(served: Served) -> None:
    served.ask()
    (row,) = ({column.name: getattr(one, column.name) for column in one.__table__.columns} for one in served.rows())
    rows = served.serving.recorder._rows
    assert rows.store([{**row, "id": "a"}, row, {**row, "id": "b"}]) == 1
    assert sorted(one.id for one in served.rows()) == sorted([row["id"], "a", "b"])

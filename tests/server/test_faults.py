"""Bad clients and a bad engine: each gets its answer, the others theirs, and what was begun is recorded."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import event

from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served, StartServer
from tests.server.fake_engine import VALID, FakeEngine
from tests.waiting import until
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.engines.protocol import Completion
from tunesmith.server import limits
from tunesmith.server.intake.connections import BoundedConnection
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


def test_half_a_request_and_a_slow_body_cost_only_themselves(start_server: StartServer) -> None:
    served = start_server(body_seconds=3)
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


def sent(served: Served, **more: Any) -> socket.socket:
    """A connection on which a request was sent."""
    body = json.dumps({"model": NAME, "messages": HELLO, **more}).encode()
    return raw(served, head(served, len(body)) + body)


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


def test_clients_that_leave_the_queue_or_before_the_first_token_cost_no_decoding(
    start_server: StartServer, engine: FakeEngine
) -> None:
    served = start_server(together=1)
    served.ask()
    engine.gate.clear()
    begun = sent(served, stream=True)
    until(lambda: engine.calls == 2)
    waiting = [sent(served) for _ in range(20)]
    until(lambda: served.worker.waiting() == 20)
    for connection in (begun, *waiting):
        connection.close()
    until(lambda: all(job.left for job in [*served.worker._busy_since, *served.worker._turns.waiting()]))
    engine.gate.set()
    served.ask()
    assert engine.calls == 3
    until(lambda: len(served.rows()) == 3)
    assert [row.features.get("left") for row in served.rows()] == [None, True, None]


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


# The database of feedback; that of answers: attacks/test_unusable_database.py


def test_feedback_that_cannot_be_stored_says_so_and_stores_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is locked, then a SQLite file that may not grow by one more page."""
    number, engine = served.ask().id, served.scene.store.engine

    def locked(*_: Any) -> Any:
        raise TunesmithError("the database cannot be used: database is locked")

    def stays(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    def scores(turn: int) -> dict[str, float]:
        return {f"{'m' * 58}_{turn:02}_{place:02}": 0.5 for place in range(limits.SCORES)}

    def add(turn: int) -> httpx.Response:
        return http.post("/api/feedback", json={"request_id": number, "score": scores(turn)})

    with served.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(database, "writing", locked)
            answer = add(0)
        error = answer.json()["error"]
        assert (answer.status_code, answer.headers["retry-after"], error["code"]) == (503, "5", "storage_failed")
        with engine.connect() as connection:
            connection.exec_driver_sql("COMMIT")  # VACUUM leaves no free pages inside the file
            connection.exec_driver_sql("VACUUM")
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
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


# What a request costs the server beyond its answer: threads woken, transactions, packets


def test_an_answers_body_does_not_wait_until_its_headers_are_acknowledged(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    made = BoundedConnection.connection_made

    def noting(self: BoundedConnection, transport: Any) -> None:
        made(self, transport)
        connected = transport.get_extra_info("socket")
        at_once.append(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(BoundedConnection, "connection_made", noting)
    with served.http() as http:
        http.get("/healthz")
    assert at_once
    assert all(at_once)


def test_a_request_wakes_one_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask()
    looked, begin = 0, served.worker._turns.begin

    def counting() -> Any:
        nonlocal looked
        looked += 1
        return begin()

    monkeypatch.setattr(served.worker._turns, "begin", counting)
    for _ in range(3):
        served.ask()
    assert 3 <= looked < served.serving.settings.together


def test_requests_that_end_together_share_transactions(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is written, the others' rows gather, and their threads take the next requests."""
    served.ask()
    many, begun, rows, append = 8, 0, served.serving.recorder._rows, database.append

    def waiting_for_the_others(*given: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            first = len(given[2])  # more than one where another row came before this one was taken
            until(lambda: rows.waiting() + first == many and served.worker.answering() == 1)
        append(*given)

    monkeypatch.setattr(database, "append", waiting_for_the_others)
    with ThreadPoolExecutor(many) as pool:
        assert [answer.status_code for answer in pool.map(lambda _: served.post(), range(many))] == [200] * many
    assert begun <= 2
    monkeypatch.undo()
    assert len(served.rows()) == many + 1


def test_a_row_that_does_not_fit_costs_no_other(served: Served) -> None:
    served.ask()
    (row,) = ({column.name: getattr(one, column.name) for column in one.__table__.columns} for one in served.rows())
    rows = served.serving.recorder._rows
    assert rows.store([{**row, "id": "a"}, row, {**row, "id": "b"}]) == 1
    assert sorted(one.id for one in served.rows()) == sorted([row["id"], "a", "b"])

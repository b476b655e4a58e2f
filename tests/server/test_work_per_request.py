"""What the server does for each request beyond answering it: threads woken, transactions, packets."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sqlalchemy.orm import Session

from tests.server.conftest import Served
from tests.waiting import SECONDS
from tunesmith.server import recording
from tunesmith.server.intake.connections import BoundedConnection
from tunesmith.store import database


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


def test_requests_that_end_together_share_a_transaction(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask()
    many, begun, recorder = 8, 0, served.serving.recorder

    def waiting_for_the_others(engine: Any, **options: Any) -> AbstractContextManager[Session]:
        nonlocal begun
        begun += 1
        until = time.monotonic() + SECONDS
        while begun == 1 and len(recorder._unwritten) < many - 1:
            assert time.monotonic() < until
            time.sleep(0.005)
        return database.writing(engine, **options)

    monkeypatch.setattr(recording, "database", _Database(waiting_for_the_others))
    with ThreadPoolExecutor(many) as pool:
        assert [answer.status_code for answer in pool.map(lambda _: served.post(), range(many))] == [200] * many
    assert begun == 2
    monkeypatch.undo()
    assert len(served.rows()) == many + 1


def test_a_row_that_does_not_fit_costs_no_other(served: Served) -> None:
    served.ask()
    (row,) = ({column.name: getattr(one, column.name) for column in one.__table__.columns} for one in served.rows())
    recorder = served.serving.recorder
    assert recorder._store_rows([{**row, "id": "a"}, row, {**row, "id": "b"}]) == 1
    assert sorted(one.id for one in served.rows()) == sorted([row["id"], "a", "b"])


class _Database:
    """The module store.database with another `writing`."""

    def __init__(self, writing: Any) -> None:
        self.writing = writing

    def __getattr__(self, name: str) -> Any:
        return getattr(database, name)

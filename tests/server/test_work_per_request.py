"""What the server does for each request beyond answering it: threads woken, transactions, packets."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.waiting import until
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

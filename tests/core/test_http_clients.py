"""Clients of which each serves one thread at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.waiting import until
from tunesmith.core.system.http_clients import HttpClients


def test_threads_at_once_have_different_clients_and_no_more_than_may_be() -> None:
    clients, go_on = HttpClients(httpx.Client, 3), threading.Event()
    in_use: list[httpx.Client] = []

    def use(_: int) -> None:
        with clients.one() as client:
            assert client not in in_use, "two threads share a client"
            in_use.append(client)
            assert len(in_use) <= 3
            assert go_on.wait(60)
            in_use.remove(client)
            raise ZeroDivisionError  # which gives the client back

    with ThreadPoolExecutor(8) as pool:
        given = [pool.submit(use, number) for number in range(8)]
        until(lambda: len(in_use) == 3)
        go_on.set()
        assert [type(one.exception()) for one in given] == [ZeroDivisionError] * 8
    with clients.one() as first:
        pass
    with clients.one() as again:
        assert again is first, "its connection is open already"

"""Clients that send too much, too slowly, or read nothing: they are told so, or closed, and cost others nothing."""

import contextlib
import http.client
import json
import socket
import time
from collections import Counter
from functools import partial
from typing import Any

import httpx
import pytest

from tests.attack_table import Happened
from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served, StartServer
from tests.server.fake_engine import FakeEngine
from tests.server.test_costs import neighbour
from tests.server.test_faults import head, raw
from tests.waiting import until
from tunesmith.engines.protocol import Completion

LIMIT = 1 << 20


@pytest.fixture
def quick(start_server: StartServer) -> Served:
    """A server with short limits."""
    server = start_server(headers_seconds=3, body_seconds=3, unread_seconds=3)
    server.ask()
    return server


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection: it answers or not, then ends."""
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


# Bodies that are too large


def by_httpx(served: Served, body: bytes, chunked: bool) -> int:
    content: Any = (body[at : at + 65_536] for at in range(0, len(body), 65_536)) if chunked else body
    with served.http() as client:
        return client.post("/v1/chat/completions", content=content).status_code


def by_http_client(served: Served, body: bytes, chunked: bool) -> int:
    """As requests and urllib3 send it, which read no answer before the whole body is sent."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=120)
    content: Any = (body[at : at + 65_536] for at in range(0, len(body), 65_536)) if chunked else body
    headers = {"Authorization": f"Bearer {served.token}"}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", content, headers, encode_chunked=chunked)
        return connection.getresponse().status


def by_socket(served: Served, body: bytes, chunked: bool) -> int:
    """All of it in one write, then the answer to its end."""
    length = head(served, len(body))
    if chunked:
        length = length.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with raw(served, length + body) as connection:
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
    return int(answer.split()[1])


@pytest.mark.attack("serving", "bodies of 1 MiB + 1 byte and more, three clients")
@pytest.mark.parametrize("send", [by_httpx, by_http_client, by_socket])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_is_too_large_is_told_so(served: Served, send: Any, chunked: bool, happened: Happened) -> None:
    sizes = [LIMIT + 1] * 20 + [LIMIT + 65_536, 4 * LIMIT, 16 * LIMIT]
    statuses = Counter(send(served, b"x" * size, chunked) for size in sizes)
    assert statuses == {413: len(sizes)}
    happened("refused, 413", len(sizes))


@pytest.mark.attack("serving", "a body of 16 MiB without a valid token, or no route")
def test_a_large_body_to_nobody_is_answered(served: Served, happened: Happened) -> None:
    body = b"x" * (16 * LIMIT)
    with httpx.Client(base_url=served.url, timeout=120) as client:
        for path, status in (("/v1/chat/completions", 401), ("/api/feedback", 401), ("/nothing", 404)):
            assert client.post(path, content=body).status_code == status
            assert client.get("/healthz").status_code == 200
    with raw(served, head(served, 10**12)) as connection:  # it says how large it is, and nothing of it comes
        assert b" 413 " in connection.recv(4096)
    happened("refused, 401 or 404", 3)


# Half requests


@pytest.mark.slow
@pytest.mark.attack("serving", "1,000 connections with half-sent headers or bodies")
def test_a_thousand_half_requests_stop_nobody(quick: Served, happened: Happened) -> None:
    parts = (
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthoriz",
        head(quick, 500) + b'{"model": ',
        head(quick, 500).replace(b"Bearer", b"Basic") + b'{"model": ',
    )
    other = partial(quick.client, neighbour(quick))
    with contextlib.ExitStack() as stack:
        half = []
        for number in range(1000):
            half.append(stack.enter_context(raw(quick, parts[number % len(parts)])))
            if number % 100 == 99:
                assert other().chat.completions.create(model=NAME, messages=HELLO).choices
        until(lambda: all(closed(connection) for connection in half))
    assert quick.ask().choices
    happened("closed in time; others answered", 1000)


@pytest.mark.attack("serving", "headers and bodies that come a byte at a time")
def test_dribbled_requests_are_closed(quick: Served, happened: Happened) -> None:
    answered = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    starts = [b"GET /healthz HTTP/1.1\r\nX: ", answered + b"GET /healthz HTTP/1.1\r\nX: "]
    starts.append(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n")
    with raw(quick, head(quick, 500) + b'{"model": ') as slow:
        answer = b"".join(iter(lambda: slow.recv(4096), b""))  # head and body may come apart
    assert (b" 408 " in answer, b"body_too_slow" in answer) == (True, True)
    with contextlib.ExitStack() as stack:
        slow_ones = [stack.enter_context(raw(quick, start)) for start in starts]

        def all_closed() -> bool:
            for connection in slow_ones:
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")
            return all(closed(connection) for connection in slow_ones)

        until(all_closed)
    happened("closed in time", len(starts))


@pytest.mark.attack("serving", "more idle connections than the server keeps")
def test_the_oldest_idle_connections_make_room(start_server: StartServer, happened: Happened) -> None:
    served = start_server(idle_connections=20)
    with contextlib.ExitStack() as stack:
        half = [stack.enter_context(raw(served, b"GET / HTT")) for _ in range(60)]
        assert served.ask().choices
        until(lambda: sum(closed(connection) for connection in half) >= 40)
        assert not closed(half[-1])
    happened("the oldest are closed", 60)


# Answers that nobody reads


@pytest.mark.slow
@pytest.mark.attack("serving", "streams that nobody reads", "closed in time")
def test_a_stream_that_nobody_reads_is_closed(quick: Served) -> None:
    decoded = 0

    def long(_request: Any, _adapter: Any) -> Any:
        nonlocal decoded
        while decoded < 4000:
            decoded += 1
            yield "word " * 2000
        yield Completion("word", "stop", 1, 4000)

    stream, quick.engine.stream = quick.engine.stream, long  # type: ignore[method-assign]
    body = json.dumps({"model": NAME, "messages": HELLO, "stream": True}).encode()
    with raw(quick, head(quick, len(body)) + body, room=4096):
        until(lambda: decoded)
        quick.engine.stream = stream  # type: ignore[method-assign]
        assert quick.ask().choices
        until(lambda: not quick.serving.drain.under_way)
    assert quick.ask().choices


@pytest.mark.attack("serving", "a large answer that is read slowly but steadily", "read to its end")
def test_a_steady_reader_gets_the_whole_answer(start_server: StartServer, engine: FakeEngine) -> None:
    engine.answer = lambda _request, _adapter: "x" * (24 * LIMIT)
    served = start_server(unread_seconds=2)
    body = json.dumps({"model": NAME, "messages": HELLO}).encode()
    starts = [head(served, len(body))[:-2] + b"Connection: %s\r\n\r\n" % each for each in (b"keep-alive", b"close")]
    with contextlib.ExitStack() as stack:
        got = {stack.enter_context(raw(served, start + body, room=262_144)): 0 for start in starts}
        while steady := [connection for connection, length in got.items() if length < 24 * LIMIT]:
            for connection in steady:
                piece = connection.recv(1 << 20)
                assert piece, f"cut after {got[connection]} bytes"
                got[connection] += len(piece)
            time.sleep(0.1)  # five seconds in all, more than twice what may pass unread

"""SIGTERM under load: every request gets a whole answer or an API error, and the process ends cleanly."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.commands import Forked, first_line, started
from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served, StartServer, engine, made, scene, start_server, versions
from tests.server.fake_engine import FakeEngine
from tests.server.test_serve_command import SERVE, command, folder
from tests.waiting import SECONDS, until
from tunesmith.store import audit, database
from tunesmith.store.store import Store

__all__ = ["engine", "folder", "made", "scene", "start_server", "versions"]

GRACE = 10.0
BODY = json.dumps({"model": NAME, "messages": HELLO}).encode()


def outcome(status: int, body: str, *, stream: bool = False) -> str:
    """What an answer is. Raises AssertionError for one that is neither whole nor an API error."""
    if status == 200 and stream:
        *events, end = [part.removeprefix("data: ") for part in body.strip().split("\n\n")]
        if end == "[DONE]":
            assert json.loads(events[-1])["choices"][0]["finish_reason"]
            return "answered"
        status, body = 503, end
    document = json.loads(body)
    if status == 200:
        assert document["choices"][0]["finish_reason"]
        return "answered"
    assert status == 503, (status, body)
    assert document["error"]["code"] == "stopping"
    assert document["error"]["type"] == "server_error"
    return "503"


def ready(url: str) -> bool:
    try:
        return httpx.get(url.replace("/v1", "/readyz")).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def serving(folder: Path, process: subprocess.Popen[str] | Forked) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, headers) of a `tunesmith serve`. It is killed at the end if it still runs."""
    try:
        url = first_line(process)["url"]
        until(lambda: ready(url))
        yield url, {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
    finally:
        process.kill()
        process.communicate()


def half_sent(url: str, headers: dict[str, str]) -> socket.socket:
    """A connection that has sent its headers and the start of its body."""
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n"
    connection.sendall(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:9]
    )
    return connection


def received(connection: socket.socket) -> tuple[int, str]:
    """(status, body) of the one answer on a connection that the server then closes."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.decode().partition("\r\n\r\n")
    assert "retry-after" in head.lower()
    return int(head.split()[1]), body


@pytest.mark.slow
@pytest.mark.attack("serving", "SIGTERM under many clients with waiting and streamed requests", "answered whole")
def test_every_request_is_answered_when_the_process_is_stopped(folder: Path) -> None:
    process = started(folder, *SERVE, "--port", "0", "--grace", str(GRACE), stdout=subprocess.PIPE)
    with serving(folder, process) as (url, headers):
        outcomes: list[str] = []

        def client(number: int) -> None:
            stream, found = number % 2 == 0, ""
            body = {"model": NAME, "messages": HELLO, "max_tokens": 400, "temperature": 1.0, "stream": stream}
            # Until it is refused, or the process has ended.
            with httpx.Client(headers=headers, timeout=120) as http, contextlib.suppress(httpx.ConnectError):
                while found != "503":
                    answer = http.post(f"{url}/chat/completions", json=body)
                    found = outcome(answer.status_code, answer.text, stream=stream)
                    outcomes.append(found)
                    assert answer.status_code != 503 or answer.headers["retry-after"]

        with ThreadPoolExecutor(24) as pool:
            clients = [pool.submit(client, number) for number in range(24)]
            halves = [half_sent(url, headers) for _ in range(4)]
            until(lambda: len(outcomes) > 24)
            process.send_signal(signal.SIGTERM)
            for one in clients:
                one.result(SECONDS)
            outcomes += [outcome(*received(half)) for half in halves]
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert (out, "Traceback" in err) == ("", False), err
    assert outcomes.count("503") >= 4


@pytest.mark.slow
@pytest.mark.attack("crash", "a second SIGTERM, or kill -9 after it, under load", "ends at once, the store verifies")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_signal_ends_at_once_and_the_store_is_sound(folder: Path, second: signal.Signals) -> None:
    process = command(folder, "--port", "0", "--grace", "60")
    with serving(folder, process) as (url, headers), ThreadPoolExecutor(8) as pool:
        answered: list[int] = []

        def ask() -> None:
            body = {"model": NAME, "messages": HELLO, "max_tokens": 400, "temperature": 1.0}
            with contextlib.suppress(httpx.TransportError):
                while httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=120).status_code == 200:
                    answered.append(200)

        asking = [pool.submit(ask) for _ in range(8)]
        half = half_sent(url, headers)
        until(lambda: answered)
        process.send_signal(signal.SIGTERM)
        until(lambda: not ready(url))
        process.send_signal(second)
        _, err = process.communicate(timeout=120)
        half.close()
        for one in asking:
            one.result(SECONDS)
        assert process.returncode == -second
        assert "Traceback" not in err
        with database.reading(Store(folder / ".tunesmith").engine) as session:
            assert audit.verify(session) == []


@pytest.mark.attack("serving", "requests that are under way when the server stops", "answered whole")
def test_under_way_may_finish_and_the_rest_is_refused(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(together=3, grace_seconds=120)
    with ThreadPoolExecutor(8) as pool:
        whole, streamed, waiting, half = occupied(served, pool)
        stopped = threading.Thread(target=served.stop)
        stopped.start()
        assert waiting.result(SECONDS).status_code == 503
        assert waiting.result().headers["retry-after"]
        refused = served.post()
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        with served.http() as http:
            assert http.get("/healthz").json() == {"ok": True, "draining": True}
            assert (http.get("/readyz").status_code, http.get("/readyz").json()["draining"]) == (503, True)
            assert "tunesmith_waiting_requests 0.0" in http.get("/metrics").text
        half.sendall(BODY[9:])
        assert outcome(*received(half)) == "503"
        engine.gate.set()
        assert outcome(whole.result(SECONDS).status_code, whole.result().text) == "answered"
        assert outcome(200, streamed.result(SECONDS).text, stream=True) == "answered"
        stopped.join(SECONDS)
        assert not stopped.is_alive()
        assert len(served.rows()) == 2


@pytest.mark.attack("serving", "requests that outlast the grace time", "API error")
def test_what_outlasts_the_grace_time_gets_an_api_error(start_server: StartServer, engine: FakeEngine) -> None:
    served = start_server(together=3, grace_seconds=1)
    with ThreadPoolExecutor(8) as pool:
        whole, streamed, waiting, half = occupied(served, pool)
        served.stop()
        found = [outcome(each.result(SECONDS).status_code, each.result().text) for each in (whole, waiting)]
        found += [outcome(200, streamed.result(SECONDS).text, stream=True), outcome(*received(half))]
        assert found == ["503"] * 4
        engine.gate.set()
        assert [row for row in served.rows() if not row.ok] == []


def occupied(served: Served, pool: ThreadPoolExecutor) -> tuple:
    """(answered whole, streamed, waiting, half-sent): four requests while the engine's gate is closed."""
    served.engine.answer = lambda _request, _adapter: "one two three"
    served.engine.gate.clear()
    whole, streamed = pool.submit(served.post), pool.submit(served.post, stream=True)
    until(lambda: served.engine.calls == 2)
    waiting = pool.submit(served.post)
    until(lambda: served.worker.waiting() == 1)
    half = half_sent(served.url + "/v1", {"Authorization": f"Bearer {served.token}"})
    until(served.serving.arriving._bytes.total)  # the server has read the half
    return whole, streamed, waiting, half

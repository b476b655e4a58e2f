"""A receiver of webhooks, and a project without a model that sends to it."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from tests.http_server import answering
from tests.tiny_project import settings
from tunesmith.project import Project, parse_settings
from tunesmith.store.store import Store
from tunesmith.webhooks.sending import Deliverer

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Receiver(ThreadingHTTPServer):
    """Keeps what it gets: (headers with lower-case names, body). answers: the next statuses; then it answers 204.

    drips: sends its answer a byte at a time, never to its end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.drips = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Receiver)
        body = self.rfile.read(int(self.headers["content-length"]))
        server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        if server.drips:
            for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            return
        self.send_response(server.answers.pop(0) if server.answers else 204)
        self.send_header("location", server.url)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_POST()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    server = Receiver()
    with answering(server):
        yield server


def project_of(store: Store, **webhooks: dict[str, Any]) -> Project:
    """A project with these webhooks over a store."""
    found = Project(store.root, parse_settings(yaml.safe_dump({**settings(), "webhooks": webhooks}), "test"))
    found.store = store
    return found


def deliverer(store: Store, url: str, **more: Any) -> Deliverer:
    """Sends to one webhook, ops, which has seen everything so far."""
    found = deliverer_of(project_of(store, ops={"url": url, "secret": "HOOK_SECRET", **more}))
    found.turn()
    return found


def deliverer_of(project: Project) -> Deliverer:
    return Deliverer(project.store, project.settings.name, project.settings.webhooks, print)

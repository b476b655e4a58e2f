"""A real uvicorn on a free port of 127.0.0.1, over the rollout tests' scene and a fake engine."""

import contextlib
import secrets
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.postgresql_server import moved_to_postgresql
from tests.rollout.conftest import begin, copied, made, scene, versions
from tests.server.fake_engine import FakeEngine
from tests.waiting import SECONDS
from tunesmith.core.text.names import Scope
from tunesmith.registry.versions import Version, list_versions
from tunesmith.rollout.served_scorers import served_scorers
from tunesmith.rollout.state import Rollout, get_rollout
from tunesmith.server.answering.work import AnsweringThreads
from tunesmith.server.app import create_app
from tunesmith.server.limits import ServerSettings
from tunesmith.server.listening import DrainingServer
from tunesmith.server.serving import Serving
from tunesmith.store import database
from tunesmith.store.audit import revision
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.tables import RequestRow

__all__ = ["made", "scene", "versions"]

SCHEMA = {"type": "object", "required": ["intent"]}
CERTIFICATES = ssl.create_default_context()  # read once, and not in 14 ms for each client
HELLO: list[Any] = [{"role": "user", "content": "switch on the lamp"}]


@dataclass
class Served:
    """A running server, and what its tests look at."""

    url: str
    token: str
    scene: Scene
    engine: FakeEngine
    worker: AnsweringThreads
    serving: Serving
    app: FastAPI
    stop: Callable[[], None]

    def client(self, token: str | None = None, retries: int = 0) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=token or self.token,
            max_retries=retries,
            timeout=120,
            http_client=openai.DefaultHttpxClient(verify=CERTIFICATES),
        )

    def http(self, token: str | None = None) -> httpx.Client:
        """A plain one."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, verify=CERTIFICATES)

    def ask(self, **more: Any) -> Any:
        """One completion of the champion."""
        return self.client().chat.completions.create(**{"model": NAME, "messages": HELLO, **more})

    def get(self, path: str, token: str | None = None, **query: Any) -> httpx.Response:
        """What is at an address."""
        with self.http(token) as http:
            return http.get(path, params=query)

    def send(self, path: str, body: Any, token: str | None = None) -> httpx.Response:
        """The answer to a document that is posted."""
        with self.http(token) as http:
            return http.post(path, json=body)

    def post(self, token: str | None = None, **body: Any) -> httpx.Response:
        """One request, as it is."""
        return self.send("/v1/chat/completions", {"model": NAME, "messages": HELLO, **body}, token)

    def feedback(self, request: str, token: str | None = None, **given: Any) -> httpx.Response:
        """What somebody says of an answer."""
        return self.send("/api/feedback", {"request_id": request, **given}, token)

    def person(self, name: str, *roles: str, tenant: str = "", region: str = "", groups: Sequence[str] = ()) -> str:
        """A token of a new user."""
        add_user(self.scene.store, name, roles, actor=OWNER, scope=Scope(tenant, region), groups=groups)
        return issue_token(self.scene.store, name, actor=OWNER)

    def change(self, **settings: Any) -> None:
        """Set limits of the running server, for the requests that come from now on."""
        changed = self.serving.settings.model_copy(update=settings)
        self.serving.settings = self.worker._settings = changed

    def rows(self) -> list[RequestRow]:
        """What was recorded, oldest first."""
        with database.reading(self.scene.store.engine) as session:
            return list(session.query(RequestRow).order_by(RequestRow.at))

    def begin(self, version: Version, *steps: dict[str, Any], **more: Any) -> Rollout:
        """Start a rollout."""
        return begin(self.scene, version, *steps, **{"name": version.name, **more})

    def paused(self, version: Version, weight: int) -> Rollout:
        """A rollout that waits at the canary's weight."""
        rollout = self.begin(version, {"setWeight": weight}, {"pause": {}}, {"setWeight": 100})
        return self.until(rollout, lambda now: now.status == "paused")

    def until(self, rollout: Rollout, done: Callable[[Rollout], bool]) -> Rollout:
        """Wait for the server's controller."""
        end = time.monotonic() + SECONDS
        while not done(now := get_rollout(self.scene.store, rollout.id)):
            assert time.monotonic() < end, f"still {now.status} at step {now.step}: {now.reason}"
            time.sleep(0.02)
        return now


StartServer = Callable[..., Served]


@contextlib.contextmanager
def running(scene: Scene, engine: Any, **settings: Any) -> Iterator[Served]:
    """A server with these settings. engine: a FakeEngine or a TinyEngine."""
    schema, root = settings.pop("answer_schema", SCHEMA), settings.pop("root", Path())
    parts = {name: settings.pop(name, None) for name in ("project", "keeper", "holder")}
    scorers = served_scorers(settings.pop("scorers", ("json_valid", "exact_match")), schema, root)
    bounds = ServerSettings.model_validate({"check_seconds": 0.05, "grace_seconds": 2, **settings})
    app = create_app(Serving(scene.store, engine, engine, bounds, scorers=scorers, **parts))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = DrainingServer(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)

    def stop() -> None:
        """Do what SIGTERM does, and wait for the end."""
        if not server.should_exit:
            server.handle_exit(signal.SIGTERM, None)
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not stop"

    # A name of its own: a test that makes tokens over HTTP must not replace the one that other tests use.
    token = issue_token(scene.store, OPERATOR, actor=OPERATOR, name=f"tests-{secrets.token_hex(4)}")
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Served(url, token, scene, engine, app.state.serving.worker, app.state.serving, app, stop)
    finally:
        engine.gate.set()
        stop()


@pytest.fixture
def engine(scene: Scene) -> FakeEngine:
    return FakeEngine(scene.base)


@pytest.fixture
def served(scene: Scene, versions: dict[int, Version], engine: FakeEngine) -> Iterator[Served]:
    """A server whose champion is version 1."""
    with running(scene, engine) as server:
        server.begin(versions[1])
        yield server


@contextlib.contextmanager
def starting(scene: Scene, versions: dict[int, Version], engine: FakeEngine) -> Iterator[StartServer]:
    """A function that starts such a server with settings. The first one gets the champion."""
    servers: list[Served] = []
    with contextlib.ExitStack() as stack:

        def started(**settings: Any) -> Served:
            servers.append(stack.enter_context(running(scene, settings.pop("answers_by", engine), **settings)))
            if len(servers) == 1:
                servers[0].begin(versions[1])
            return servers[-1]

        yield started


@pytest.fixture
def start_server(scene: Scene, versions: dict[int, Version], engine: FakeEngine) -> Iterator[StartServer]:
    with starting(scene, versions, engine) as started:
        yield started


@pytest.fixture
def tiny(scene: Scene, start_server: StartServer, tmp_path: Path) -> Served:
    """The same answering by a tiny random model."""
    from tests.server.tiny_engine import TinyEngine

    return start_server(answers_by=TinyEngine(scene.base, tmp_path / "tiny"))


@contextlib.contextmanager
def running_copy(made: Scene, folder: Path, **settings: Any) -> Iterator[Served]:
    """The same over a copy of a scene in a folder, for several tests."""
    copy = copied(made, folder / "store")
    with running(copy, FakeEngine(copy.base), **settings) as server:
        server.begin(list_versions(copy.store)[0])
        yield server


@pytest.fixture(scope="session")
def _unchanged(made: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # It runs until the last test, and 20 checks a second would take 5% of a core for so long.
    with running_copy(made, tmp_path_factory.mktemp("shared"), check_seconds=2) as server:
        yield server


@pytest.fixture
def shared(_unchanged: Served) -> Iterator[Served]:
    """One server for all tests that only ask and are refused. Fails the test that changes its state."""
    before = revision(_unchanged.scene.store.engine)
    yield _unchanged
    assert revision(_unchanged.scene.store.engine) == before, "take `served`: other tests use this server too"


@pytest.fixture(params=["sqlite", "postgresql"])
def serving(
    request: pytest.FixtureRequest, made: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """A scene whose champion is version 1, on each kind of database."""
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    scene = copied(made, tmp_path / "store")
    if request.param == "postgresql":
        scene.store = moved_to_postgresql(scene.store, str(request.getfixturevalue("postgresql")))
    begin(scene, list_versions(scene.store)[0])
    yield scene
    scene.store.engine.dispose()

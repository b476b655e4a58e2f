"""A server whose database is full, locked or gone: answers are sent all the same, and /readyz says what is wrong."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.fabricate import OWNER, Scene
from tests.postgresql_server import Mortal, moved_to_postgresql
from tests.rollout.conftest import copied
from tests.server.conftest import Served, engine, made, running, scene, served, versions
from tests.server.fake_engine import FakeEngine
from tests.waiting import until
from tunesmith.core.errors import TunesmithError
from tunesmith.registry.versions import list_versions
from tunesmith.server import limits
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import Router
from tunesmith.store import database

__all__ = ["engine", "made", "scene", "served", "versions"]


def fill(scene: Scene) -> None:
    """Let the database have no more pages than it has now."""
    with database.reading(scene.store.engine) as session:
        pages = session.execute(text("PRAGMA page_count")).scalar()
    scene.store.engine.dispose()
    event.listen(scene.store.engine, "connect", lambda made, _: made.execute(f"PRAGMA max_page_count={pages}"))


def unrecorded(served: Served) -> float:
    lines = served.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("tunesmith_unrecorded_requests_total"))


@pytest.mark.attack("crash", "the server's database is full", "answered, and counted as not recorded")
def test_a_full_database_withholds_no_answer(served: Served) -> None:
    first = served.ask().id
    fill(served.scene)
    sent = 0
    while not unrecorded(served):
        assert served.post().status_code == 200
        sent += 1
        assert sent < 300, "the database never became full"
    assert served.post(stream=True).text.endswith("data: [DONE]\n\n")
    assert unrecorded(served) >= 2
    assert not served.worker.answering()
    scores = [{f"{'m' * 58}_{turn:02}_{place:02}": 0.5 for place in range(limits.SCORES)} for turn in range(9)]
    answer = [served.feedback(first, score=each) for each in scores][-1]  # the first ones may fit into free pages
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (507, "server_error", "storage_full")
    assert "operator must free space" in error["message"]
    assert not served.rows()[0].scores.keys() & scores[-1].keys(), "nothing was stored"


@pytest.mark.attack("crash", "another process locks the server's database", "answered, and counted as not recorded")
def test_a_locked_database_withholds_no_answer(served: Served) -> None:
    first = served.ask().id
    store = served.scene.store
    store.engine.dispose()
    event.listen(store.engine, "connect", lambda made, _: made.execute("PRAGMA busy_timeout=100"))
    other = sqlite3.connect(store.root / "tunesmith.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        assert served.post().status_code == 200
        assert served.post(stream=True).text.endswith("data: [DONE]\n\n")
        given = served.feedback(first, score={"helpful": 1.0})
        code = given.json()["error"]["code"]
        assert (given.status_code, given.headers["retry-after"], code) == (503, "5", "storage_failed")
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert unrecorded(served) == 2


@pytest.mark.attack("crash", "the record of a request fails in a way that nobody foresaw", "answered, 200 and 500")
@pytest.mark.parametrize("stream", [False, True])
def test_no_error_of_the_record_withholds_an_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Recorder, "write", fails)
    assert served.post(stream=stream).status_code == 200
    served.engine.answer = fails
    assert served.post(stream=stream).status_code == 500


@pytest.mark.attack("crash", "a request while the server's database is gone, or goes while the request waits")
def test_a_request_without_a_database_is_told_to_try_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask()

    def away(*_: Any) -> None:
        raise TunesmithError("the database cannot be used: the server closed the connection")

    for times in (1, 2):  # at the first look, and at the one when the request's turn has come
        calls, caller = iter(range(9)), Router.caller

        def until(self: Router, token: str, calls: Any = calls, times: int = times, caller: Any = caller) -> Any:
            return away() if next(calls) == times - 1 else caller(self, token)

        with monkeypatch.context() as patch:
            patch.setattr(Router, "caller", until)
            patch.setattr(Router, "known_caller", lambda *_: None)
            answer = served.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"] == "5"
        assert "connection" not in answer.text
    assert [row.ok for row in served.rows()] == [True], "an arm was blamed"


@pytest.mark.attack("crash", "the server's database is gone", "503, database: false")
def test_readyz_says_that_the_database_is_gone(served: Served) -> None:
    root = served.scene.store.root
    served.scene.store.engine.dispose()
    moved = root.rename(root.with_name("moved"))
    try:
        answer = served.get("/readyz")
    finally:
        moved.rename(root)
    assert (answer.status_code, answer.json()["database"]) == (503, False)


@pytest.mark.slow
@pytest.mark.attack("crash", "PostgreSQL is stopped at once under a server, and started again")
def test_a_server_outlasts_a_postgresql_that_is_stopped_at_once(
    made: Scene, mortal: Mortal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    copy = copied(made, tmp_path / "store")
    copy.store = moved_to_postgresql(copy.store, mortal.url)
    with running(copy, FakeEngine(copy.base)) as served:
        served.begin(list_versions(copy.store)[0])
        assert served.post().status_code == 200
        mortal.stop_at_once()
        refused, ready = [served.post(), *map(served.get, ("/api/rollouts", "/v1/models"))], served.get("/readyz")
        mortal.start()
        assert [answer.status_code for answer in refused] == [503] * 3, [answer.text for answer in refused]
        assert {answer.json()["error"]["code"] for answer in refused} == {"unavailable"}
        assert (ready.status_code, ready.json()["database"]) == (503, False)
        assert served.post().status_code == 200
        until(lambda: served.get("/readyz").status_code == 200)
    copy.store.engine.dispose()

"""Rows that are appended past SQLAlchemy's sessions: the same values, errors and fences."""

import sqlite3
from typing import Any

import pytest
from sqlalchemy import delete, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import MemoRow, RequestRow

FULL = 2


def row(number: str, **changes: Any) -> dict[str, Any]:
    """The columns of a request."""
    found = {"id": number, "at": stamp(), "name": "home", "tenant": "", "region": "", "caller": "olive", "end_user": ""}
    found |= {"version": "sha256:0", "rollout": None, "arm": "stable", "ok": True, "cut": False, "seconds": 0.25}
    found |= {"prompt_tokens": 3, "completion_tokens": 2, "scores": {"é": 1.0}, "features": {"characters": 4.0}}
    return {**found, **changes}


def test_appended_rows_are_read_as_they_were_given(store: Store) -> None:
    rows = [row("a"), row("b", rollout=7, ok=False, scores={})]
    database.append(store.engine, RequestRow, rows)
    with store.writing() as session:
        assert session.execute(text("PRAGMA synchronous")).scalar_one() == FULL, (
            "what must not be lost waits for the disk"
        )
        read = session.scalars(select(RequestRow).order_by(RequestRow.id))
        assert [{key: getattr(one, key) for key in rows[0]} for one in read] == rows
    database.checkpoint(store.engine)
    with sqlite3.connect(f"file:{store.engine.url.database}?immutable=1", uri=True) as without_log:
        assert without_log.execute("select count(*) from requests").fetchone() == (2,)


def test_a_row_that_does_not_fit_appends_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    database.append(store.engine, RequestRow, [row("a")])
    with pytest.raises(IntegrityError) as raised:
        database.append(store.engine, RequestRow, [row("b"), row("a", name="secret-name")])
    assert "secret-name" not in str(raised.value)
    database.append(store.engine, RequestRow, [row("c")])
    store.engine.dispose()
    with monkeypatch.context() as patch:
        patch.setattr(database, "_DIRECT_PRAGMAS", ("max_page_count=1",))  # no more than it has now
        with pytest.raises(TunesmithError, match="disk is full"):
            database.append(store.engine, RequestRow, [row(str(number)) for number in range(500)])
    with store.reading() as session:
        assert sorted(session.scalars(select(RequestRow.id))) == ["a", "c"]


def test_the_log_is_emptied_while_connections_are_open_and_waits_for_nobody(store: Store) -> None:
    """It may hold texts that were deleted from the tables."""
    log = store.root / "tunesmith.db-wal"
    database.append(store.engine, RequestRow, [row("secret-of-anna")])
    assert b"secret-of-anna" in log.read_bytes()
    with store.writing() as session:
        session.execute(delete(RequestRow))
    with store.writing():  # a writer keeps the log, and is not waited for
        database.empty_log(store.engine)
    database.empty_log(store.engine)
    assert log.read_bytes() == b""
    assert b"secret-of-anna" not in (store.root / "tunesmith.db").read_bytes()
    database.append(store.engine, RequestRow, [row("a")])
    store.engine.dispose()
    assert not log.exists()
    database.append(store.engine, RequestRow, [row("b")])


def test_a_fence_holds_for_appended_rows(store: Store) -> None:
    def fence(_session: Session) -> None:
        raise Refused("the job is another worker's now")

    with pytest.raises(Refused):
        database.append(database.fenced(store.engine, fence), MemoRow, [{"key": "k", "digest": "d"}])
    with store.reading() as session:
        assert session.scalars(select(MemoRow)).all() == []

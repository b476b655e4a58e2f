"""The store's tests against a real PostgreSQL server: transactions, the audit log, users and locks."""

import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.forked import forkserver
from tests.postgresql_server import empty_database
from tests.store.test_audit import (  # noqa: F401
    test_any_json_survives_the_way_through_the_database,
    test_the_next_entry_does_not_hide_a_cut_tail,
    test_two_processes_write_one_chain,
)
from tests.store.test_identities import test_many_first_comers_make_one_owner  # noqa: F401
from tests.store.test_locks import test_a_killed_owner_loses_the_lock_at_once  # noqa: F401
from tests.store.test_tokens import (  # noqa: F401
    owned,
    test_a_name_is_free_again_once_its_token_has_ended,
)
from tests.store.test_until_changed import test_a_value_is_kept_until_another_process_changes_the_store  # noqa: F401
from tests.store.test_uploads import (  # noqa: F401
    test_bytes_that_a_killed_upload_left_are_removed,
    test_files_are_kept_listed_and_deleted,
)
from tunesmith.core.errors import TunesmithError
from tunesmith.store import audit, database
from tunesmith.store.store import Store


@pytest.fixture
def store(postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store whose tables are in PostgreSQL."""
    empty_database(postgresql)
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", postgresql)
    store = Store(tmp_path / "store")
    assert store.engine.dialect.name == "postgresql"
    yield store
    store.engine.dispose()


def change(store: Store, action: str) -> None:
    with store.change("olive", action, "x", {}):
        pass


def hang(root: Path, url: str, said: Connection) -> None:
    """Stop, as a machine that is suspended, inside a write transaction; afterwards say what comes of it."""
    database._BEGIN_WRITE = database._BEGIN_WRITE.replace("'30min'", "'1s'")
    store = Store(root, url)
    try:
        with store.change("olive", "test.hang", "x", {}):
            said.send("inside")
            os.kill(os.getpid(), signal.SIGSTOP)
    except TunesmithError as error:
        said.send(error.what)
    change(store, "test.after")
    said.send("written")


def test_a_process_that_hangs_in_a_transaction_does_not_stop_the_others_for_ever(store: Store) -> None:
    assert store.engine
    here, there = forkserver().Pipe()
    process = forkserver().Process(target=hang, args=(store.root, store.url, there))
    process.start()
    try:
        assert here.poll(120)
        assert here.recv() == "inside"
        other = threading.Thread(target=change, args=(store, "test.other"), daemon=True)
        other.start()
        other.join(120)
        assert not other.is_alive(), "it waits for the process that hangs"
        assert process.pid
        os.kill(process.pid, signal.SIGCONT)
        assert here.poll(300)
        assert "database cannot be used" in here.recv()
        assert here.poll(300)
        assert here.recv() == "written"
    finally:
        process.kill()
        process.join()
    with store.reading() as session:
        assert [entry.action for entry in audit.entries(session)] == ["test.other", "test.after"]

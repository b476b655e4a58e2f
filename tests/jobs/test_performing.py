"""Performing a job in this process: what is recorded when it ends, fails, is stopped, or is taken back meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import update

from tests.jobs.conftest import SetClock
from tests.jobs.test_queue import add, log
from tests.waiting import until
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.progress import Stopped
from tunesmith.jobs import leases, performing, queue
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow

STEPS = 10_000


@pytest.fixture
def lease(store: Store, clock: SetClock) -> Lease:
    clock.at = time.time()
    add(store, clock)
    taken = leases.claim(store, "w", ["run"], project="p")
    assert taken is not None
    return taken


def endless(progress: JobProgress) -> Outcome:
    """Work that ends only when it is stopped."""
    with progress.task("counting", STEPS) as task:
        for _ in range(STEPS):
            task.note("still counting")
            task.advance()
            time.sleep(0.005)
    raise AssertionError("it was not stopped")


def ended(store: Store, lease: Lease, work: Callable[[JobProgress], Outcome]) -> threading.Thread:
    """A thread that performs the job and expects that it is stopped."""

    def run() -> None:
        with pytest.raises((Stopped, LeaseLost)):
            perform(store, lease, work)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_result_log_and_error_are_kept(store: Store, lease: Lease) -> None:
    def work(progress: JobProgress) -> Outcome:
        progress.say("half of it")
        return Outcome({"n": 1}, {"code": "verdict_fail", "what": "too few"})

    perform(store, lease, work)
    job = queue.get(store, lease.job)
    assert (job.state, job.result, job.error["code"]) == ("failed", {"n": 1}, "verdict_fail")
    assert log(store, lease.job) == ["started by w", "half of it", "failed: too few"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Refused("no", where="here", fix="do it"), "failed", "refused"),
        (TunesmithError("the disk is full"), "queued", "failed"),
        (ZeroDivisionError("by zero"), "queued", "internal"),
        (KeyboardInterrupt(), "failed", "interrupted"),
    ],
)
def test_errors_are_recorded_and_raised(
    store: Store, lease: Lease, error: BaseException, state: str, code: str
) -> None:
    def work(_: JobProgress) -> Outcome:
        raise error

    with pytest.raises(type(error)):
        perform(store, lease, work)
    job = queue.get(store, lease.job)
    assert (job.state, job.error["code"]) == (state, code)
    assert (code == "internal") == any("Traceback" in line for line in log(store, lease.job))


def test_a_lock_that_another_process_holds_puts_the_job_back(store: Store, lease: Lease) -> None:
    def work(_: JobProgress) -> Outcome:
        with store.lock("stage", "the training"):
            raise AssertionError

    with store.lock("stage", "a run in a terminal"), pytest.raises(TunesmithError, match="at work here"):
        perform(store, lease, work)
    job = queue.get(store, lease.job)
    assert (job.state, job.attempts) == ("queued", 0)
    assert job.due > time.time()


@pytest.mark.parametrize("asked", ["paused", "cancelled"])
def test_what_a_person_asks_for_reaches_into_a_step(
    store: Store, lease: Lease, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performing, "_BEAT", 0.05)
    thread = ended(store, lease, endless)
    until(lambda: queue.get(store, lease.job).progress.get("seconds_left"))
    shown = queue.get(store, lease.job).progress
    assert (shown["step"], shown["total"], shown["note"]) == ("counting", STEPS, "still counting")
    {"paused": queue.pause, "cancelled": queue.cancel}[asked](store, lease.job, actor="olive")
    thread.join(300)
    assert queue.get(store, lease.job).state == asked


def test_work_whose_lease_was_taken_back_stops_and_records_nothing(
    store: Store, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performing, "_BEAT", 0.05)
    thread = ended(store, lease, endless)
    other = Store(store.root)
    until(lambda: queue.get(other, lease.job).progress)
    with database.writing(other.engine) as session:  # as if the lease had run out
        session.execute(update(JobRow).values(state="queued", fence=JobRow.fence + 1, until=None))
    new = leases.claim(other, "second", ["run"], project="p")
    assert new is not None
    thread.join(300)
    assert not thread.is_alive()
    job = queue.get(other, lease.job)
    assert (job.state, job.worker, job.fence) == ("running", "second", new.fence)


def test_a_worker_that_stops_puts_the_job_back_at_once(store: Store, lease: Lease) -> None:
    stopping = threading.Event()

    def work(progress: JobProgress) -> Outcome:
        stopping.set()
        return endless(progress)

    with pytest.raises(Stopped):
        perform(store, lease, work, stopping=stopping)
    job = queue.get(store, lease.job)
    assert (job.state, job.attempts) == ("queued", 0)

"""Jobs and leases: order, idempotency keys, retries, fencing, what people ask for; performing a job in this process."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, update

from tests.jobs.conftest import SetClock
from tests.waiting import until
from tunesmith.core.errors import Forbidden, Refused, TunesmithError, UsageError
from tunesmith.core.progress import Stopped
from tunesmith.jobs import leases, performing, queue
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.jobs.queue import JobError
from tunesmith.store import audit
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, JobRow, MemoRow

ERROR = JobError(code="failed", what="the disk is full")


def add(store: Store, **options: Any) -> JobRow:
    return queue.add(store, "run", {"n": 1}, **{"project": "p", "actor": "olive", **options})


def claim(store: Store, worker: str = "w", project: str = "p") -> Lease | None:
    return leases.claim(store, worker, ["run"], project=project, seconds=10)


def claimed(store: Store, worker: str = "w") -> Lease:
    lease = claim(store, worker)
    assert lease is not None
    return lease


def log(store: Store, number: int) -> list[str]:
    return [line.message for line in queue.events(store, number)]


def at_once(count: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda _: work(), range(count)))


def test_the_highest_priority_is_taken_first_and_then_the_oldest(store: Store, clock: SetClock) -> None:
    numbers = [add(store, priority=priority).id for priority in (0, 5, 0, 5, -1)]
    assert claim(store, project="other") is None
    taken = [claimed(store).job for _ in numbers]
    assert taken == [numbers[place] for place in (1, 3, 0, 2, 4)]
    assert claim(store) is None


def test_a_clock_that_is_set_back_keeps_no_job_waiting(store: Store, clock: SetClock) -> None:
    number = add(store).id
    clock.at -= 3600
    assert claimed(store).job == number


def test_jobs_of_a_kind_that_is_gone_end_with_a_reason(store: Store, clock: SetClock) -> None:
    gone = [queue.add(store, "distil", {"n": 1}, project=name, actor="olive").id for name in "ppo"]
    number = add(store, priority=-1).id
    assert claimed(store).job == number
    for each in gone[:2]:
        job = queue.get(store, each)
        assert (job.state, job.attempts, job.ended, job.error["code"]) == ("failed", 0, clock.at, "unknown_kind")
        assert job.error["what"] == "jobs of the kind distil are no longer performed"
        assert "performs run" in job.error["fix"]
        assert log(store, each) == [f"failed: {job.error['what']}"]
    assert queue.get(store, gone[2]).state == "queued", "it is another project's"
    with store.reading() as session:
        ends = [entry.subject for entry in audit.entries(session) if entry.action == "job.end"]
        assert ends == [f"job {each}" for each in gone[:2]]


def test_an_idempotency_key_gives_the_same_job_again(store: Store, clock: SetClock) -> None:
    first = add(store, key="k")
    assert add(store, key="k").id == first.id
    assert add(store, key="l").id != first.id
    with pytest.raises(UsageError, match="other arguments"):
        queue.add(store, "run", {"n": 2}, project="p", actor="olive", key="k")
    identities.add_user(store, "eve", ["engineer"], actor="olive")
    assert add(store, key="k", actor="eve").id != first.id, "each person has keys of their own"
    for key in ("", "x" * 129, "a\nb"):
        with pytest.raises(UsageError, match="idempotency key"):
            add(store, key=key)
    assert len(queue.list_jobs(store)) == 3


def test_many_at_once_make_one_job_of_a_key_and_take_each_job_once(store: Store, clock: SetClock) -> None:
    found, taken = list[int](), list[int]()
    at_once(6, lambda: found.append(add(store, key="k").id))
    assert (len(found), len(set(found))) == (6, 1)
    numbers = {found[0], *(add(store).id for _ in range(11))}

    def work() -> None:
        while (lease := claim(store)) is not None:
            taken.append(lease.job)

    at_once(4, work)
    assert sorted(taken) == sorted(numbers)


def test_a_lease_that_ran_out_goes_to_another_worker_and_the_first_can_record_nothing(
    store: Store, clock: SetClock
) -> None:
    number = add(store).id
    old = claimed(store, "first")
    clock.at += 9
    leases.renew(store, old, {})
    clock.at += 9
    assert claim(store, "second") is None, "it was renewed"
    clock.at += 2
    new = claimed(store, "second")
    assert new.job == number
    assert new.fence > old.fence
    for attempt in (
        lambda: leases.renew(store, old, {}),
        lambda: leases.log(store, old, "still here"),
        lambda: leases.finish(store, old, {"by": "first"}),
        lambda: leases.fail(store, old, ERROR, retry=True),
        lambda: leases.stop(store, old, "stop"),
    ):
        with pytest.raises(LeaseLost):
            attempt()
    leases.finish(store, new, {"by": "second"})
    with pytest.raises(LeaseLost):
        leases.finish(store, new, {"by": "second again"})
    assert queue.get(store, number).result == {"by": "second"}
    assert "still here" not in log(store, number)


def test_a_fenced_store_writes_nothing_once_the_lease_is_lost(store: Store, clock: SetClock) -> None:
    add(store)
    old = claimed(store)
    with store.fenced(lambda session: leases.check(session, old)):
        store.keep_memo("before", "x")
        clock.at += 11
        other = Store(store.root)  # another worker's
        assert claim(other, "second") is not None
        with pytest.raises(LeaseLost):
            store.keep_memo("after", "x")
        with pytest.raises(LeaseLost), store.change("olive", "test.effect", "x", {}):
            pass
    store.keep_memo("unfenced", "x")
    with store.reading() as session:
        assert set(session.scalars(select(MemoRow.key))) == {"before", "unfenced"}
        assert "test.effect" not in set(session.scalars(select(AuditRow.action)))


def test_errors_are_tried_again_later_and_later_until_no_attempt_is_left(store: Store, clock: SetClock) -> None:
    number = add(store, attempts=3).id
    waited = []
    for _ in range(3):
        lease = claimed(store)
        leases.fail(store, lease, ERROR, retry=True)
        job = queue.get(store, number)
        waited.append(job.due - clock.at if job.state == "queued" else job.state)
        assert claim(store) is None
        clock.at = max(clock.at, job.due)
    assert waited == [10.0, 20.0, "failed"]
    assert queue.get(store, number).error == {"code": "failed", "what": "the disk is full"}
    final, vanishing = add(store, priority=1).id, add(store, attempts=2).id
    leases.fail(store, claimed(store), ERROR, retry=False)
    assert queue.get(store, final).state == "failed"
    for _ in range(2):
        claimed(store)
        clock.at += 11
    assert claim(store) is None
    assert queue.get(store, vanishing).error["code"] == "worker_lost"


def test_stopping_a_worker_uses_up_no_attempt(store: Store, clock: SetClock) -> None:
    number = add(store, attempts=1).id
    for _ in range(3):
        leases.stop(store, claimed(store), "told to")
    leases.stop(store, claimed(store), "somebody works on it", busy=True)
    assert claim(store) is None, "not at once"
    clock.at += 6
    leases.finish(store, claimed(store), {})
    assert queue.get(store, number).state == "succeeded"


def test_what_people_ask_for(store: Store, clock: SetClock) -> None:
    number = add(store).id
    identities.add_user(store, "ann", ["approver"], actor="olive")
    for command in (queue.cancel, queue.pause, queue.resume):
        with pytest.raises(Refused, match="may not do this"):
            command(store, number, actor="ann")
    with pytest.raises(Refused, match="may not do this"):
        add(store, actor="ann")
    assert queue.pause(store, number, actor="olive").state == "paused"
    assert claim(store) is None
    with pytest.raises(Refused, match="paused already"):
        queue.pause(store, number, actor="olive")
    assert queue.resume(store, number, actor="olive").state == "queued"
    with pytest.raises(Refused, match="not paused"):
        queue.resume(store, number, actor="olive")
    lease = claimed(store)
    assert queue.pause(store, number, actor="olive").wanted == "paused"
    assert leases.renew(store, lease, {}) == "paused"
    leases.stop(store, lease, "stop")
    assert queue.get(store, number).state == "paused"
    queue.resume(store, number, actor="olive")
    lease = claimed(store)
    assert queue.cancel(store, number, actor="olive").wanted == "cancelled"
    with pytest.raises(Refused, match="cancelled already"):
        queue.pause(store, number, actor="olive")
    clock.at += 11
    assert claim(store) is None, "a job to be cancelled is not tried again"
    assert queue.get(store, number).state == "cancelled"
    with pytest.raises(Refused, match="has ended"):
        queue.cancel(store, number, actor="olive")
    with pytest.raises(UsageError, match="no job 99"):
        queue.cancel(store, 99, actor="olive")
    with store.reading() as session:
        assert audit.verify(session) == []
        actions = list(session.scalars(select(AuditRow.action).order_by(AuditRow.seq)))
    changes = ["pause", "resume", "pause", "resume", "cancel", "end"]
    assert actions == ["user.add", "job.add", "user.add", *(f"job.{change}" for change in changes)]


def test_a_job_that_a_person_performs_is_taken_on_by_nobody(store: Store, clock: SetClock) -> None:
    lease = leases.begin(store, "here", "run", {}, project="p", actor="olive", seconds=10)
    clock.at += 11
    assert claim(store) is None
    assert queue.get(store, lease.job).error["code"] == "worker_lost"
    identities.add_user(store, "otto", ["operator"], actor="olive")
    with pytest.raises(Forbidden, match="otto may not do this"):
        leases.begin(store, "here", "run", {}, project="p", actor="otto")


def test_pages_of_the_list(store: Store, clock: SetClock) -> None:
    numbers = [add(store).id for _ in range(5)]
    assert [job.id for job in queue.list_jobs(store, most=2)] == numbers[:2:-1]
    assert [job.id for job in queue.list_jobs(store, before=numbers[3], most=2)] == [numbers[2], numbers[1]]
    assert queue.list_jobs(store, queue.JobFilter(["failed"])) == []


STEPS = 10_000


@pytest.fixture
def lease(store: Store, olive: None) -> Lease:
    add(store)
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
        return Outcome({"n": 1}, JobError(code="verdict_fail", what="too few"))

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
    with other.writing() as session:  # as if the lease had run out
        session.execute(update(JobRow).values(state="queued", fence=JobRow.fence + 1, until=None))
    new = leases.claim(other, "second", ["run"], project="p")
    assert new is not None
    thread.join(300)
    assert not thread.is_alive()
    job = queue.get(other, lease.job)
    assert (job.state, job.worker, job.fence) == ("running", "second", new.fence)

"""The queue under every order of workers, people and pauses that hypothesis thinks of."""

import contextlib
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.jobs.conftest import SetClock
from tunesmith.core.errors import Refused
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.queue import ENDED, JobError
from tunesmith.store import audit
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow

ATTEMPTS = 3
_projects = count()


def values(job: JobRow) -> dict[str, Any]:
    return {column.name: getattr(job, column.name) for column in JobRow.__table__.columns}


class Machine(RuleBasedStateMachine):
    """Workers hold leases, the newest of each job and older ones, and try to record things with any of them."""

    store: Store
    clock: SetClock

    @initialize()
    def set_out(self) -> None:
        self.clock.at = 1000.0
        self.project = f"p{next(_projects)}"  # so that one store serves all examples
        self.held: list[Lease] = []
        self.newest: dict[int, int] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        self.finished: list[int] = []
        self.added: set[int] = set()

    def jobs(self) -> list[JobRow]:
        return [queue.get(self.store, number) for number in sorted(self.added)]

    @rule(priority=st.integers(-1, 1), key=st.sampled_from([None, None, "a", "b"]))
    def add(self, priority: int, key: str | None) -> None:
        job = queue.add(
            self.store, "run", {}, project=self.project, actor="olive", priority=priority,
            key=key and f"{self.project}-{key}", attempts=ATTEMPTS,
        )  # fmt: skip
        assert key is not None or job.id not in self.added
        self.added.add(job.id)

    @rule()
    def claim(self) -> None:
        before = self.jobs()
        lease = leases.claim(self.store, "w", ["run"], project=self.project, seconds=10)
        lost = [job for job in before if job.state == "running" and (job.until or 0) < self.clock.at]
        due = [job for job in before if job.state == "queued" and job.due <= self.clock.at]
        due += [job for job in lost if not job.wanted and job.attempts < ATTEMPTS]
        if not due:
            assert lease is None
            return
        assert lease is not None
        assert lease.job == min(due, key=lambda job: (-job.priority, job.id)).id
        assert lease.fence > self.newest.get(lease.job, 0)
        self.newest[lease.job] = lease.fence
        self.held.append(lease)

    @rule(
        which=st.integers(0, 5),
        what=st.sampled_from(["renew", "log", "finish", "finish", "fail", "retry", "stop", "busy"]),
    )
    def record(self, which: int, what: str) -> None:
        if not self.held:
            return
        lease = self.held[-1 - which % len(self.held)]
        job = queue.get(self.store, lease.job)
        holds = job.state == "running" and job.fence == lease.fence
        store, clock = self.store, self.clock
        with contextlib.nullcontext() if holds else pytest.raises(LeaseLost):
            if what == "renew":
                assert leases.renew(store, lease, {"at": clock.at}) == job.wanted
            elif what == "log":
                leases.log(store, lease, "line")
            elif what == "finish":
                leases.finish(store, lease, {"fence": lease.fence})
                self.finished.append(lease.job)
            elif what in ("fail", "retry"):
                leases.fail(store, lease, JobError(code="x", what="y"), retry=what == "retry")
            else:
                leases.stop(store, lease, "told to", busy=what == "busy")
                now = queue.get(store, lease.job)
                assert now.state == (job.wanted or "queued")

    @rule(number=st.integers(0, 3), what=st.sampled_from(["cancel", "pause", "resume", "resume"]))
    def ask(self, number: int, what: str) -> None:
        if not self.added:
            return
        chosen = sorted(self.added)[number % len(self.added)]
        before = queue.get(self.store, chosen)
        change = {"cancel": queue.cancel, "pause": queue.pause, "resume": queue.resume}[what]
        with contextlib.suppress(Refused):
            after = change(self.store, chosen, actor="olive")
            assert before.state not in ENDED
            if what == "cancel":
                assert "cancelled" in (after.state, after.wanted)
            elif what == "pause":
                assert "paused" in (after.state, after.wanted)
            else:
                assert "paused" in (before.state, before.wanted)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0, 30.0, -20.0]))
    def wait(self, seconds: float) -> None:
        self.clock.at += seconds

    @invariant()
    def what_always_holds(self) -> None:
        assert len(self.finished) == len(set(self.finished)), "a job was finished twice"
        for job in self.jobs():
            assert 0 <= job.attempts <= ATTEMPTS
            assert (job.until is not None) == (job.state == "running")
            assert (job.ended is not None) == (job.state in ENDED)
            assert job.wanted == "" or job.state == "running"
            assert job.state != "succeeded" or job.id in self.finished
            assert self.ended.get(job.id, values(job)) == values(job), "an ended job changed"
            if job.state in ENDED:
                self.ended[job.id] = values(job)


def test_the_queue_holds_under_any_order_of_events(store: Store, clock: SetClock) -> None:
    made = type("StoredMachine", (Machine,), {"store": store, "clock": clock})
    examples = settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(made, settings=examples)
    with store.reading() as session:
        assert audit.verify(session) == []

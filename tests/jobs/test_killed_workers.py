"""Many jobs, several worker processes, and a `kill -9` again and again: no job is lost, and none ends twice."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.forked import forkserver
from tests.jobs.conftest import SetClock
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import LeaseLost
from tunesmith.store.store import Store

JOBS, WORKERS, KILLS = 24, 3, 6


def work(root: Path, url: str) -> None:
    """Take jobs and finish each, until this process is killed."""
    store = Store(root, url)
    while True:
        lease = leases.claim(store, "w", ["run"], project="p", seconds=1.0)
        if lease is None:
            time.sleep(0.05)
            continue
        with contextlib.suppress(LeaseLost):  # on a busy machine it may run out before the end
            leases.log(store, lease, "effect")
            time.sleep(0.2)
            leases.finish(store, lease, {"fence": lease.fence})


@pytest.mark.slow
@pytest.mark.attack("crash", "kill -9 of workers again and again")
def test_no_job_is_lost_or_ends_twice(store: Store, clock: SetClock) -> None:
    numbers = [queue.add(store, "run", {}, project="p", actor="olive", attempts=100).id for _ in range(JOBS)]
    url = store.engine.url.render_as_string(hide_password=False)
    chosen = random.Random(1)

    def started() -> BaseProcess:
        process = forkserver().Process(target=work, args=(store.root, url))
        process.start()
        return process

    workers, killed, deadline = [started() for _ in range(WORKERS)], 0, time.monotonic() + 600
    try:
        while left := queue.list_jobs(store, states=["queued", "running"], most=JOBS):
            assert time.monotonic() < deadline, f"{len(left)} jobs are left"
            time.sleep(0.05)
            if killed < KILLS and len(left) < JOBS * (KILLS - killed) / KILLS:  # spread over the jobs
                place = chosen.randrange(WORKERS)
                workers[place].kill()
                workers[place] = started()
                killed += 1
    finally:
        for process in workers:
            process.kill()
            process.join()
    assert killed >= KILLS // 2, "the workers were hardly disturbed: the test did not test"
    for number in numbers:
        job, lines = queue.get(store, number), Counter(line.message for line in queue.events(store, number))
        assert job.state == "succeeded"
        assert job.result == {"fence": job.fence}
        assert lines["succeeded"] == 1
        assert lines["effect"] <= job.attempts

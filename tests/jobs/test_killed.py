"""Jobs whose processes are killed again and again: none is lost, none ends twice, and each effect is there once."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event, update

from tests.acting import looking
from tests.forked import forkserver
from tests.server.fine_tuning_project import MODEL, OWNER, examples, write_fine_tuning_project
from tunesmith.core.text.names import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.fine_tuning import Arguments, Hyperparameters
from tunesmith.jobs.kinds import perform_job
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.queue import JobError, JobFilter
from tunesmith.project import Project
from tunesmith.registry.history import verify_log
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import list_versions
from tunesmith.services import jobs
from tunesmith.store import audit, database, uploads
from tunesmith.store.store import Store
from tunesmith.store.tables import FINE_TUNING, JobRow

pytestmark = pytest.mark.slow
JOBS, WORKERS, KILLS = 24, 3, 6
EVERY = 5  # effects after which an attempt is killed
# What an attempt writes again and again: log, locks and leases.
_REPEATED = ("job_events", "locks", "jobs SET until")


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


@pytest.mark.attack("crash", "kill -9 of workers again and again")
def test_no_job_is_lost_or_ends_twice(store: Store, olive: None) -> None:
    numbers = [queue.add(store, "run", {}, project="p", actor="olive", attempts=100).id for _ in range(JOBS)]
    url = store.engine.url.render_as_string(hide_password=False)
    chosen = random.Random(1)

    def started() -> BaseProcess:
        process = forkserver().Process(target=work, args=(store.root, url))
        process.start()
        return process

    workers, killed, deadline = [started() for _ in range(WORKERS)], 0, time.monotonic() + 600
    try:
        while left := queue.list_jobs(store, JobFilter(["queued", "running"]), most=JOBS):
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


def attempt(folder: Path, lease: Lease) -> None:
    """A worker's child that is killed after some of its transactions."""
    write, effects = database._write, 0

    @contextlib.contextmanager
    def counted(engine: Engine, *given: bool) -> Iterator[Connection]:
        nonlocal effects
        with write(engine, *given) as connection:
            statements: list[str] = []
            event.listen(connection, "before_cursor_execute", lambda *said: statements.append(said[2]))
            yield connection
        changes = [each for each in statements if each.startswith(("INSERT", "UPDATE", "DELETE"))]
        if any(not any(repeated in each for repeated in _REPEATED) for each in changes):
            effects += 1
            if effects == EVERY:
                os.kill(os.getpid(), signal.SIGKILL)

    database._write = counted
    perform_job(folder, lease)


@pytest.mark.attack("crash", "kill -9 of a fine-tuning job after every fifth effect")
def test_a_job_that_is_killed_again_and_again_has_each_effect_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setattr(leases, "_FIRST_DELAY", 0.0)
    folder = write_fine_tuning_project(tmp_path / "project")
    project = Project.load(folder)
    store = looking(project).store
    with store.scratch() as work:
        (work / "rows").write_bytes(examples())
        file = uploads.put(store, work / "rows", name="rows.jsonl", purpose="fine-tune", actor=OWNER, scope=Scope())
    asked = Arguments(settings="", model=MODEL, training_file=file.file, hyperparameters=Hyperparameters(n_epochs=1))
    number = jobs.add_fine_tuning(looking(project), asked).id
    with store.writing() as session:
        session.execute(update(JobRow).values(most_attempts=100))
    killed = 0
    while queue.get(store, number).ended is None:
        lease = leases.claim(store, "w", [FINE_TUNING], project="tiny")
        assert lease is not None
        process = forkserver().Process(target=attempt, args=(folder, lease))
        process.start()
        process.join(300)
        if queue.get(store, number).state == "running":
            assert process.exitcode == -signal.SIGKILL
            killed += 1
            leases.fail(store, lease, JobError(code="process_ended", what="killed"), retry=True)
    job = queue.get(store, number)
    assert job.state == "succeeded", job.error
    assert killed >= 3, "it was hardly disturbed: the test did not test"
    (version,) = list_versions(store)
    assert job.result[FINE_TUNING]["version"] == version.label
    assert verify_version(store, version.label).ok
    files = [each.file for each in uploads.list_files(store, Scope(), most=9, oldest_first=True)]
    assert files == [file.file, *job.result[FINE_TUNING]["result_files"]]
    with store.reading() as session:
        effects = Counter((entry.action, entry.subject) for entry in audit.entries(session))
    assert set(effects.values()) == {1}, effects.most_common(3)
    assert verify_log(store) == []

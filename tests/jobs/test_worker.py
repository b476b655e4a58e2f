"""The worker with real processes: a job whose process dies, and a whole project whose worker is killed."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acting import do, looking
from tests.commands import Forked, call
from tests.jobs.processes import obey
from tests.tiny_project import settings, write_project
from tests.waiting import SECONDS, gone, until
from tunesmith.api import Project
from tunesmith.jobs import leases, queue
from tunesmith.jobs.kinds import perform_job
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.places import HeldSlot, LocalPlace, divide, usable_cores
from tunesmith.jobs.worker import Worker
from tunesmith.services import jobs, training
from tunesmith.services.training import run_here
from tunesmith.store.store import Store


def places(root: Path) -> list[LocalPlace]:
    """Two places, or one where there is one core."""

    def start(lease: Lease, _held: HeldSlot) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=obey, args=(root, lease))
        process.start()
        return process

    cores = usable_cores()
    return [LocalPlace(slot, start) for slot in divide(min(2, len(cores)), cores, ())]


def test_each_job_has_a_process_and_one_that_dies_is_noticed(store: Store, olive: None) -> None:
    def add(attempts: int, **arguments: Any) -> int:
        return queue.add(store, "run", arguments, project="p", actor="olive", attempts=attempts).id

    def fail() -> None:
        raise PermissionError("rows.jsonl")

    # Longer than a lease. A busy machine may renew one too late, but not ten times.
    dies, lives = add(1, dies=True), [add(10, starts_in=3.0), add(10)]
    said: list[str] = []
    worker = Worker(store, "p", ["run"], places(store.root), lease_seconds=2.0, say=said.append, also=fail)
    worker.run(until_empty=True)
    job = queue.get(store, dies)
    assert (job.state, job.error["code"]) == ("failed", "process_ended")
    assert "signal 9" in job.error["what"]
    assert f"job {dies}: failed: its process ended with signal 9" in said
    assert said[0] == "nothing was added: rows.jsonl", "what adds jobs may fail"
    done = [queue.get(store, number) for number in lives]
    assert [one.state for one in done] == ["succeeded"] * 2
    assert len({os.getpid(), *(one.result["process"] for one in done)}) == 3


# A whole project


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose training is long enough to be disturbed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("TUNESMITH_THREADS", "1")
    known: Any = settings()["candidates"]
    tuned = {**known["tuned"], "train": {"rank": 2, "batch": 2, "epochs": 4, "checkpoint_seconds": 0.001}}
    return write_project(tmp_path / "p", candidates={"plain": known["plain"], "tuned": tuned})


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], Forked]]:
    """Starts workers, of which none stays."""
    started: list[Forked] = []

    def one() -> Forked:
        started.append(Forked(folder, "worker", "--lease", "20"))
        return started[-1]

    yield one
    for worker in started:
        worker.kill()
        worker.communicate()


@pytest.mark.slow
def test_a_job_survives_kill_9_a_pause_and_the_end_of_its_worker(folder: Path, start: Callable[[], Forked]) -> None:
    number = call(folder, "run", "--queue")["job"]
    project = Project.load(folder)
    store, said = project.store, list[str]()

    def checkpoints() -> list[str]:
        return sorted(path.name for path in store.local("work").glob("train-*/checkpoints/step-*"))

    def resumed() -> int:
        return sum("resuming from step" in line.message for line in jobs.log(looking(store), number).lines)

    first = start()
    until(checkpoints)
    (child,) = [each for each in psutil.Process(first.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    first.kill()
    until(lambda: gone(child.pid))
    assert queue.get(store, number).state == "running"

    second = start()
    until(lambda: resumed() == 1)
    reached = checkpoints()[-1]
    call(folder, "jobs", "pause", str(number))
    until(lambda: queue.get(store, number).state == "paused")
    assert checkpoints()[-1] >= reached
    call(folder, "jobs", "resume", str(number))
    until(lambda: resumed() == 2)
    second.send_signal(signal.SIGTERM)
    assert second.wait(SECONDS) == 0
    assert queue.get(store, number).state == "queued"

    third = jobs.OwnWorker(project, said.append)  # a server's
    third.start()
    until(lambda: queue.get(store, number).ended is not None)
    assert third._process is not None
    third._process.kill()
    until(lambda: "another one is started" in " ".join(said))
    third.stop(SECONDS)
    assert not third._process.is_alive()
    done = call(folder, "jobs", "show", str(number))
    assert (done["state"], done["attempts"]) == ("succeeded", 2)
    assert done["result"]["register"]["version"] == "tiny@v1"
    assert str(folder) not in json.dumps(done), "others see the job, and the paths are of the worker's machine"
    assert resumed() == 3
    assert training.repeat(project).same, "the bytes are those of an undisturbed training"


def test_a_run_here_is_a_job_and_its_verdict_decides(tmp_path: Path) -> None:
    plain: Any = settings()["candidates"]
    folder = write_project(
        tmp_path / "p", candidates={"plain": plain["plain"]}, gates={"valid": {"metric": "json_valid", "at_least": 1.0}}
    )
    project = Project.load(folder)
    assert run_here(project).gate.verdict == "fail"
    (job,) = jobs.list_jobs(looking(project)).jobs
    assert (job.state, job.error["code"]) == ("failed", "verdict_fail")
    assert job.error["what"] == "the verdict is fail: valid"
    assert job.result["gate"]["verdict"] == "fail", "the evidence is kept"
    project.store.keep_memo("afterwards", "x")  # the store is no longer fenced

    queued = do(project, jobs.add)
    write_project(folder, candidates={"plain": plain["plain"]}, gates={})
    lease = leases.claim(project.store, "w", ["run"], project="tiny")
    assert lease is not None
    perform_job(folder, lease)
    changed = jobs.show(looking(project), queued.job)
    assert (changed.state, changed.error["code"]) == ("failed", "wrong_usage")
    assert "settings changed" in changed.error["what"]

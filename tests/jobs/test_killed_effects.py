"""A governed job is killed after every few effects in the database, until it succeeds: each effect is there once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, update

from tests.forked import forkserver
from tests.server.fine_tuning_project import MODEL, OWNER, examples, write_fine_tuning_project
from tunesmith.core.scope import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.project import Project
from tunesmith.registry.history import verify_log
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import list_versions
from tunesmith.services.fine_tuning import create
from tunesmith.services.fine_tuning.arguments import KIND, Arguments, Hyperparameters
from tunesmith.services.runs import jobs
from tunesmith.store import audit, database, uploads
from tunesmith.store.people import identities
from tunesmith.store.tables import JobRow

pytestmark = pytest.mark.slow
EVERY = 5  # effects after which an attempt is killed
# What an attempt writes again and again: log, locks and leases.
_REPEATED = ("job_events", "locks", "jobs SET until")


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
    jobs.perform_in_child(folder, lease, os.getppid())


@pytest.mark.attack("crash", "kill -9 of a fine-tuning job after every fifth effect")
def test_a_job_that_is_killed_again_and_again_has_each_effect_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setattr(leases, "_FIRST_DELAY", 0.0)
    folder = write_fine_tuning_project(tmp_path / "project")
    project = Project.load(folder)
    store, owner = project.store, identities.ensure_owner(project.store)
    with store.scratch() as work:
        (work / "rows").write_bytes(examples())
        given: dict[str, Any] = {"name": "rows.jsonl", "purpose": "fine-tune", "actor": OWNER, "scope": Scope()}
        file = uploads.put(store, work / "rows", **given)
    asked = Arguments(settings="", model=MODEL, training_file=file.file, hyperparameters=Hyperparameters(n_epochs=1))
    number = create.create(project, asked, user=owner).id
    with database.writing(store.engine) as session:
        session.execute(update(JobRow).values(most_attempts=100))
    killed = 0
    while not queue.get(store, number).has_ended:
        lease = leases.claim(store, "w", [KIND], project="tiny")
        assert lease is not None
        process = forkserver().Process(target=attempt, args=(folder, lease))
        process.start()
        process.join(300)
        if queue.get(store, number).state == "running":
            assert process.exitcode == -signal.SIGKILL
            killed += 1
            leases.fail(store, lease, {"code": "process_ended", "what": "killed"}, retry=True)
    job = queue.get(store, number)
    assert job.state == "succeeded", job.error
    assert killed >= 3, "it was hardly disturbed: the test did not test"
    (version,) = list_versions(store)
    assert job.result[KIND]["version"] == version.label
    assert verify_version(store, version.label).ok
    assert [each.file for each in uploads.list_files(store, Scope(), most=9, oldest_first=True)] == [
        file.file,
        *job.result[KIND]["result_files"],
    ]
    with database.reading(store.engine) as session:
        effects = Counter((entry.action, entry.subject) for entry in audit.entries(session))
    assert set(effects.values()) == {1}, effects.most_common(3)
    assert verify_log(store) == []

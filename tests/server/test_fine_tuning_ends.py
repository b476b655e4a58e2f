"""How fine-tuning jobs end that are cancelled in any phase, or whose file, base or settings are gone or changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.fabricate import OPERATOR, Scene
from tests.server.conftest import HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.server.fine_tuning_project import MODEL, OWNER, examples, write_fine_tuning_project
from tests.waiting import until
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Stopped, Task
from tunesmith.jobs import leases, performing, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.project import Project
from tunesmith.registry.versions import list_versions
from tunesmith.services.fine_tuning.arguments import KIND
from tunesmith.services.fine_tuning.perform import VALIDATING, perform_fine_tuning
from tunesmith.services.runs import jobs
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.people.tokens import issue_token

pytestmark = pytest.mark.slow


@dataclass
class Halt:
    """A Progress that waits at the first step or line that begins with a phase."""

    phase: str
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def say(self, text: str) -> None:
        if text.startswith(self.phase) and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(300)

    @contextlib.contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        self.say(title)
        with SILENT.task(title, total) as task:
            yield task


@dataclass
class Tuner:
    """A server of a project, and a worker that this process is."""

    folder: Path
    client: openai.OpenAI
    progress: JobProgress | None = None

    @property
    def project(self) -> Project:
        """The project as another process opens it."""
        return Project.load(self.folder)

    def created(self, data: bytes | None = None, **more: Any) -> str:
        file = self.client.files.create(file=("rows.jsonl", data or examples()), purpose="fine-tune").id
        asked: dict[str, Any] = {"model": MODEL, "training_file": file, "hyperparameters": {"n_epochs": 2}, **more}
        return self.client.fine_tuning.jobs.create(**asked).id

    def taken(self) -> Lease:
        lease = leases.claim(self.project.store, "w", [KIND], project="tiny")
        assert lease is not None
        return lease

    def performed(self, lease: Lease | None = None, halt: Halt | None = None) -> FineTuningJob:
        """A job after this process performed it, or was stopped at it."""
        lease, project = lease or self.taken(), self.project
        job = queue.get(project.store, lease.job)
        with contextlib.suppress(Stopped, TunesmithError):

            def work(progress: JobProgress) -> Outcome:
                self.progress = progress
                return perform_fine_tuning(project, job, progress)

            perform(project.store, lease, work, shown=halt or SILENT)
        return self.client.fine_tuning.jobs.retrieve(f"ftjob-{lease.job}")

    def performed_in_child(self, monkeypatch: pytest.MonkeyPatch) -> FineTuningJob:
        """A job after what a worker's child does, but in this process."""
        lease = self.taken()
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "end_with_parent", lambda _: None)
            patch.setattr(signal, "signal", lambda *_: None)
            jobs.perform_in_child(self.folder, lease, os.getppid())
        return self.client.fine_tuning.jobs.retrieve(f"ftjob-{lease.job}")


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuner]:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setattr(performing, "_BEAT", 0.02)
    project = Project.load(write_fine_tuning_project(tmp_path / "project"))
    ensure_owner(project.store)
    add_user(project.store, OPERATOR, ["operator"], actor=OWNER)
    with running(Scene(project.store, "", ""), FakeEngine(""), project=project) as served:
        yield Tuner(project.root, served.client(issue_token(project.store, OWNER, actor=OWNER)))


def cancelled_during(tuner: Tuner, phase: str) -> FineTuningJob:
    """A job that is cancelled when it reaches a phase."""
    lease, halt, found = tuner.taken(), Halt(phase), list[FineTuningJob]()
    thread = threading.Thread(target=lambda: found.append(tuner.performed(lease, halt)))
    thread.start()
    try:
        assert halt.reached.wait(300), f"it never came to {phase}"
        job = tuner.client.fine_tuning.jobs.cancel(f"ftjob-{lease.job}")
        assert job.status in ("running", "validating_files")
        # Until its process knows that somebody asked for its end.
        until(lambda: tuner.progress is not None and tuner.progress.stopping.is_set())
    finally:
        halt.go_on.set()
        thread.join(300)
    return found[0]


def test_a_job_is_cancelled_in_every_phase_and_the_next_one_goes_on_from_there(tuner: Tuner) -> None:
    calls = tuner.client.fine_tuning.jobs
    queued = tuner.created()
    assert calls.cancel(queued).status == "cancelled"
    file = calls.retrieve(queued).training_file
    for phase in (VALIDATING, "training", "gate "):
        made = calls.create(model=MODEL, training_file=file, hyperparameters={"n_epochs": 2}).id
        done = cancelled_during(tuner, phase)
        assert (done.id, done.status, done.error, done.fine_tuned_model) == (made, "cancelled", None, None), phase
        assert done.finished_at is not None
        assert next(each.message for each in calls.list_events(made)) == "cancelled"
        assert list_versions(tuner.project.store) == []
        with pytest.raises(openai.NotFoundError, match="is cancelled"):
            tuner.client.chat.completions.create(model=f"ft:{MODEL}:tiny::{made[6:]}", messages=HELLO)
    last = calls.create(model=MODEL, training_file=file, hyperparameters={"n_epochs": 2}).id
    done = tuner.performed()
    assert (done.id, done.status) == (last, "succeeded"), done.error
    assert [version.label for version in list_versions(tuner.project.store)] == ["tiny-ft@v1"]
    skipped = [each.message for each in calls.list_events(last) if "unchanged, skipped" in each.message]
    assert len(skipped) > 2, "what the cancelled jobs had finished is used"


def test_a_job_that_fails_says_why(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is gone, settings that changed, and rows that are too few to decide."""

    def failed(done: FineTuningJob, code: str, *said: str) -> str:
        assert (done.status, done.fine_tuned_model) == ("failed", None)
        assert done.error is not None
        assert done.error.code == code
        assert all(each in done.error.message for each in said), done.error.message
        return done.error.message

    base = tuner.folder / "model"
    tuner.created()
    shutil.move(base, tuner.folder / "elsewhere")
    message = failed(tuner.performed_in_child(monkeypatch), "wrong_usage", "base 'model' is not a folder")
    assert str(tuner.folder) not in message, "clients do not see this machine's paths"
    shutil.move(tuner.folder / "elsewhere", base)

    tuner.created(b"".join(examples().splitlines(True)[:12]))
    more = "upload more examples and create another job"
    failed(tuner.performed(), "evidence_inconclusive", "at least 20 are needed", more)

    tuner.created()
    write_fine_tuning_project(tuner.folder, gates={})
    more = "restart `tunesmith serve` and create another one"
    failed(tuner.performed_in_child(monkeypatch), "wrong_usage", "settings changed since this job was queued", more)
    assert list_versions(tuner.project.store) == []

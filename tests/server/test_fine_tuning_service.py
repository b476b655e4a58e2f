"""Fine-tuning jobs to their ends, by a server and its workers or by this process: served, cancelled, failed."""

import contextlib
import csv
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.commands import Forked
from tests.fabricate import OPERATOR, Scene
from tests.models.test_rendering_tools import SHORT_CALLS
from tests.own_cache import own_cache
from tests.schemas import closed
from tests.server.conftest import HELLO, running
from tests.server.fake_engine import FakeEngine
from tests.server.fine_tuning_project import (
    MODEL,
    OWNER,
    examples,
    fine_tuning_settings,
    serving,
    token_of_engineer,
    write_fine_tuning_project,
)
from tests.tiny import write_model
from tests.waiting import until
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Stopped, Task
from tunesmith.core.text.names import Scope
from tunesmith.jobs import leases, performing, queue
from tunesmith.jobs.fine_tuning import VALIDATING, perform_fine_tuning
from tunesmith.jobs.kinds import perform_job
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.performing import JobProgress, Outcome, perform
from tunesmith.project import Project
from tunesmith.registry.versions import list_versions
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.tables import FINE_TUNING

pytestmark = pytest.mark.slow
OTHER_MODEL = "gpt-4.1-nano"
QUESTION: Any = [{"role": "user", "content": "turn on hall fan"}]
SWITCH: Any = {"type": "function", "function": {"name": "switch", "parameters": closed({"on": {"type": "boolean"}})}}


def client_of(url: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=120)


def examples_with_calls() -> bytes:
    """Rows whose answers call the function."""
    found = []
    for row in map(json.loads, examples().splitlines()):
        request, answer = row["messages"]
        function = {"name": "switch", "arguments": answer["content"]}
        calls = [{"id": "a", "type": "function", "function": function}]
        found.append({"messages": [request, {"role": "assistant", "tool_calls": calls}], "tools": [SWITCH]})
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


def test_a_model_on_another_base_that_knows_tools_is_served_by_a_server_of_that_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    monkeypatch.setenv("TUNESMITH_CACHE", own_cache(tmp_path / "cache"))
    folder, settings = tmp_path / "project", fine_tuning_settings()
    tuning: Any = {**settings["fine_tuning"], "models": {MODEL: None, OTHER_MODEL: "other"}}  # type: ignore[dict-item]
    candidates: Any = settings["candidates"]
    candidates["tuned"]["max_tokens"] = 32  # room for a call
    write_fine_tuning_project(folder, fine_tuning=tuning, candidates=candidates)
    write_model(folder / "other", seed=5, template=SHORT_CALLS)
    token, project = token_of_engineer(folder, Scope("acme")), Project.load(folder)
    with serving(folder, "--no-worker") as (url, _):
        client = client_of(url, token)
        file = client.files.create(file=("rows.jsonl", examples_with_calls()), purpose="fine-tune").id
        asked: Any = {"training_file": file, "suffix": "nano", "hyperparameters": {"n_epochs": 1}}
        made = client.fine_tuning.jobs.create(model=OTHER_MODEL, **asked)
        lease = leases.claim(project.store, "w", [FINE_TUNING], project="tiny")
        assert lease is not None
        perform(project.store, lease, partial(perform_fine_tuning, project, queue.get(project.store, lease.job)))
        done = client.fine_tuning.jobs.retrieve(made.id)
        name: Any = done.fine_tuned_model
        assert (done.status, done.error, name) == ("succeeded", None, f"ft:{OTHER_MODEL}:tiny:nano:{made.id[6:]}")
        said = [event.message for event in client.fine_tuning.jobs.list_events(made.id, limit=3)]  # in pages
        assert said[0] == "succeeded"
        assert any("`tunesmith approve tiny-nano@v1 --tenant acme`" in message for message in said)
        assert f"a server of its base answers: `tunesmith serve --base-of {OTHER_MODEL}`" in said
        rows = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
        assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
        assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
        kept = client.fine_tuning.jobs.checkpoints.list(made.id)
        assert [each.fine_tuned_model_checkpoint for each in kept] == [name]
        with pytest.raises(openai.NotFoundError, match="tiny-nano@v1 is not approved"):
            client.chat.completions.create(model=name, messages=QUESTION)
        assert Forked(folder, "approve", "tiny-nano@v1", "--as", "ada", "--tenant", "acme").wait(300) == 0
        with pytest.raises(openai.NotFoundError, match="tiny-nano@v1 was made from another base than this server's"):
            client.chat.completions.create(model=name, messages=QUESTION)
    with serving(folder, "--no-worker", "--base-of", OTHER_MODEL) as (url, _):
        create: Any = client_of(url, token).chat.completions.create
        assert create(model=name, messages=QUESTION).model == "tiny-nano@v1"
        held: Any = {"tools": [SWITCH], "tool_choice": "required", "parallel_tool_calls": False}
        (call,) = create(model=name, messages=QUESTION, **held).choices[0].message.tool_calls
        assert (call.function.name, type(json.loads(call.function.arguments)["on"])) == ("switch", bool)


def test_a_server_starts_a_worker_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails its gates says so, and names the rival that needs no training."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    gate = {"right": {"metric": "exact_match", "at_least": 0.9}}
    folder = write_fine_tuning_project(tmp_path / "project", gates=gate)
    token, store = token_of_engineer(folder), Project.load(folder).store
    with serving(folder) as (url, server):
        client = client_of(url, token)
        file = client.files.create(file=("rows.jsonl", examples()), purpose="fine-tune").id
        made = client.fine_tuning.jobs.create(model=MODEL, training_file=file, hyperparameters={"n_epochs": 1})
        number = int(made.id[6:])
        until(lambda: queue.get(store, number).ended is not None)
        done = client.fine_tuning.jobs.retrieve(made.id)
        assert (done.status, done.fine_tuned_model) == ("failed", None)
        assert done.error is not None
        assert done.error.code == "gate_failed"
        assert "right" in done.error.message
        assert "Training did not pay: plain, without training, reaches exact_match" in done.error.message
        assert "verdict sha256:" in done.error.message
        assert client.files.content(done.result_files[0]).text.startswith("step,train_loss")
        with pytest.raises(openai.NotFoundError, match="is failed: gate_failed"):
            client.chat.completions.create(model=f"ft:{MODEL}:tiny::{number}", messages=QUESTION)
        worker = int(queue.get(store, number).worker.rsplit(":", 1)[-1])
        os.kill(worker, 0)
    assert server.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# Jobs that end early


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
        lease = leases.claim(self.project.store, "w", [FINE_TUNING], project="tiny")
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

    def performed_in_child(self) -> FineTuningJob:
        """A job after what a worker's child does, but in this process."""
        lease = self.taken()
        perform_job(self.folder, lease)
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


def test_a_job_that_fails_says_why(tuner: Tuner) -> None:
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
    message = failed(tuner.performed_in_child(), "wrong_usage", "base 'model' is not a folder")
    assert str(tuner.folder) not in message, "clients do not see this machine's paths"
    shutil.move(tuner.folder / "elsewhere", base)

    tuner.created(b"".join(examples().splitlines(True)[:12]))
    more = "upload more examples and create another job"
    failed(tuner.performed(), "evidence_inconclusive", "at least 20 are needed", more)

    tuner.created()
    write_fine_tuning_project(tuner.folder, gates={})
    more = "create another fine-tuning job after a restart"
    failed(tuner.performed_in_child(), "wrong_usage", "settings changed since this job was queued", more)
    assert list_versions(tuner.project.store) == []

"""`run --queue` and `jobs` from the outside: documents, exit codes, what a person sees."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny_project import write_project
from tunesmith.cli.main import app
from tunesmith.core.errors import TunesmithError
from tunesmith.jobs import leases
from tunesmith.jobs.queue import JobError
from tunesmith.store.people import identities
from tunesmith.store.store import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    return write_project(tmp_path / "p")


def told(folder: Path, *words: str) -> str:
    """What a person sees, or the error."""
    result = CliRunner().invoke(app, [*words, "-C", str(folder)])
    if isinstance(result.exception, TunesmithError):
        return f"{result.exception.exit_code}: {result.exception}"
    assert result.exit_code == 0, result.output
    return result.stdout


def document(folder: Path, *words: str) -> Any:
    return json.loads(told(folder, *words, "--json"))


def test_a_job_from_the_queue_to_its_end(folder: Path) -> None:
    number = document(folder, "run", "--queue", "--priority", "3", "--key", "k")["job"]
    assert document(folder, "run", "--queue", "--priority", "3", "--key", "k")["job"] == number
    store = Store(folder / ".tunesmith")
    lease = leases.claim(store, "host:7", ["run"], project="tiny")
    assert lease is not None
    step = {"step": "training", "done": 3.0, "total": 9.0, "note": "loss 0.5", "seconds": 3.0, "seconds_left": 6.0}
    leases.renew(store, lease, step)
    leases.log(store, lease, "training 72 rows \x1b[31m")
    assert document(folder, "jobs", "show", "1")["progress"] == step
    assert "training 33%" in told(folder, "jobs", "list")
    assert "training 33%, 6 s left loss 0.5" in told(folder, "jobs", "show", "1")
    assert document(folder, "jobs", "pause", "1")["wanted"] == "paused"
    assert "running, to be paused" in told(folder, "jobs", "show", "1")
    assert document(folder, "jobs", "resume", "1")["wanted"] == ""
    assert document(folder, "jobs", "cancel", "1")["wanted"] == "cancelled"
    leases.stop(store, lease, "told to")
    assert document(folder, "jobs", "list", "--state", "cancelled")["jobs"][0]["job"] == number
    assert document(folder, "jobs", "list", "--state", "queued")["jobs"] == []
    shown = told(folder, "jobs", "log", "1", "--follow")
    assert "started by host:7" in shown
    assert "\x1b" not in shown
    assert shown.splitlines()[-1].endswith("cancelled")


def test_a_run_whose_process_was_killed_is_shown_as_such_before_its_lease_ends(folder: Path) -> None:
    store = Store(folder / ".tunesmith")
    identities.ensure_owner(store)
    here = socket.gethostname()
    for worker, silent in ((f"{here}:{os.getpid()}", False), (f"{here}:{1 << 30}", True), (f"not-{here}:7", False)):
        lease = leases.begin(store, worker, "run", {}, project="tiny", actor="olive")
        assert document(folder, "jobs", "show", str(lease.job))["silent"] == silent
        assert ("gone or silent" in told(folder, "jobs", "show", str(lease.job))) == silent
        leases.fail(store, lease, JobError(code="x", what="y"), retry=False)
        assert not document(folder, "jobs", "show", str(lease.job))["silent"]


def test_wrong_usage(folder: Path) -> None:
    assert told(folder, "run", "--priority", "1").startswith("2: --priority and --key")
    assert told(folder, "jobs", "show", "9").startswith("2: there is no job 9")
    assert "no jobs" in told(folder, "jobs", "list")
    document(folder, "run", "--queue")
    assert told(folder, "jobs", "log", "1", "--follow", "--json").startswith("2: --follow")
    assert told(folder, "jobs", "resume", "1").startswith("3: job 1 is queued, not paused")


def test_settings_of_one_run(folder: Path) -> None:
    queued = document(folder, "run", "--queue", "--set", "tuned.epochs=2", "--set", "tuned.learning_rate=0.01")
    assert queued["changes"] == {"tuned": {"epochs": 2, "learning_rate": 0.01}}
    assert "tuned.epochs=2" in told(folder, "jobs", "show", "1")
    assert "changes no setting" in told(folder, "run", "--queue", "--set", "tuned.epochs")

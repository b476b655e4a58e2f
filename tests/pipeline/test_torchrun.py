"""`torchrun -m tunesmith train NAME`, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.hf_models import write_hf_model
from tests.own_group import run_whole_group
from tests.tiny_project import settings, write_project
from tunesmith.cli.main import app
from tunesmith.core.errors import UsageError
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.project import Project
from tunesmith.services.evaluation import evaluate
from tunesmith.services.training import train


def _project(folder: Path) -> Path:
    """With validation rows enough to score generated answers, on a base that the native engine does not run."""
    write_hf_model(folder / "model", "phi3")
    given = settings()
    data = {**given["data"], "split": {"validation": 0.3, "test": 0.3, "group_by": "template"}}  # type: ignore[dict-item]
    tuned = {
        "prompt": "prompt.txt",
        "train": {
            "rank": 2,
            "batch": 8,
            "tokens": 256,
            "validations": 2,
            "validation_rows": 30,
            "epochs": 6,
            "checkpoint_seconds": 0.001,
        },
        "max_tokens": 4,
    }
    return write_project(folder, data=data, candidates={"tuned": tuned})


def _kill_a_rank(folder: Path, pids: list[int]) -> None:
    """End rank 1 once the training has a checkpoint. pids: gets its process id."""
    until = time.monotonic() + 200
    while not pids and time.monotonic() < until:
        time.sleep(0.05)
        if any(folder.glob(".tunesmith/work/train-*/checkpoints/step-*")):
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if (
                        str(folder).encode() in (path / "cmdline").read_bytes()
                        and b"\0RANK=1\0" in (path / "environ").read_bytes()
                    ):
                        pids.append(int(path.name))
                        os.kill(pids[0], signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_train_record_and_answer(tmp_path: Path) -> None:
    """One of them is killed: torchrun starts both again, and they go on from the newest checkpoint."""
    folder, killed = _project(tmp_path / "project"), []  # type: tuple[Path, list[int]]
    killer = threading.Thread(target=_kill_a_rank, args=(folder, killed), daemon=True)
    killer.start()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    done = run_whole_group(
        [*command, "-m", "tunesmith", "-C", str(folder), "train", "tuned", "--json"],
        cwd=tmp_path,
        env={**os.environ, "TUNESMITH_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *stopped, found = map(json.loads, done.stdout.splitlines())  # rank 0 may have said why it was restarted
    assert all("another rank has ended" in each["error"]["what"] for each in stopped[:1])
    assert len(stopped) <= 1
    assert len(killed) == 1
    assert done.stderr.count("2 ranks train together") == 2  # rank 0 alone says so, each time
    assert "resuming from step" in done.stderr
    assert found["score"] == {"metric": "exact_match", "rows": 30}
    project = Project.load(folder)
    record = project.store.record(found["training"], kind="training")
    assert record.body["environment"]["ranks"] == 2
    assert record.blobs.keys() == {ADAPTER_FILE, CONFIG_FILE}
    assert train(project, "tuned").training == found["training"]  # skipped: the same training, whoever computes it
    assert set(evaluate(project).candidates) == {"tuned"}


def test_one_process_has_one_copy() -> None:
    refused = CliRunner().invoke(app, ["train", "tuned", "--copies", "2"]).exception
    assert isinstance(refused, UsageError)
    assert refused.where == "--copies"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "torchrun starts `tunesmith train` only"),
        (["train", "tuned", "--find-rate"], "--find-rate runs in one process"),
        (["train", "tuned", "--search"], "--search runs in one process"),
        (["train", "tuned", "--copies", "3"], "2 processes cannot hold 3 copies"),
    ],
)
def test_torchrun_starts_trainings_only(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, UsageError)
    assert said in str(refused)

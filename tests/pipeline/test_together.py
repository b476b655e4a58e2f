"""Several processes train one adapter: `torchrun -m tunesmith train NAME`, and `engine: {ray: ...}`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.data.building.test_ray_runner import PATIENT
from tests.hf_models import write_hf_model
from tests.own_group import run_whole_group
from tests.tiny_project import settings, write_project
from tunesmith.cli.main import app
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.engines.protocol import Question
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.pipeline.candidates import load_adapter
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.services.evaluation import evaluate
from tunesmith.services.training import train


def _project(folder: Path, **engine: object) -> Path:
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
    return write_project(folder, data=data, candidates={"tuned": tuned}, **({"engine": engine} if engine else {}))


def _kill_one(folder: Path, is_it: Callable[[Path], bool]) -> list[int]:
    """End a process, once the training has a checkpoint, and return a list that gets its process id.

    is_it: whether a folder of /proc is that of a process to end.
    """
    killed: list[int] = []

    def wait() -> None:
        until = time.monotonic() + 400
        while not killed and time.monotonic() < until:
            time.sleep(0.05)
            if any(folder.glob(".tunesmith/work/train-*/checkpoints/step-*")):
                for path in Path("/proc").glob("[0-9]*"):
                    with contextlib.suppress(OSError):
                        if not killed and is_it(path):
                            killed.append(int(path.name))
                            os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    return killed


def _log_probabilities(project: Project, asked: Sequence[Question], training: str | None) -> list[float]:
    """Of each question's only choice, under a training's adapter; None: the base."""
    context = PipelineContext(project)
    return [each for (each,) in context.engine.choose(asked, load_adapter(context, training))]


@pytest.mark.slow
def test_two_processes_train_record_and_answer(tmp_path: Path) -> None:
    """One of them is killed: torchrun starts both again, and they go on from the newest checkpoint."""
    folder = _project(tmp_path / "project")

    def is_it(path: Path) -> bool:
        ours = str(folder).encode() in (path / "cmdline").read_bytes()
        return ours and b"\0RANK=1\0" in (path / "environ").read_bytes()

    killed = _kill_one(folder, is_it)
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


@pytest.mark.slow
def test_two_workers_of_ray_train(tmp_path: Path) -> None:
    """One of them is killed: Ray starts both again, and they go on from the newest checkpoint."""
    pytest.importorskip("ray.train.torch", reason="the extra `ray` is not installed")
    folder = _project(tmp_path / "project", ray={"workers": 2})

    def is_it(path: Path) -> bool:
        return b"ray::RayTrainWorker" in (path / "cmdline").read_bytes()

    killed = _kill_one(folder, is_it)
    done = run_whole_group(
        [sys.executable, "-m", "tunesmith", "-C", str(folder), "train", "tuned", "--json"],
        cwd=tmp_path,
        env={**os.environ, **PATIENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(killed) == 1
    assert done.stderr.count("2 ranks train together") == 2
    assert "resuming from step" in done.stderr
    project = Project.load(folder)
    assert project.store.record(found["training"], kind="training").body["environment"]["ranks"] == 2
    _check_same(Project.load(_project(tmp_path / "alone")), project, found["training"])


def _check_same(alone: Project, project: Project, training: str) -> None:
    """Train in this process; the log-probabilities of the test rows' answers are those of another training."""
    own = train(alone, "tuned").training
    rows = PipelineContext(alone).dataset.examples("test")
    asked = [Question(row.request, (row.answer,)) for row in rows]
    ours, theirs, base = (
        _log_probabilities(*each) for each in ((alone, asked, own), (project, asked, training), (alone, asked, None))
    )
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert max(abs(one - other) for one, other in zip(ours, base, strict=True)) > 0.1, "it was trained"


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


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        (["train"], {"resources": {"GPU": 2}}, "a worker computes on one GPU"),
        (["train", "--find-rate"], {}, "this trains in one process, and engine.ray is for"),
        (["train"], {"train": "native"}, "trains in one process, and several are to train together"),
        (["train"], {}, 'pip install "tunesmith[ray]"'),
    ],
)
def test_what_ray_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    native = {key: changes[key] for key in ("train",) if key in changes}
    ray = {"workers": 2, **{key: changes[key] for key in changes if key not in native}}
    folder = write_project(tmp_path / "p", engine={**native, "ray": ray})
    refused = CliRunner().invoke(app, [*command, "-C", str(folder)]).exception
    assert isinstance(refused, TunesmithError)
    assert said in str(refused)

"""A project goes from rows to a served version with one process, with torchrun's two and with two workers of Ray."""

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.commands import call
from tests.data.building.test_ray_runner import PATIENT
from tests.hf_models import write_hf_model
from tests.own_group import run_whole_group
from tests.tiny_project import settings, write_project
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import Progress
from tunesmith.engines.protocol import Question
from tunesmith.engines.ranks import ALONE
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE
from tunesmith.pipeline.bases import ProjectBase
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.run import run
from tunesmith.project import Project
from tunesmith.services.training import repeat, train
from tunesmith.store.people import identities
from tunesmith.store.records import Record
from tunesmith.training import launchers


def _project(folder: Path, epochs: int = 6, **engine: object) -> Path:
    """With validation rows enough to score generated answers, on a base that the native engine does not run."""
    write_hf_model(folder / "model", "phi3")
    given: dict[str, Any] = settings()
    data = {**given["data"], "split": {"validation": 0.3, "test": 0.3, "group_by": "template"}}
    train = {"rank": 2, "batch": 8, "tokens": 256, "epochs": epochs, "learning_rate": 0.01}
    train |= {"validations": 2, "validation_rows": 30, "checkpoint_seconds": 0.001}
    tuned = {"prompt": "prompt.txt", "train": train, "max_tokens": 4}
    candidates = {"held": given["candidates"]["held"], "tuned": tuned}
    changes = {"engine": engine} if engine else {}
    return write_project(folder, data=data, candidates=candidates, release="tuned", **changes)


def _kill_one(is_it: Callable[[Path], bool], *, when: Callable[[], bool] = lambda: True) -> list[int]:
    """End the first process that is_it finds; returns a list that gets its number.

    is_it: whether a folder of /proc is that of a process to end. when: whether to look for it already.
    """
    killed: list[int] = []

    def wait() -> None:
        until = time.monotonic() + 400
        while not killed and time.monotonic() < until:
            time.sleep(0.02)
            for path in Path("/proc").glob("[0-9]*") if when() else ():
                with contextlib.suppress(OSError):
                    if not killed and is_it(path):
                        os.kill(int(path.name), signal.SIGKILL)
                        killed.append(int(path.name))

    threading.Thread(target=wait, daemon=True).start()
    return killed


def _worker_of(folder: Path, title: bytes) -> Callable[[Path], bool]:
    """Whether a process has a title and was started, by another one of Ray, by a command that names a folder."""

    def is_it(path: Path) -> bool:
        if title not in (path / "cmdline").read_bytes():
            return False
        for _ in range(2):
            path = Path("/proc") / (path / "stat").read_text().rpartition(")")[2].split()[1]  # the parent
        return str(folder).encode() in (path / "cmdline").read_bytes()

    return is_it


def _has_checkpoint(folder: Path) -> Callable[[], bool]:
    return lambda: any(folder.glob(".tunesmith/work/train-*/checkpoints/step-*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained by one process."""
    project = Project.load(_project(tmp_path_factory.mktemp("alone")))
    train(project, "tuned")
    return project


def _training(project: Project) -> Record:
    (digest,) = project.store.records_of("training")
    return project.store.record(digest, kind="training")


def _check_same(alone: Project, other: Project) -> None:
    """The test rows' answers have the same log-probabilities under both adapters."""
    context = PipelineContext(alone)
    asked = [Question(row.request, (row.answer,)) for row in context.dataset.examples("test")]
    found = []
    for each in (alone, other):
        with alone.store.scratch() as folder:
            for name, blob in _training(each).blobs.items():
                (folder / name).write_bytes(each.store.read_blob(blob))
            context.of().engine.load_adapter(str(each.root), folder)
        found.append([sums[0] for sums in context.of().engine.choose(asked, str(each.root))])
    base = [sums[0] for sums in context.of().engine.choose(asked)]
    assert found[1] == pytest.approx(found[0], abs=1e-2)
    assert max(abs(one - before) for one, before in zip(found[0], base, strict=True)) > 1, "training changed nothing"


def _answers(project: Project, evaluation: str) -> dict[str, str]:
    """The tuned candidate's answers to the test rows, by row."""
    parents = project.store.record(evaluation, kind="evaluation").parents
    lines = project.store.record(parents["answers:tuned"], kind="answers").blobs["answers.jsonl"]
    return {each["id"]: each["text"] for each in map(json.loads, project.store.read_blob(lines).splitlines())}


@pytest.mark.slow
def test_two_processes_of_torchrun(tmp_path: Path, alone: Project) -> None:
    """One of them is killed: torchrun starts both again, and they go on from the newest checkpoint."""
    folder = _project(tmp_path / "project")

    def is_it(path: Path) -> bool:
        ours = str(folder).encode() in (path / "cmdline").read_bytes()
        return ours and b"\0RANK=1\0" in (path / "environ").read_bytes()

    killed = _kill_one(is_it, when=_has_checkpoint(folder))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = run_whole_group(
        [sys.executable, *torchrun, "-m", "tunesmith", "-C", str(folder), "train", "tuned", "--json"],
        cwd=tmp_path,
        env={**os.environ, "TUNESMITH_THREADS": "1"},
        timeout=900,
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
    record = _training(project)
    assert (record.digest, record.body["environment"]["ranks"]) == (found["training"], 2)
    assert record.blobs.keys() == {ADAPTER_FILE, CONFIG_FILE}
    assert train(project, "tuned").training == found["training"], "the same training, whoever computes it"
    _check_same(alone, project)
    with pytest.raises(Refused, match="2 processes made this training"):
        repeat(project, "tuned")


@pytest.mark.slow
@pytest.mark.long
def test_two_workers_of_ray(tmp_path: Path, alone: Project) -> None:
    """One is killed while they train: Ray starts both again, and they go on from the newest checkpoint. One is killed
    while they answer: the other one and a new one answer what it was asked."""
    pytest.importorskip("ray.train.torch", reason="the extra `ray` is not installed")
    folder = _project(tmp_path / "project", ray={"workers": 2})

    trains = _kill_one(_worker_of(folder, b"ray::RayTrainWorker"), when=_has_checkpoint(folder))
    answers = _kill_one(_worker_of(folder, b"ray::_Worker.answer"))
    done = run_whole_group(
        [sys.executable, "-m", "tunesmith", "-C", str(folder), "run", "--json"],
        cwd=tmp_path,
        env={**os.environ, **PATIENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(trains) == len(answers) == 1
    assert done.stderr.count("2 ranks train together") == 2
    assert "resuming from step" in done.stderr
    assert "a worker that answers ended" in done.stderr
    project, document = Project.load(folder), json.loads(done.stdout)
    assert _training(project).body["environment"]["ranks"] == 2
    _check_same(alone, project)
    assert document["register"]["version"] == "tiny@v1"
    identities.add_user(project.store, "ann", ["approver"], actor=project.actor())
    for words in (["approve", "tiny@v1", "--as", "ann"], ["chat", "tiny@v1", "-m", "turn on hall fan"]):
        call(folder, *words)
    mine = _answers(project, document["gate"]["evaluation"])
    theirs = _answers(alone, run(alone).document()["gate"]["evaluation"])
    assert mine.keys() == theirs.keys()
    flipped = sum(mine[row] != theirs[row] for row in mine)
    assert flipped <= 1, f"{flipped} of {len(mine)} answers differ"


def test_rank_0_on_ray_trains_on_the_rows_of_a_fine_tuning_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not those of the project file."""

    def here(lead: Any, given: Mapping[str, Any], _settings: Any, _work: Path, progress: Progress) -> str:
        found: str = lead(pickle.loads(pickle.dumps(given)), ALONE, progress)  # noqa: S301  as Ray sends it
        return found

    monkeypatch.setattr(launchers, "run_on_ray", here)
    monkeypatch.setattr(ProjectBase, "on_ray", None)
    project = Project.load(write_project(tmp_path, engine={"ray": {"workers": 1}}))
    (tmp_path / "rows.jsonl").rename(tmp_path / "uploaded.jsonl")
    (source,) = project.settings.data.sources
    data = project.settings.data.model_copy(update={"sources": (source.model_copy(update={"path": "uploaded.jsonl"}),)})
    job = Project(project.root, project.settings.model_copy(update={"data": data}))
    assert train(job, "tuned").rows == 68


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (1, "train tuned --copies 2", "--copies"),
        (2, "run", "torchrun starts `tunesmith train` only"),
        (2, "train tuned --repeat", "--repeat runs in one process"),
        (2, "train tuned --search", "--search runs in one process"),
        (2, "train tuned --copies 3", "2 processes cannot hold 3 copies"),
    ],
)
def test_torchrun_starts_trainings_only(monkeypatch: pytest.MonkeyPatch, ranks: int, words: str, said: str) -> None:
    if ranks > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, words.split()).exception
    assert isinstance(refused, UsageError)
    assert said in f"{refused} {refused.where}"


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        (["train"], {"resources": {"GPU": 2}}, "a worker computes on one GPU"),
        (["train", "--search"], {}, "this trains in one process, and engine.ray is for"),
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

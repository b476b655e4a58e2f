"""Stopping and carrying on: bit-identical after kill -9 at any moment, refused where something that matters changed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import row, write_model
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.progress import SILENT, Progress, Silent, Task
from tunesmith.engines.batch import label_count
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native import runtime
from tunesmith.models.base import resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training import trainer as loop
from tunesmith.training.batch_plan import lay_out_validation
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import TrainingRow, train

ROWS = [
    TrainingRow(f"r{n}", row(f"turn on light {n}", f'{{"n":{n},"even":{str(n % 2 == 0).lower()}}}')) for n in range(60)
]
SETTINGS = TrainSettings(rank=4, batch=4, epochs=4, learning_rate=0.01, checkpoint_seconds=1e-9, validations=2)

_SCRIPT = """
import sys
from pathlib import Path
from tests.training.test_resume import run
run(Path(sys.argv[1]))
"""


class Said(Silent):
    """Keeps what a run says and notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        with super().task(name, total) as task:
            task.note = self.lines.append  # type: ignore[method-assign]
            yield task


def run(
    folder: Path,
    settings: TrainSettings = SETTINGS,
    rows: list[TrainingRow] = ROWS,
    restart: bool = False,
    progress: Progress = SILENT,
) -> str:
    """Train in folder; returns the digest of the adapter's weights."""
    store = Store(folder / "store")
    base = resolve_base(store, str(folder / "model"), folder)
    dataset = store.put_record(Record(kind="dataset", body={"rows": 60}))
    digest = train(
        store,
        base=base,
        dataset=dataset,
        rows=rows,
        validation=ROWS[:3],
        settings=settings,
        work=folder / "work",
        restart=restart,
        progress=progress,
    )
    return store.record(digest).blobs["adapter_model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("whole")
    write_model(place / "model")
    return run(place)


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / "work").glob("step-*"))


def test_same_input_same_bytes(folder: Path, uninterrupted: str) -> None:
    assert run(folder) == uninterrupted


def test_killed_again_and_again_it_ends_in_the_same_bytes(folder: Path, uninterrupted: str) -> None:
    killed = 0
    for wanted in (1, 12, 31):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
        worker = subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder)], env=environment)
        until = time.monotonic() + 90
        while worker.poll() is None and time.monotonic() < until:
            steps = _steps(folder)
            if steps and int(steps[-1].name.removeprefix("step-")) >= wanted:
                worker.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += worker.wait() == -signal.SIGKILL
    assert killed == 3, "a run came to its end before it was killed: the test did not test"
    assert run(folder) == uninterrupted


# Where a run is killed, each as soon as it comes there (after: has been there), three at a checkpoint: between its two
# files, before it gets its name, before older ones are removed.
_PHASES = {
    "estimate": "tunesmith.training.train.estimate",
    "between the files": "tunesmith.training.checkpoints._write after",
    "before its name": "tunesmith.training.checkpoints.os.rename",
    "after its name": "tunesmith.training.checkpoints.sync_folder",
    "record": "tunesmith.training.train.Record",
}
_KILLED = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
from tests.training.test_resume import run
import tunesmith.training.train
where, _, after = sys.argv[2].partition(" ")
place, _, name = where.rpartition(".")
owner = os if place.endswith(".os") else import_module(place)
inner = getattr(owner, name)
def at(*given, **named):
    if after:
        inner(*given, **named)
    if "store" not in str(given[:1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*given, **named)
setattr(owner, name, at)
run(Path(sys.argv[1]))
"""


@pytest.mark.slow  # five processes, each of which imports torch
def test_killed_in_every_phase_it_ends_in_the_same_bytes(folder: Path, uninterrupted: str) -> None:
    store = Store(folder / "store")
    resolve_base(store, str(folder / "model"), folder)  # what is killed is the training, not what stands before it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    for phase, place in _PHASES.items():
        ended = subprocess.run([sys.executable, "-c", _KILLED, str(folder), place], env=environment, timeout=120)
        assert ended.returncode == -signal.SIGKILL, phase
    assert run(folder) == uninterrupted
    assert not list((folder / "work").glob(".writing-*")), "what a kill left half-written is cleared away"


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(folder: Path, uninterrupted: str) -> None:
    run(folder)
    newest = _steps(folder)[-1]
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    said = Said()
    assert run(folder, progress=said) == uninterrupted
    assert f"checkpoint {newest.name} is damaged; carrying on from the one before it" in said.lines
    assert "carrying on from step 59" in said.lines


@pytest.mark.parametrize("damage", ["empty", "half", "no state", "no JSON"])
def test_half_written_checkpoints_are_not_used(folder: Path, uninterrupted: str, damage: str) -> None:
    run(folder)
    for step in _steps(folder):
        tensors, state = step / "tensors.safetensors", step / "state.json"
        if damage == "empty":
            tensors.write_bytes(b"")
        elif damage == "half":
            tensors.write_bytes(tensors.read_bytes()[:1000])
        elif damage == "no state":
            state.unlink()
        else:
            state.write_text("[]")
    said = Said()
    assert run(folder, progress=said) == uninterrupted
    assert [line.endswith("is damaged; starting over") for line in said.lines if "damaged" in line] == [True, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": SETTINGS.model_copy(update={"learning_rate": 0.02})},
        {"rows": [*ROWS[:-1], TrainingRow("r59", row("turn on light 59", '{"n":0}'))]},
    ],
)
def test_resume_is_refused_where_what_matters_changed(folder: Path, changed: dict) -> None:
    run(folder)
    with pytest.raises(Refused, match="begun with other") as told:
        run(folder, **changed)
    assert "--restart" in str(told.value.fix)
    assert run(folder, **changed, restart=True)


def test_resume_is_refused_on_another_base(folder: Path) -> None:
    run(folder)
    write_model(folder / "model", seed=1)
    with pytest.raises(Refused, match="other base"):
        run(folder)


def test_a_seed_changes_the_bytes(folder: Path, uninterrupted: str) -> None:
    assert run(folder, SETTINGS.model_copy(update={"seed": 1})) != uninterrupted


def test_a_loss_that_is_no_number_stops_the_run(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TunesmithError, match="the loss became nan at step 1"):
        run(folder)
    assert not _steps(folder)


def test_the_record_says_what_was_measured(folder: Path) -> None:
    store = Store(folder / "store")
    run(folder)
    (digest,) = store.records_of("training")
    record = store.record(digest)
    body = record.body
    assert body["steps"] == 60
    assert [point["step"] for point in body["curve"]] == list(range(1, 61))
    assert [point["step"] for point in body["validation"]] == [30, 60]
    assert body["estimate"]["seconds"] > 0
    assert body["checkpoint_bytes"] == pytest.approx(body["estimate"]["checkpoint_bytes"], rel=0.5)
    assert body["labels"] < body["tokens"]
    assert body["tokens_computed"] < body["tokens"], "the shared prompt was computed once a batch"
    assert record.blobs["adapter_model.safetensors"] == digest_bytes(
        store.blob_path(record.blobs["adapter_model.safetensors"]).read_bytes()
    )


def test_an_overlong_row_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(Refused, match=r"row r0 has \d+ tokens, more than max_length 16"):
        run(folder, SETTINGS.model_copy(update={"max_length": 16}))


def test_progress_says_loss_speed_share_of_the_limit_and_memory(folder: Path) -> None:
    said = Said()
    run(folder, progress=said)
    notes = [line for line in said.lines if "of peak" in line]
    assert len(notes) == 60
    assert all(re.fullmatch(r"loss \d+\.\d{3}, \d+\.\d GB, \d+ tokens/s, \d+% of peak", note) for note in notes)
    assert any(re.search(r"about \d+ s and .* GB of memory, \d+ MB a checkpoint", line) for line in said.lines)


def test_room_is_asked_for_again_by_a_run_that_is_carried_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000)
    with pytest.raises(Refused, match="the largest part of a step"):
        run(folder)


@pytest.mark.parametrize("what", ["loss", "gradient", "validation"])
def test_what_is_no_number_later_on_leaves_the_checkpoint_before_it(
    folder: Path, uninterrupted: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What then goes well carries on from there."""
    gradients, validation_loss = loop.gradients, loop.validation_loss
    calls = 0

    def spoilt(network: Any, trained: Any, step: Any) -> float:
        nonlocal calls
        loss, calls = gradients(network, trained, step), calls + 1
        if what == "gradient" and calls == 40:
            trained.masters[0].grad[0] = float("inf")
        return float("nan") if what == "loss" and calls == 40 else loss

    with monkeypatch.context() as patch:
        # The estimate's own steps are not counted: they go by another name.
        patch.setattr(loop.Trainer, "compute", lambda self: spoilt(self.network, self.trained, self.due))
        if what == "validation":
            patch.setattr(
                loop, "validation_loss", lambda *told: float("nan") if calls == 60 else validation_loss(*told)
            )
        with pytest.raises(TunesmithError, match=r"became (nan|inf)") as told:
            run(folder)
    last = 60 if what == "validation" else 40
    assert f"{last} of 60" in told.value.what
    assert told.value.where == "train.learning_rate"
    assert _steps(folder)[-1].name == f"step-{last - 1:08d}"
    assert run(folder) == uninterrupted


def test_a_changed_environment_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    monkeypatch.setattr(native, "identity", lambda: "others")
    with pytest.raises(Refused, match=r"other environment \(kernels\): "):
        run(folder)


def test_validation_takes_no_more_tokens_at_once_than_a_step(tmp_path: Path) -> None:
    renderer = Renderer(write_model(tmp_path / "model"))
    rows = [renderer.conversation(each.messages) for each in ROWS]
    settings = TrainSettings(batch=60, tokens=200)
    parts = lay_out_validation(rows, settings)
    assert max(part.tokens for part in parts) <= 200
    assert sum(len(part.lengths) for part in parts) == 60
    assert sum(part.labels.numel() for part in parts) == sum(map(label_count, rows))

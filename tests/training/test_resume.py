"""Stop and resume: the same bytes after kill -9 at any moment; refused where the training or machine changed."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import run_elsewhere
from tests.hf_models import OF_2026, write_hf_model
from tests.said import SaidAndNoted
from tests.tiny import WIDE, row, write_model
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.progress import SILENT, Progress, Silent, Stopped, Task
from tunesmith.core.system import machine as memory
from tunesmith.core.system.scratch import SCRATCH
from tunesmith.engines.factory import load_model
from tunesmith.engines.hf import loading
from tunesmith.engines.native import kernels as native
from tunesmith.models.base import resolve_base
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training import train
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingResult, TrainingSpec
from tunesmith.training.steps import gradients, validation_fit

ROWS = [
    TrainingRow(f"r{n}", row(f"turn on light {n}", f'{{"n":{n},"even":{str(n % 2 == 0).lower()}}}')) for n in range(60)
]
SETTINGS = TrainSettings(rank=4, batch=4, epochs=2, learning_rate=0.01, checkpoint_seconds=1e-9, validations=2)


def written(
    folder: Path, settings: TrainSettings = SETTINGS, rows: list[TrainingRow] = ROWS, work: str = "work", **more: Any
) -> TrainingSpec:
    """The spec of a training in folder."""
    store = Store(folder / "store")
    base = resolve_base(store, str(folder / "model"), folder)
    dataset = store.put_record(Record(kind="dataset", body={"rows": 60}))
    given = {"rows": rows, "validation": ROWS[:3], "settings": settings, "work": folder / work, **more}
    return train.make_spec(base=base, dataset=dataset, **given)  # type: ignore[arg-type]


def run(
    folder: Path, settings: TrainSettings = SETTINGS, rows: list[TrainingRow] = ROWS, progress: Progress = SILENT
) -> str:
    """Train in folder; returns the digest of the trained weights."""
    store, spec = Store(folder / "store"), written(folder, settings, rows)
    blobs = store.record(train.record_training(store, spec, train.run_training(spec, progress))).blobs
    return blobs.get("adapter_model.safetensors") or blobs["model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a training that nothing interrupted, and the digest of its adapter. Never changed."""
    place = tmp_path_factory.mktemp("whole")
    write_model(place / "model")
    return place, run(place)


@pytest.fixture
def uninterrupted(finished: tuple[Path, str]) -> str:
    return finished[1]


@pytest.fixture
def trained(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A folder in which a training ended."""
    return shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / "work").glob("step-*"))


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in _steps(folder)), default=0)


class StoppedAfter(Silent):
    """Progress reports that stop the work at its n-th report."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        with super().task(name, total) as task:
            task.advance = self._advance  # type: ignore[method-assign]
            yield task

    def _advance(self, amount: float = 1.0) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stopped


def test_told_to_stop_it_keeps_the_step_and_ends_in_the_same_bytes(folder: Path, uninterrupted: str) -> None:
    """checkpoint_seconds is long: without a checkpoint at the stop, the steps before it would be lost."""
    rare = SETTINGS.model_copy(update={"checkpoint_seconds": 1000.0})
    for reports, reached in ((1, 0), (8, 7), (1, 7), (4, 10)):  # the first report comes before the first step
        with pytest.raises(Stopped):
            run(folder, rare, progress=StoppedAfter(reports))
        assert _newest(folder) == reached
    assert run(folder, rare) == uninterrupted
    full = TrainSettings(method="full", batch=4, epochs=1, learning_rate=0.01, checkpoint_seconds=1e-9)
    shutil.rmtree(folder / "work")
    whole = run(folder, full)
    shutil.rmtree(_steps(folder)[-1])
    assert run(folder, full) == whole


# Where a training is killed: as soon as it gets there, or right after ("after"). Three are within a checkpoint: between
# its two files, before it gets its name, and before older ones are removed.
_PHASES = {
    "estimate": "tunesmith.training.train.estimate",
    "between the files": "tunesmith.training.checkpoints.write_tensors after",
    "before its name": "tunesmith.training.checkpoints.os.rename",
    "after its name": "tunesmith.training.checkpoints.sync_folder",
    "saved": "tunesmith.training.train.record_training",
    "record": "tunesmith.training.train.TrainingBody",
}


def _run_killed(folder: Path, place: str) -> None:
    """Run a training that kills this process at a place of _PHASES."""
    where, _, after = place.partition(" ")
    module, _, name = where.rpartition(".")
    owner = os if module.endswith(".os") else import_module(module)
    inner = getattr(owner, name)

    def kill(*given: Any, **named: Any) -> Any:
        if after:
            inner(*given, **named)
        if "store" not in str(given[:1]) or name == "record_training":
            (folder / "reached").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **named)

    setattr(owner, name, kill)
    run(folder)


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_in_the_same_bytes(folder: Path, uninterrupted: str) -> None:
    store = Store(folder / "store")
    resolve_base(store, str(folder / "model"), folder)  # so that only the training is killed
    for phase, place in _PHASES.items():
        assert run_elsewhere(_run_killed, folder, place) == -signal.SIGKILL, phase
        (folder / "reached").unlink()
    assert run(folder) == uninterrupted
    assert not list((folder / "work").glob(f"{SCRATCH}*")), "half-written checkpoints are removed"


def test_a_spec_alone_repeats_a_training_on_a_loaded_base(folder: Path, uninterrupted: str) -> None:
    found = []
    for number, settings in enumerate((SETTINGS, SETTINGS.model_copy(update={"seed": 1}), SETTINGS)):
        spec = written(folder, settings, work=f"work-{number}")
        model = load_model(spec.base) if number == 0 else model  # noqa: F821
        result = train.run_training(TrainingSpec.model_validate_json(spec.model_dump_json()), model=model)
        found.append(digest_file(result.folder / "adapter_model.safetensors"))
    assert found[0] == found[2] == uninterrupted != found[1]
    assert {path.name for path in result.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    store, result = Store(folder / "store"), TrainingResult.model_validate_json(result.model_dump_json())
    record = store.record(train.record_training(store, spec, result))
    assert (record.blobs["adapter_model.safetensors"], record.body["steps"]) == (uninterrupted, 30)
    rows = spec.rows.path.read_bytes()
    spec.rows.path.write_bytes(rows[:-1])
    with pytest.raises(Refused, match="rows are missing or changed"):
        train.run_training(spec)
    spec.rows.path.write_bytes(rows)
    write_model(folder / "model", seed=1)
    with pytest.raises(Refused, match="base model's files are not those of digest"):
        train.run_training(spec)


@pytest.mark.parametrize("damages", [("empty", "half"), ("no state", "no JSON"), (None, "a bit")])
def test_damaged_checkpoints_are_not_used(trained: Path, uninterrupted: str, damages: tuple[str | None, str]) -> None:
    for step, damage in zip(_steps(trained), damages, strict=True):
        tensors, state = step / "tensors.safetensors", step / "state.json"
        whole = tensors.read_bytes()
        if damage == "no state":
            state.unlink()
        elif damage == "no JSON":
            state.write_text("[]")
        elif damage:
            changed = {"empty": b"", "half": whole[:1000], "a bit": whole[:-1] + bytes([whole[-1] ^ 1])}
            tensors.write_bytes(changed[damage])
    said = SaidAndNoted()
    assert run(trained, progress=said) == uninterrupted
    told = [line for line in said.lines if "damaged" in line or "resuming from step" in line]
    if damages[0] is None:
        newest = "checkpoint step-00000030 is damaged; resuming from the one before it"
        assert told == [newest, "resuming from step 29"]
    else:
        assert [line.endswith("is damaged; starting over") for line in told] == [True, True]


def test_resume_is_refused_after_changes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: dict[str, Any] = {"settings": SETTINGS.model_copy(update={"learning_rate": 0.02})}
    rows = [*ROWS[:-1], TrainingRow("r59", row("turn on light 59", '{"n":0}'))]
    for named, what in ((changed, "settings"), ({"rows": rows}, "rows")):
        with pytest.raises(Refused, match=f"started with other {what}") as told:
            run(trained, **named)
        assert "start over" in str(told.value.fix)
    with monkeypatch.context() as patch:
        patch.setattr(native, "identity", lambda: "others")
        with pytest.raises(Refused, match=r"other environment \(kernels\): "):
            run(trained)
    with monkeypatch.context() as patch:  # memory is checked again
        patch.setattr(memory, "available_memory", lambda: 1000)
        with pytest.raises(Refused, match="the largest part of a step"):
            run(trained)
    write_model(trained / "model", seed=1)
    with pytest.raises(Refused, match="other base"):
        run(trained)
    shutil.rmtree(trained / "work")
    assert run(trained, **changed)


def test_a_setting_that_is_newer_than_the_checkpoint_and_unset_changes_nothing(
    trained: Path, uninterrupted: str
) -> None:
    for step in _steps(trained):
        state = json.loads((step / "state.json").read_text())
        del state["identity"]["settings"]["quantize"]
        (step / "state.json").write_text(json.dumps(state))
    said = SaidAndNoted()
    assert run(trained, progress=said) == uninterrupted
    assert "resuming from step 30" in said.lines


def test_record_states_what_was_measured(trained: Path) -> None:
    store = Store(trained / "store")
    (digest,) = store.records_of("training")
    body = store.record(digest).body
    assert body["steps"] == 30
    assert [point["step"] for point in body["curve"]] == list(range(1, 31))
    assert [point["step"] for point in body["validation"]] == [15, 30]
    assert body["estimate"]["seconds"] > 0
    newest = _steps(trained)[-1]
    tensors = load_file(newest / "tensors.safetensors")
    assert body["estimate"]["checkpoint_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert body["checkpoint_bytes"] == sum(path.stat().st_size for path in newest.iterdir())
    assert body["labels"] < body["tokens"]
    assert body["tokens_computed"] < body["tokens"], "the shared prompt was computed once a batch"


def test_rows_that_are_too_long_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(Refused, match=r"row r0 has \d+ tokens, more than max_length 16") as caught:
        run(folder, SETTINGS.model_copy(update={"max_length": 16}))
    assert "shorten the candidate's prompt" in str(caught.value.fix)
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 16}))
    with pytest.raises(Refused, match=r"row r0 has \d+ tokens, more than the base's context length 16") as caught:
        run(folder)
    assert (caught.value.where, str(caught.value.fix)[:7]) == ("base", "shorten")


def test_progress_shows_loss_memory_and_speed(folder: Path) -> None:
    said = SaidAndNoted()
    run(folder, progress=said)
    notes = [line for line in said.lines if "of peak" in line]
    assert len(notes) == 30 - 2, "the seconds of a step that validates are not the step's alone"
    assert all(re.fullmatch(r"loss \d+\.\d{3}, \d+\.\d GB, \d+ tokens/s, \d+% of peak", note) for note in notes)
    assert any(re.search(r"about \d+ s, .* GB of memory and \d+ MB a checkpoint", line) for line in said.lines)


def test_nan_later_on_leaves_the_checkpoint_before_it(
    folder: Path, uninterrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient, a loss and a validation are no numbers, one after another; each time it carries on from there."""
    fit = validation_fit

    def spoilt(model: Any, *given: Any) -> float:
        loss, step = gradients(model, *given), next(steps)
        if (what, step) == ("gradient", 9):
            model.parameter_groups()[0].tensors[0].grad[0] = float("inf")
        return float("nan") if (what, step) == ("loss", 19) else loss

    for what, first, at in (("gradient", 0, 10), ("loss", 9, 20), ("validation", 19, 30)):
        steps = itertools.count(first)
        with monkeypatch.context() as patch:
            patch.setattr("tunesmith.training.trainer.gradients", spoilt)  # the estimate's own steps do not come here
            if what == "validation":
                nan = lambda *given, **named: fit(*given, **named) | {"loss": float("nan")}  # noqa: E731
                patch.setattr("tunesmith.training.scoring.validation_fit", nan)
            with pytest.raises(TunesmithError, match=r"became (nan|inf)") as told:
                run(folder)
        assert f"{at} of 30" in told.value.what
        assert told.value.where == "train.learning_rate"
        assert _steps(folder)[-1].name == f"step-{at - 1:08d}"
    assert run(folder) == uninterrupted


def test_what_is_no_longer_part_of_a_training_is_named(tmp_path: Path) -> None:
    """Also where the checkpoint's identity has more than the present one."""
    Checkpoints(tmp_path, {"rows": "a", "rehearsed answers": "b"}).save(1, {"0.parameter": torch.zeros(1)}, {})
    with pytest.raises(Refused, match="started with other rehearsed answers: "):
        Checkpoints(tmp_path, {"rows": "a"}).load()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"start": "pissa", "dora": True, "b_rate": 4.0}),
        ("", {"quantize": "4bit"}),
        *((f, {}) for f in OF_2026),
    ],
    ids=str,
)
def test_resumed_on_the_hf_engine_it_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    settings = SETTINGS.model_copy(update=changes)
    for name in ("whole", "stopped"):
        folder = tmp_path / name / "model"
        write_model(folder, sizes=WIDE) if "quantize" in changes else write_hf_model(folder, family)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", settings, progress=StoppedAfter(20))
    assert run(tmp_path / "stopped", settings) == run(tmp_path / "whole", settings)
    if "quantize" in changes:
        with pytest.raises(Refused, match="settings"):
            run(tmp_path / "whole", SETTINGS)
        monkeypatch.setattr(loading, "version", lambda _: "0.49.1")
        with pytest.raises(Refused, match="quantized"):
            run(tmp_path / "whole", settings)

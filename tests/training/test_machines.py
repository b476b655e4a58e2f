"""One training by two processes: the numbers of one, the same bytes again after a kill, an end where one is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.chain.scene import write_project
from tests.tiny import row, write_model
from tunesmith import chain
from tunesmith.api import Project
from tunesmith.core.errors import Refused, UsageError
from tunesmith.models import weights
from tunesmith.models.base import resolve_base
from tunesmith.models.batch import Batch
from tunesmith.models.rendering import Rendered
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training import machines, trainable
from tunesmith.training import train as training
from tunesmith.training.batches import deal, lay_out_run, lay_out_step, plan
from tunesmith.training.machines import Crew, follow, joined
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import TrainingRow

ROOT = Path(__file__).parents[2]
# Rows of unlike lengths; the last step of an epoch has one row, of which the second process has none.
ROWS = [TrainingRow(f"r{n}", row(f"turn on light {n}", f'{{"n":{n},"on":"{"yes" * (n % 5)}"}}')) for n in range(33)]
METHODS = {
    "lora": TrainSettings(rank=4, batch=4, epochs=3, validations=3, checkpoint_seconds=1e-9),
    "full": TrainSettings(method="full", batch=4, epochs=2, validations=2, tokens=128),
}
# As `tunesmith train` takes part, without a project around it; computed in fp32, where a sum's order shows least.
_SCRIPT = """
import os
import sys
from datetime import timedelta
from pathlib import Path
from tests.training.test_machines import METHODS, train_here
from tunesmith.core.progress import SILENT
from tunesmith.training import machines
folder, method, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
machines.TIMEOUT = timedelta(seconds=float(seconds))
try:
    train_here(folder, method)
except machines.TunesmithError as error:
    sys.exit(f"told: {error}")
os._exit(0)  # as tunesmith.__main__ does
"""


def train_here(folder: Path, method: str) -> str | None:
    """This process's part of a training in folder; the leader's, or only, process gets the record's digest."""
    fp32 = {"dtype": torch.float32}
    machines.load_network = trainable.load_network = lambda place: weights.load_network(place, **fp32)
    try:
        with joined() as crew:
            if crew is not None:
                (folder / f"pid-{crew.rank}").write_text(str(os.getpid()))
                if crew.rank > 0:
                    follow(crew, training.SILENT)
                    return None
            store = Store(folder / "store")
            return training.train(
                store,
                base=resolve_base(store, str(folder / "model"), folder),
                dataset=store.put_record(Record(kind="dataset", body={"rows": len(ROWS)})),
                rows=ROWS,
                validation=ROWS[:6],
                settings=METHODS[method],
                work=folder / "work",
                crew=crew,
            )
    finally:
        machines.load_network = trainable.load_network = weights.load_network


def _command(folder: Path, method: str, seconds: float = 600) -> list[str]:
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    return [str(script), str(folder), method, str(seconds)]


def _environment(**more: str) -> dict[str, str]:
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": found, "TUNESMITH_THREADS": "1", "OMP_NUM_THREADS": "1", **more}


def _torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(launcher, env=_environment(), stdout=pipe, stderr=pipe, text=True)


def _finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def _by_hand(folder: Path, seconds: float) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, which would end the other one by itself."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *_command(folder, "lora", seconds)],
            env=_environment(RANK=str(rank), **where),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _until_step(folder: Path, step: int, running: Callable[[], bool]) -> None:
    until = time.monotonic() + 90
    while running() and time.monotonic() < until:
        if any(int(path.name[5:]) >= step for path in (folder / "work").glob("step-*")):
            return
        time.sleep(0.001)
    raise AssertionError("the run was over before it was stopped: the test did not test")


def _only(folder: Path) -> Record:
    store = Store(folder / "store")
    (digest,) = store.records_of("training")
    return store.record(digest)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (blob,) = (blob for name, blob in _only(folder).blobs.items() if name.endswith(".safetensors"))
    return load_file(Store(folder / "store").blob_path(blob))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By method a folder in which two processes trained without being stopped."""
    folders = {}
    for method in METHODS:
        folders[method] = tmp_path_factory.mktemp(method)
        write_model(folders[method] / "model")
        _finish(_torchrun(_command(folders[method], method)))
    return folders


@pytest.mark.parametrize("method", list(METHODS))
def test_two_processes_end_in_the_numbers_of_one(shared: dict[str, Path], tmp_path: Path, method: str) -> None:
    write_model(tmp_path / "model")
    train_here(tmp_path, method)
    alone, both = _only(tmp_path), _only(shared[method])
    for curve in ("curve", "validation"):
        losses = [[each["loss"] for each in record.body[curve]] for record in (alone, both)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert [point["tokens"] for point in both.body["curve"]] != [point["tokens"] for point in alone.body["curve"]], (
        "each process computes the shared prompt once: were they equal, the rows would not have been shared out"
    )
    expected, found = _weights(tmp_path), _weights(shared[method])
    assert found.keys() == expected.keys()
    start = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), rtol=0, atol=1e-5), name
        if name in start:
            assert not torch.allclose(found[name].float(), start[name].float(), rtol=0, atol=1e-5), "it learned"
    assert both.body["environment"]["processes"] == 2
    assert "processes" not in alone.body["environment"]


@pytest.mark.parametrize(("gone", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_one_is_gone_the_other_says_so_and_the_next_command_carries_on(
    shared: dict[str, Path], tmp_path: Path, gone: int, how: signal.Signals
) -> None:
    write_model(tmp_path / "model")
    killed = how == signal.SIGKILL
    both = _by_hand(tmp_path, seconds=600 if killed else 10)
    try:
        _until_step(tmp_path, 2, lambda: all(process.poll() is None for process in both))
        both[gone].send_signal(how)
        _, said = both[1 - gone].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert both[1 - gone].returncode == 1
    assert "told: another process of this training ended, or did not answer for" in said
    assert "carries on from the last whole checkpoint" in said
    assert "Traceback" not in said
    assert not Store(tmp_path / "store").records_of("training")
    if killed:
        with pytest.raises(Refused, match="begun with other environment"):
            train_here(tmp_path, "lora")
        _finish(_torchrun(_command(tmp_path, "lora")))
        assert _only(tmp_path).blobs == _only(shared["lora"]).blobs


def test_where_nothing_is_due_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", _free_port())
    with ThreadPoolExecutor(2) as threads:
        leader, other = threads.map(lambda rank: Crew(rank, 2), range(2))
        waiting = threads.submit(other.called)
        assert not waiting.done()
        leader.dismiss()
        assert waiting.result(timeout=60) is None


def test_the_command_line_trains_with_others_and_the_chain_then_finds_it(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p")
    chain.build_data(Project.load(folder))
    arguments = ["-m", "tunesmith", "train", "tuned", "--json", "-C", str(folder)]
    document = json.loads(_finish(_torchrun(arguments)))
    assert document["steps"] == 9
    assert chain.train(Project.load(folder)) == document["training"], "one process trains nothing again"


def test_one_process_has_the_batches_it_always_had() -> None:
    rows = [Rendered(tuple(range(4 + n % 7)), (False, *[True] * (3 + n % 7))) for n in range(21)]
    settings = TrainSettings(batch=4, epochs=2, tokens=64)
    before = [
        lay_out_step([rows[place] for place in batch], settings.tokens)
        for epoch in range(2)
        for batch in plan(rows, settings.batch, settings.seed, epoch)
    ]
    dealt = lay_out_run(rows, settings, 1)
    assert all(len(step) == 1 for step in dealt)
    assert [[_plain(part) for part in step[0]] for step in dealt] == [[_plain(x) for x in step] for step in before]


def _plain(batch: Batch) -> tuple[object, ...]:
    return (batch.ids.tolist(), batch.prefix, batch.lengths, batch.predicts.tolist(), batch.labels.tolist())


@given(st.lists(st.integers(2, 400), min_size=1, max_size=40), st.integers(1, 6))
def test_every_row_is_dealt_once_and_evenly(lengths: list[int], processes: int) -> None:
    rows = [Rendered(tuple([place] * length), (True,) * length) for place, length in enumerate(lengths)]
    shares = deal(rows, processes)
    assert sorted(row.ids[0] for share in shares for row in share) == list(range(len(rows)))
    tokens = [sum(len(row.ids) for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert shares[0], "the first process always has something"


@pytest.mark.parametrize("changed", ["threads", "base", "start", "processes"])
def test_a_process_that_would_compute_otherwise_is_refused(changed: str) -> None:
    own = {"base": {"model.safetensors": "sha256:1"}, "start": "sha256:2", **training.environment(2)}
    machines.check_alike(json.loads(json.dumps(own)), own)
    with pytest.raises(Refused, match=f"another {changed} than the first one"):
        machines.check_alike({**own, changed: "other"}, own)
    with pytest.raises(Refused, match=f"another {changed} than the first one"):
        machines.check_alike({key: value for key, value in own.items() if key != changed}, own)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
    ],
)
def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with joined() as crew:
        assert crew is None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="as torchrun sets it"), joined():
        pass

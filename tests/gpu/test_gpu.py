"""`pytest -m gpu`: training, answers and servers on a GPU, compared with the CPU. Skipped where torch sees none."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_models import base_of_family
from tests.tiny import WIDE, row, write_model
from tests.training.test_resume import ROWS
from tunesmith.core.progress import Stopped
from tunesmith.engines.batch import lay_out
from tunesmith.engines.device import backends, computing_device, gpu_present
from tunesmith.engines.factory import load_model, open_engine
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import LoraTrainable
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.protocol import Engine, Generation, Question
from tunesmith.engines.ranks import connected_ranks
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.training_protocol import LoadedModel
from tunesmith.models.base import Base, resolve_base
from tunesmith.models.rendering import Renderer
from tunesmith.services.home import examine_gpu
from tunesmith.store.store import Store
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.schedule import TrainerState
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingResult
from tunesmith.training.steps import gradients, make_optimizer, update
from tunesmith.training.train import make_spec, run_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_present(), reason="torch sees no GPU here")]

FAMILIES = ("llama", "phi3")
REQUESTS = [Generation((row(f"turn on light {n}", "")[1],), max_tokens=12) for n in range(8)]
QUESTIONS = [Question((row(f"is light {n} on?", "")[1],), ("yes", "not")) for n in range(4)]


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    return base_of_family(tmp_path, request.param)


def train(
    base: Base, work: Path, loaded: LoadedModel | None = None, *, stop_at: int | None = None, **settings: Any
) -> TrainingResult:
    """Two epochs of 24 rows. stop_at: the step after which it is stopped."""
    stated = {"batch": 4, "epochs": 2, "learning_rate": 0.01, "precision": "fp32", "checkpoint_seconds": 1e-9}
    if settings.get("method") != "full":
        stated["rank"] = 4
    made = make_spec(
        base=base,
        dataset="",
        rows=ROWS[:24],
        validation=ROWS[50:],
        settings=TrainSettings.model_validate({**stated, **settings}),
        work=work,
        engine="hf",
    )

    def watch(state: TrainerState, _: object) -> None:
        if state.step == stop_at:
            raise Stopped

    return run_training(made, model=loaded, watch=watch)


def losses(result: TrainingResult) -> list[float]:
    return [step.loss for step in result.body.curve]


@pytest.mark.parametrize(
    ("settings", "apart"),
    [({}, 1e-3), ({"precision": "bf16"}, 0.05), ({"recompute": True}, 1e-3), ({"attention": "eager"}, 1e-3),
     ({"method": "full"}, 1e-3)], ids=str,
)  # fmt: skip
def test_a_training_has_the_losses_of_the_cpu(
    base: Base, tmp_path: Path, settings: dict[str, Any], apart: float
) -> None:
    gpu, cpu = LoadedHFModel(base), LoadedHFModel(base, torch.device("cpu"))
    assert gpu.trainable(TrainSettings(rank=4), seed=0, state_bytes=16).device == computing_device()
    expected = losses(train(base, tmp_path / "cpu", cpu, **{**settings, "precision": "fp32"}))
    found = train(base, tmp_path / "gpu", gpu, **settings)
    assert losses(found) == pytest.approx(expected, rel=apart)
    assert losses(found)[-1] < 0.9 * losses(found)[0]
    assert 0 < found.body.peak_memory_bytes <= DeviceMemory(computing_device()).peak()
    scores = [torch.tensor(loaded.engine().choose(QUESTIONS)) for loaded in (gpu, cpu)]
    torch.testing.assert_close(*scores, rtol=0.04, atol=0.4)  # a GPU answers in bf16


def test_a_stopped_training_goes_on(base: Base, tmp_path: Path) -> None:
    expected = losses(train(base, tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(base, tmp_path / "stopped", stop_at=5)
    assert [*(tmp_path / "stopped").glob("step-*")], "a checkpoint is there"
    assert losses(train(base, tmp_path / "stopped")) == pytest.approx(expected, abs=1e-3)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_base_in_4_bits_learns_and_its_adapter_answers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "wide", sizes=WIDE)
    base = resolve_base(Store(tmp_path / "store"), str(folder), tmp_path)
    found = train(base, tmp_path / "work", quantize="4bit", precision="bf16")
    assert losses(found)[-1] < 0.95 * losses(found)[0]
    engine = load_model(base, "hf").engine()
    engine.load_adapter("adapter", found.folder)
    assert all(each.text for each in engine.generate(REQUESTS, "adapter"))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    place = (tmp_path / "meeting").as_uri()
    torch.distributed.init_process_group(backends(), init_method=place, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2_on_one_gpu_has_the_losses_of_one_process(base: Base, one_rank: None) -> None:
    settings = TrainSettings(rank=4, precision="fp32", learning_rate=0.01)
    sharded = LoraTrainable(HFModel(base, late=True), settings, seed=1)
    sharded._model.shard(connected_ranks(), drawn=(f".{sharded.adapter}.",))
    sharded.parameters = sharded._model.adapter_parameters(sharded.adapter)
    step = [lay_out([Renderer(base.folder).conversation(each.messages) for each in ROWS[:4]], share=False)]
    found = []
    for model in (sharded, LoadedHFModel(base).trainable(settings, seed=1, state_bytes=16)):
        optimizer = make_optimizer(model, settings)
        found.append([(gradients(model, CrossEntropy(), step), update(model, optimizer, 0.01, 1.0)) for _ in range(4)])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-5)
    assert found[0][-1] < found[0][0], "it learns"


@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not on PATH")
def test_vllm_scores_an_adapter_as_hf_does(tmp_path: Path) -> None:
    base = base_of_family(tmp_path, "llama")
    trained = train(base, tmp_path / "work", precision="bf16")
    flags = ("--gpu-memory-utilization", "0.5")  # this process has some of it, too
    settings = VllmSettings(kind="vllm", start=1, flags=flags, adapters=str(tmp_path / "adapters"))
    engines: list[Engine] = [open_engine(base, settings), load_model(base, "hf").engine()]
    for engine in engines:
        engine.load_adapter("adapter", trained.folder)
    mine, theirs = (torch.tensor(engine.choose(QUESTIONS, "adapter")) for engine in engines)
    torch.testing.assert_close(mine, theirs, rtol=0.04, atol=0.4)


def test_doctor_accepts_the_gpu() -> None:
    found = examine_gpu()
    assert found.ok, found

"""The device that computes, the engines that train and answer on it, workers of Ray, and what doctor says of it."""

import json
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.hf_models import base_of_family
from tests.said import Said
from tunesmith.cli.main import app
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.system import machine as memory
from tunesmith.engines import device, factory, on_ray
from tunesmith.engines.device import backends, computing_device, device_name, gpu_present, stated_peak
from tunesmith.engines.factory import open_engine
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.on_ray import RayEngine
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.protocol import Generation, Question
from tunesmith.engines.settings import EngineSettings, RaySettings, VllmSettings, WeightSettings
from tunesmith.models.base import Base
from tunesmith.project import ProjectSettings, parse_settings
from tunesmith.services.home import examine, examine_gpu
from tunesmith.training import gpu_step
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.gpu_step import Figure, compare_step
from tunesmith.training.launchers import _fit, _Written
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.skipif(gpu_present(), reason="about machines without a GPU")
def test_without_a_gpu_the_cpu_computes_and_doctor_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (computing_device(), backends(), device_name(CPU)) == (CPU, "gloo", "CPU")
    monkeypatch.setattr(device, "_DRIVERS", (tmp_path / "version",))
    assert device.describe_gpus() == ("none: the CPU computes", None)
    with pytest.raises(Refused, match="torch sees no GPU") as refused:
        examine_gpu()
    assert "on a machine with a GPU" in str(refused.value.fix)
    (tmp_path / "version").write_text("NVRM version: 550.54.15\nGCC version: 12\n")
    found, wrong = device.describe_gpus()
    assert found == f"torch {torch.__version__} sees none, but a driver is here (NVRM version: 550.54.15)"
    assert wrong is not None
    with pytest.raises(Refused, match="a driver is here") as refused:
        examine_gpu()
    assert "build of PyTorch" in str(refused.value.fix)
    checks = {check.name: check for check in examine(tmp_path).checks}
    assert (checks["gpus"].ok, checks["gpus"].fix) == (False, wrong)
    assert "bitsandbytes" in checks["extras"].detail
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert [DeviceMemory(CPU).available(sharing=n) for n in (1, 4)] == [1000, 250], "processes share the machine's"
    DeviceMemory(CPU).reset_peak()
    assert DeviceMemory(CPU).peak() > 1 << 20


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="process 3 on this machine has no GPU: torch sees 2"):
        computing_device.__wrapped__()


def test_full_memory_is_told_with_what_may_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of_family(tmp_path, "gpt2")
    trained = LoadedHFModel(base).trainable(WeightSettings(rank=2), seed=1, state_bytes=16)
    settings, checkpoints = TrainSettings(learning_rate=0.01), Checkpoints(tmp_path / "work", {})
    trainer = Trainer(trained, [[]], settings, checkpoints, objective=CrossEntropy())

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB.")

    monkeypatch.setattr("tunesmith.training.trainer.gradients", full)
    with pytest.raises(TunesmithError, match="memory is full at step 1 of 1: CUDA out of memory") as raised:
        trainer.run()
    assert "recompute: true" in str(raised.value.fix)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(Refused, match="weights do not fit into the memory of cpu: CUDA out of memory") as refused:
        HFModel(base)
    assert "quantize: 4bit" in str(refused.value.fix)


def test_doctor_lists_gpus_with_driver_and_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say of two GPUs, without any."""
    (tmp_path / "version").write_text("NVRM version: 550.54.15\n")
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30)
    monkeypatch.setattr(device, "_DRIVERS", (tmp_path / "version",))
    monkeypatch.setattr(device, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 26, 2))
    found, wrong = device.describe_gpus()
    assert wrong is None
    assert found.startswith("NVIDIA H100 80GB HBM3, 80 GiB; NVIDIA H100 80GB HBM3, 80 GiB; NVRM version: 550.54.15; ")
    assert found.endswith("; NCCL 2.26.2")


def test_a_card_has_the_peak_that_its_maker_states() -> None:
    assert stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    for unknown in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "L"):
        assert stated_peak(unknown) is None


# doctor --gpu: the step that it compares, what it says, and that it is refused without a GPU


def test_a_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU: in fp32 its figures are the same, in bf16 they are rounded."""
    monkeypatch.setattr(gpu_step, "computing_device", lambda: torch.device("cpu"))
    found = compare_step()
    assert [each.name for each in found["fp32"]] == ["loss", "gradient", "loss after it"]
    assert max(each.difference for each in found["fp32"]) == 0
    assert 0 < max(each.difference for each in found["bf16"]) <= gpu_step.ACCEPTED["bf16"]
    loss, gradient, after = (each.gpu for each in found["fp32"])
    assert gradient > 0
    assert after < loss, "the step learns"


@pytest.mark.parametrize(
    ("wrong", "code", "fix"), [(1.0009, 0, None), (1.002, 1, "another driver"), (math.nan, 1, "x")]
)
def test_it_says_what_differs_and_by_how_much(
    monkeypatch: pytest.MonkeyPatch, wrong: float, code: int, fix: str | None
) -> None:
    monkeypatch.setattr("tunesmith.engines.device.gpu_present", lambda: True)
    monkeypatch.setattr("tunesmith.engines.device.describe_gpus", lambda: ("a card", None))
    monkeypatch.setattr("tunesmith.engines.device.device_name", lambda _: "Card 1")
    monkeypatch.setattr("tunesmith.engines.device.computing_device", lambda: None)
    figures = {"fp32": [Figure("loss", 2.0 * wrong, 2.0), Figure("gradient", 1.0, 1.0)], "bf16": [Figure("loss", 2, 2)]}
    monkeypatch.setattr(gpu_step, "compare_step", lambda: figures)
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (code, code == 0)
    gpu, fp32, bf16 = found["checks"]
    assert (gpu["detail"], fp32["ok"], bf16["ok"]) == ("Card 1", code == 0, True)
    assert fp32["detail"].startswith(f"loss {2.0 * wrong:.6g}, on the CPU 2; gradient 1, on the CPU 1: ")
    assert "(accepted: 0.001)" in fp32["detail"]
    assert (fp32["fix"] is None) == (fix is None)


# Which engine trains and which answers, by engine: of the project file, the base's family and a GPU


FOUR_BITS = {"quantize": "4bit"}
Engines = tuple[str, str]  # what trains, what answers


@pytest.mark.parametrize(
    ("family", "train", "weights", "ranks", "gpu", "expected"),
    [
        ("llama", "auto", {}, 1, False, ("native", "native")),
        ("llama", "auto", {}, 1, True, ("hf", "hf")),
        ("llama", "auto", FOUR_BITS, 1, False, ("hf", "native")),
        ("llama", "auto", {"dora": True}, 1, False, ("hf", "native")),
        ("llama", "auto", {"precision": "fp32"}, 1, False, ("hf", "native")),
        ("llama", "native", {"precision": "bf16"}, 1, False, ("native", "native")),
        ("llama", "auto", {"start": "pissa"}, 1, False, ("hf", "native")),
        ("llama", "auto", {}, 2, False, ("hf", "native")),
        ("gpt2", "auto", {}, 1, False, ("hf", "hf")),
        ("llama", "hf", {}, 1, False, ("hf", "native")),
        ("llama", "hf", {}, 1, True, ("hf", "hf")),
        ("llama", "native", {}, 1, True, ("native", "native")),
    ],
)
def test_settings_family_and_gpu_choose(
    monkeypatch: pytest.MonkeyPatch, family: str, train: Any, weights: Any, ranks: int, gpu: bool, expected: Engines
) -> None:
    monkeypatch.setattr(factory, "gpu_present", lambda: gpu)
    settings = EngineSettings(train=train)
    trains = factory.training_engine(family, WeightSettings(**weights), settings, ranks=ranks)
    assert (trains, factory.answering_engine(family, settings)) == expected


@pytest.mark.parametrize(
    ("family", "weights", "ranks", "said"),
    [
        ("gpt2", {}, 1, "does not compute the family 'gpt2'"),
        ("llama", FOUR_BITS, 1, r"4 bits, which candidates\.tuned\.train\.quantize asks for"),
        ("llama", {}, 2, "trains in one process"),
    ],
)
def test_the_native_engine_is_refused_by_name(family: str, weights: dict[str, Any], ranks: int, said: str) -> None:
    native = EngineSettings(train="native")
    with pytest.raises(Refused, match=f"the native engine .*{said}") as refused:
        factory.check_weight_settings(family, WeightSettings(**weights), "candidates.tuned.train", native, ranks=ranks)
    assert refused.value.where == "engine.train"


def _parsed(engine: str) -> ProjectSettings:
    data = "{sources: [{path: rows.jsonl, licence: MIT}]}"
    return parse_settings(f"name: p\nbase: model\ndata: {data}\ncandidates: {{c: {{}}}}\n{engine}", "tunesmith.yaml")


def test_a_server_and_the_training_engine_are_set_in_one_place() -> None:
    assert _parsed("").engine == EngineSettings()
    assert _parsed("engine: {train: hf}").engine == EngineSettings(train="hf")
    server = _parsed('engine: {kind: vllm, url: "http://127.0.0.1:1", train: native}')
    assert server.engine == server.server == VllmSettings(kind="vllm", url="http://127.0.0.1:1", train="native")
    assert _parsed("engine: {train: hf}").server is None


def test_on_a_ray_cluster_the_workers_resources_say_whether_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own machine does not."""
    flash = WeightSettings(attention="flash_attention_2")
    for gpu in (False, True):
        monkeypatch.setattr(factory, "gpu_present", lambda gpu=gpu: gpu)
        monkeypatch.setattr("tunesmith.engines.hf.support.gpu_present", lambda gpu=gpu: gpu)
        on_gpus = EngineSettings.model_validate({"ray": {"workers": 1, "resources": {"GPU": 1}}})
        on_cpus = EngineSettings.model_validate({"ray": {"workers": 1}})
        assert factory.training_engine("llama", WeightSettings(), on_gpus) == "hf"
        assert factory.training_engine("llama", WeightSettings(), on_cpus) == "native"
        with pytest.raises(Refused, match="computes on a GPU"):
            factory.check_weight_settings("gpt2", flash, "train", on_cpus)
        with pytest.raises(UsageError, match="needs flash_attn, which is not installed"):
            factory.check_weight_settings("gpt2", flash, "train", on_gpus)


# Requests shared over workers of Ray, with a stand-in for Ray. A real cluster: tests/pipeline/test_together.py


class _Lost(Exception):
    """What Ray raises for a worker that ended."""


class _TaskFailed(_Lost):
    """What Ray raises for an error in a worker."""


class _StandIn:
    """Runs workers in this process. dies: the numbers of the calls during which the worker ends."""

    exceptions = SimpleNamespace(RayError=_Lost, RayTaskError=_TaskFailed)

    def __init__(self, dies: frozenset[int] = frozenset()) -> None:
        self.dies, self.calls, self.started, self.ended = dies, 0, 0, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def nodes(self) -> list[str]:
        return ["this machine"]

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]  # the newest first, so that answers come out of order

    def get(self, reference: Any) -> Any:
        return reference() if callable(reference) else reference

    def kill(self, _worker: Any) -> None:
        self.ended += 1

    def remote(self, kind: type) -> Any:
        def start() -> Any:
            self.started += 1
            worker = kind()
            return SimpleNamespace(load=self._method(worker.load), answer=self._method(worker.answer))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def _method(self, method: Callable[..., Any]) -> Any:
        def call(*given: Any) -> Callable[[], Any]:
            self.calls += 1
            number = self.calls

            def result() -> Any:
                if number in self.dies:
                    raise _Lost
                return method(*given)

            return result

        return SimpleNamespace(remote=call)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return base_of_family(tmp_path, "llama")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[_StandIn], _StandIn]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a worker sets it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def use(ray: _StandIn) -> _StandIn:
        monkeypatch.setattr(on_ray, "connected", lambda *_: nullcontext(ray))
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return use


def _requests(count: int) -> list[Generation]:
    texts = [f"turn on light {number}" for number in range(count)]
    return [Generation((Message(role="user", content=text),), max_tokens=4) for text in texts]


@pytest.mark.parametrize(
    "dies", [frozenset[int](), frozenset({2}), frozenset({4, 5})], ids=["none", "loads", "answers"]
)
def test_the_answers_of_this_process_in_their_order(
    base: Base, cluster: Callable[[_StandIn], _StandIn], dies: frozenset[int]
) -> None:
    ray, heard, here = cluster(_StandIn(dies)), Said(), open_engine(base)
    engine = RayEngine(base, "native", RaySettings(workers=2), heard)
    requests = _requests(9)
    assert engine.generate(requests) == here.generate(requests)
    assert list(engine.stream(requests[0]))[-1] == here.generate(requests[:1])[0]
    questions = [Question(request.messages, ("yes", "no")) for request in requests]
    for ours, theirs in zip(engine.choose(questions), here.choose(questions), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert ray.started == 2 + len(dies)
    assert len(heard.lines) == len(dies)


def test_workers_that_keep_ending_are_given_up(base: Base, cluster: Callable[[_StandIn], _StandIn]) -> None:
    cluster(_StandIn(frozenset(range(100))))
    with pytest.raises(Refused, match="5 workers with 1 CPU each, and the Ray cluster has 4 CPU"):
        RayEngine(base, "native", RaySettings(workers=5)).generate(_requests(1))
    with pytest.raises(TunesmithError, match="4 workers that answer ended"):
        RayEngine(base, "native", RaySettings(workers=2)).generate(_requests(4))


def test_a_request_that_cannot_be_answered(base: Base, cluster: Callable[[_StandIn], _StandIn]) -> None:
    """As in this process; the workers end, and the next call starts others."""
    ray = cluster(_StandIn())
    engine = RayEngine(base, "native", RaySettings(workers=2))
    long = Generation((Message(role="user", content="light " * 2000),), max_tokens=4)
    with pytest.raises(UsageError):
        engine.generate([*_requests(3), long])
    assert len(engine.generate(_requests(2))) == 2
    assert ray.started == 4
    engine.release()
    with pytest.raises(Refused, match="not loaded"):
        engine.generate(_requests(1), "unknown")


# The command that trains on a Ray cluster, while it waits


def test_it_shows_what_rank_0_says_and_an_error_of_it_ends_the_wait(tmp_path: Path) -> None:
    """The other ranks would wait for rank 0, and Ray for them."""
    never, heard = threading.Event(), Said()

    def fit() -> SimpleNamespace:
        _Written(tmp_path / "progress.txt").say("step 1")
        return SimpleNamespace(return_value="sha256:1")

    def fail() -> None:
        error = Refused("the loss is not a number", where="step 3", fix="lower the rate")
        (tmp_path / "failed.json").write_text(json.dumps(error.as_json()["error"]))
        never.wait()

    assert (_fit(SimpleNamespace(fit=fit), tmp_path, heard), heard.lines) == ("sha256:1", ["step 1"])
    with pytest.raises(Refused, match="not a number") as raised:
        _fit(SimpleNamespace(fit=fail), tmp_path, heard)
    assert (raised.value.where, raised.value.fix) == ("step 3", "lower the rate")
    never.set()

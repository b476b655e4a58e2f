"""What a training will take and takes: refused beforehand where it does not fit, and shown while it runs."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tiny import TILED, row, write_model
from tests.trained import full_model, gradients, lora_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.system import memory
from tunesmith.core.system.threads import wanted_threads
from tunesmith.engines.batch import Batch, lay_out
from tunesmith.engines.device import DeviceMemory
from tunesmith.engines.native.adapters import costs
from tunesmith.engines.native.adapters.trainable import NativeTrainable
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Renderer
from tunesmith.training.batches.batch_plan import Step, lay_out_step, step_tokens
from tunesmith.training.estimates.estimate import MemoryNeeds, check_disk, check_memory, estimate
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import drop_gradients

CPU = DeviceMemory(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def _step(folder: Path, more: int = 20) -> Step:
    renderer = Renderer(folder)
    return lay_out_step(
        [renderer.conversation(row(f"light {n}", f'{{"on":{n}}}' + " and so on" * more)) for n in range(8)], 8192
    )


def test_too_large_step_is_refused_before_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tried = _step(folder), 0

    def trial(_: Step) -> None:
        nonlocal tried
        tried += 1

    def free(count: int, later: int) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda: count)
        estimate([step], 0, 1, trial, MemoryNeeds(CPU, lambda part: 1000 * part.tokens, later, 0, "train.layers"))

    needed = 1000 * step[0].tokens
    with pytest.raises(Refused, match=r"the largest part of a step \(\d+ tokens\) takes about") as refused:
        free(needed - 1, 0)
    assert refused.value.where == "train.tokens"
    with pytest.raises(Refused, match="optimiser's state"):
        free(needed + 499, 500)
    assert not tried
    free(needed + 500, 500)
    assert tried


def test_a_step_s_time_has_no_validation_in_it(folder: Path) -> None:
    steps, now = [_step(folder), _step(folder, 40), _step(folder, 40)], 0.0

    def trial(step: Step) -> None:
        nonlocal now
        now += step_tokens(step) / 1000  # a thousand tokens a second

    found = estimate(steps, 3000, 16, trial, MemoryNeeds(CPU, lambda _: 0, 0, 0, "train.layers"), clock=lambda: now)
    tokens = sum(map(step_tokens, steps))
    assert found.step_seconds == pytest.approx(tokens / 3 / 1000)
    assert found.seconds == pytest.approx((tokens + 16 * 3000 / 3) / 1000), "forward passes take a third"


def _model(network: Network, settings: TrainSettings, folder: Path) -> NativeTrainable:
    return full_model(network, settings, folder) if settings.method == "full" else lora_model(network, settings)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _existing(model: NativeTrainable, network: Network, batch: Batch) -> set[int]:
    """Storages that are there before a forward pass: weights, copies of what is trained, the batch."""
    found = [*model.masters, batch.ids, batch.predicts]
    for each in (network, model.network):
        found += [each.embedding, each.final_norm]
        for layer in each.layers:
            found += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            found += [product._forward for product in layer.linear.values()]
    return {_storage(tensor) for tensor in found}


WAYS: list[dict[str, Any]] = [{}, {"layers": 1}, {"method": "full"}, {"method": "full", "layers": 2}]
FAMILIES, DTYPES = ("llama", "qwen3", "gemma2", "mistral-window"), (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "family", "dtype"),
    [(way, FAMILIES[(n + turn) % 4], DTYPES[turn]) for n, way in enumerate(WAYS) for turn in (0, 1)],
)
def test_kept_bytes_are_what_autograd_saves(
    tmp_path: Path, settings: dict[str, Any], family: str, dtype: torch.dtype
) -> None:
    folder = write_model(tmp_path / "model", family, sizes=TILED)
    network, train = load_network(folder, dtype), TrainSettings(**settings)
    model, (batch,) = _model(network, train, folder), _step(folder)
    existing, saved = _existing(model, network, batch), dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in existing:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(model, [batch])
    assert costs.kept_bytes(model.network, batch, model.first, model.kept_numbers()) == sum(saved.values())


@pytest.mark.parametrize(("settings", "dtype"), [(way, DTYPES[n % 2]) for n, way in enumerate(WAYS[:2])])
def test_memory_estimate_covers_what_is_allocated(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "model", sizes=TILED)
    network = load_network(folder, dtype)
    model, (batch,) = lora_model(network, TrainSettings(**settings)), _step(folder)
    gradients(model, [batch])  # lays the weights out for gradients, which happens once
    drop_gradients(model)
    estimated = model.memory_estimate(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients(model, [batch])
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    allocated = max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))
    assert allocated <= estimated <= 1.1 * allocated


def test_flops_count_forward_backward_and_trained_products(folder: Path) -> None:
    network, batch = load_network(folder, torch.float32), _step(folder)[0]
    linear = [sum(product.numel() for product in layer.linear.values()) for layer in network.layers]
    head, tokens, labels = network.head.numel(), batch.tokens, batch.labels.numel()
    full = full_model(network, TrainSettings(method="full"), folder)
    assert full.flops(batch) == 6 * (tokens * sum(linear) + labels * head)
    lora = lora_model(network, TrainSettings())
    assert lora.flops(batch) == tokens * (4 * sum(linear) + 6 * lora.trained_numbers) + 4 * labels * head
    last = lora_model(network, TrainSettings(layers=1))
    once = 2 * sum(linear) + 2 * linear[-1] + 6 * last.trained_numbers
    assert last.flops(batch) == tokens * once + 4 * labels * head
    assert lora.peak_flops(batch) == lora.peak_flops(batch), "measured once"


def test_advised_tokens_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(folder)
    plan = [[lay_out([renderer.conversation(row("light", "on" * more))])] for more in (20, 40, 200)]
    sizes = [step[0].tokens for step in plan]
    needs = MemoryNeeds(CPU, lambda part: 1000 * part.tokens, 0, 0, "train.layers")
    assert check_memory(plan, needs).tokens == sizes[2]
    monkeypatch.setattr(memory, "available_memory", lambda: 1000 * sizes[1])
    with pytest.raises(Refused) as refused:
        check_memory(plan, needs)
    assert str(refused.value.fix).startswith(f"set tokens to {sizes[1]}, ")
    with pytest.raises(Refused) as refused:
        check_memory(plan, needs._replace(may_recompute=True))
    assert str(refused.value.fix).startswith(f"set recompute: true, or tokens to {sizes[1]}, ")
    check_memory(plan[:2], needs)


def test_copies_of_a_scored_validation_take_the_place_of_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [_step(folder)]
    batch = 10**6 * plan[0][0].tokens
    needs = MemoryNeeds(CPU, lambda part: 10**6 * part.tokens, 500, 0, "train.layers", copies=3 * batch)
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * batch + 500)
    check_memory(plan, needs)
    expected = estimate(plan, 0, 1, lambda _: None, needs).peak_memory_bytes
    assert expected - estimate(plan, 0, 1, lambda _: None, needs._replace(copies=0)).peak_memory_bytes > batch
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * batch + 500)
    check_memory(plan, needs._replace(copies=batch))
    with pytest.raises(Refused, match="copies that a scored validation makes"):
        check_memory(plan, needs)


def test_full_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    check_disk(tmp_path / "work", MemoryNeeds(CPU, lambda _: 0, 0, 1000, "train.layers"))
    with pytest.raises(Refused, match="2 checkpoints and the next one take") as refused:
        check_disk(tmp_path / "work" / "not there", MemoryNeeds(CPU, lambda _: 0, 0, 1 << 60, "train.layers"))
    assert "train.layers" in str(refused.value.fix)


_VERSION_2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 100\n"}
_VERSION_1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "700\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("told", "place", "files", "left"),
    [
        ("0::/a/b", "a", _VERSION_2, [400]),  # a limit of a group above
        ("0::/", "", _VERSION_2, [400]),
        ("0::/shown/as/outside", "", _VERSION_2, [400]),
        ("0::/a", "a", {**_VERSION_2, "memory.max": "max\n"}, []),
        ("7:cpu:/a\n4:memory:/a", "memory/a", _VERSION_1, [400]),
        ("0::/", "", {}, []),
    ],
)
def test_memory_left_in_a_control_group(
    tmp_path: Path, told: str, place: str, files: dict[str, str], left: list[int]
) -> None:
    (tmp_path / "mount" / "a" / "b").mkdir(parents=True)
    (tmp_path / "mount" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(told + "\n")
    for name, text in files.items():
        (tmp_path / "mount" / place / name).write_text(text)
    assert memory._group_memory(tmp_path / "cgroup", tmp_path / "mount") == left
    assert memory._group_memory(tmp_path / "none", tmp_path / "mount") == []


@pytest.mark.parametrize("told", ["two", "-1", "1.5"])
def test_wrong_thread_count_is_refused(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("TUNESMITH_THREADS", told)
    with pytest.raises(UsageError, match="not a number of threads") as refused:
        wanted_threads()
    assert refused.value.where == "TUNESMITH_THREADS"

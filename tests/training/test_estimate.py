"""What a training will take and takes: refused beforehand where it does not fit, and shown while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import row, write_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.threads import wanted_threads
from tunesmith.engines.batch import lay_out
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.full import Full
from tunesmith.engines.native.adapters.lora import Lora
from tunesmith.engines.native.network.network import Network
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Renderer
from tunesmith.training.batch_plan import lay_out_step
from tunesmith.training.estimate import Needs, check_disk, check_room, estimate, step_bytes
from tunesmith.training.settings import TrainSettings
from tunesmith.training.speed import matrix_limit, step_flops
from tunesmith.training.trainable import Trainable
from tunesmith.training.trainer import Step, gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def _step(folder: Path, more: int = 20) -> Step:
    renderer = Renderer(folder)
    return lay_out_step(
        [renderer.conversation(row(f"light {n}", f'{{"on":{n}}}' + " and so on" * more)) for n in range(8)], 8192
    )


def _trained(network: Network, settings: TrainSettings, folder: Path) -> Trainable:
    return Full(network, settings, folder) if settings.method == "full" else Lora(network, settings)


def test_what_does_not_fit_is_refused_before_it_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tried = _step(folder), 0

    def trial(_: Step) -> None:
        nonlocal tried
        tried += 1

    def free(count: int, later: int) -> None:
        monkeypatch.setattr(runtime, "available_memory", lambda: count)
        estimate([step], 0, 1, trial, Needs(lambda part: 1000 * part.tokens, later, 0, "train.layers"))

    needed = 1000 * step[0].tokens
    with pytest.raises(Refused, match=r"the largest part of a step \(\d+ tokens\) takes about") as refused:
        free(needed - 1, 0)
    assert refused.value.where == "train.tokens"
    with pytest.raises(Refused, match="optimiser's state"):
        free(needed + 499, 500)
    assert not tried
    free(needed + 500, 500)
    assert tried


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"method": "full"}])
def test_the_prediction_is_near_what_the_backward_pass_keeps(folder: Path, settings: dict[str, Any]) -> None:
    """Held against what autograd saves, told tensor by tensor, each storage once."""
    network, train = load_network(folder, torch.float32), TrainSettings(**settings)
    trained, (part,) = _trained(network, train, folder), _step(folder)
    kept: dict[int, int] = {}
    weights = {x.untyped_storage().data_ptr() for x in (*trained.masters, trained.network.embedding)}
    if isinstance(trained, Full):
        weights |= {copy.untyped_storage().data_ptr() for copy in trained._copies}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradients(trained.network, trained, [part])
    said = step_bytes(trained.network, trained, train, part) - sum(master.nbytes for master in trained.masters)
    assert 0.6 * sum(kept.values()) < said < 1.7 * sum(kept.values())


def test_flops_are_six_for_a_number_and_token_less_what_frozen_weights_save(folder: Path) -> None:
    network = load_network(folder, torch.float32)
    linear = [sum(product.numel() for product in layer.linear.values()) for layer in network.layers]
    head = network.head.numel()
    full = TrainSettings(method="full")
    assert step_flops(network, 0, full, 10, 3) == 6 * (10 * sum(linear) + 3 * head)
    assert step_flops(network, 7, TrainSettings(), 10, 3) == 10 * (4 * sum(linear) + 6 * 7) + 4 * 3 * head
    last = TrainSettings(layers=1)
    assert step_flops(network, 7, last, 10, 3) == 10 * (2 * sum(linear) + 2 * linear[-1] + 6 * 7) + 4 * 3 * head
    assert matrix_limit(network, 100) == matrix_limit(network, 100), "measured once"


def test_what_is_told_to_set_does_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(folder)
    plan = [[lay_out([renderer.conversation(row("light", "on" * more))])] for more in (20, 40, 200)]
    sizes = [step[0].tokens for step in plan]
    needs = Needs(lambda part: 1000 * part.tokens, 0, 0, "train.layers")
    assert check_room(plan, needs).tokens == sizes[2]
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000 * sizes[1])
    with pytest.raises(Refused) as refused:
        check_room(plan, needs)
    assert str(sizes[1]) in str(refused.value.fix)
    check_room(plan[:2], needs)


def test_a_disk_without_room_for_checkpoints_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    check_disk(tmp_path / "work", Needs(lambda _: 0, 0, 1000, "train.layers"))
    with pytest.raises(Refused, match="2 checkpoints and the next one take") as refused:
        check_disk(tmp_path / "work" / "not there", Needs(lambda _: 0, 0, 1 << 60, "train.layers"))
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
def test_what_a_container_may_still_take(
    tmp_path: Path, told: str, place: str, files: dict[str, str], left: list[int]
) -> None:
    (tmp_path / "mount" / "a" / "b").mkdir(parents=True)
    (tmp_path / "mount" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(told + "\n")
    for name, text in files.items():
        (tmp_path / "mount" / place / name).write_text(text)
    assert runtime._group_memory(tmp_path / "cgroup", tmp_path / "mount") == left
    assert runtime._group_memory(tmp_path / "none", tmp_path / "mount") == []


@pytest.mark.parametrize("told", ["two", "-1", "1.5"])
def test_a_number_of_threads_that_is_none(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("TUNESMITH_THREADS", told)
    with pytest.raises(UsageError, match="no number of threads") as refused:
        wanted_threads()
    assert refused.value.where == "TUNESMITH_THREADS"

"""What a training will take and takes: refused beforehand where it does not fit, and shown while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import row, write_model
from tunesmith.core.errors import Refused
from tunesmith.models import runtime
from tunesmith.models.network import Network
from tunesmith.models.rendering import Renderer
from tunesmith.models.weights import load_network
from tunesmith.training.batches import lay_out_step
from tunesmith.training.estimate import estimate, step_bytes
from tunesmith.training.full import Full
from tunesmith.training.loop import Step, gradients
from tunesmith.training.lora import Lora
from tunesmith.training.settings import TrainSettings
from tunesmith.training.speed import matrix_limit, step_flops
from tunesmith.training.trainable import Trainable


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
        monkeypatch.setattr(runtime, "available_memory", lambda _: count)
        estimate([step], 0, 1, trial, later, lambda part: 1000 * part.tokens)

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

"""Trainings on the hf engine that are stopped and resumed, and the same training on both engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.hf.test_training import ROWS
from tests.hf_models import base_of_family, write_hf_model
from tests.tiny import WIDE, write_model
from tests.training.test_resume import SETTINGS, run
from tunesmith.core.errors import Refused
from tunesmith.engines.batch import lay_out
from tunesmith.engines.hf import four_bits
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import read_adapter_file
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.objectives import CrossEntropy

pytestmark = pytest.mark.slow

CHANGES: list[dict[str, Any]] = [{"start": "pissa", "dora": True, "b_rate": 4.0}, {"quantize": "4bit"}]


def _write(folder: Path, changes: dict[str, Any]) -> None:
    if "quantize" in changes:
        write_model(folder / "model", sizes=WIDE)
    else:
        write_hf_model(folder / "model", "gpt2")


def _stopping(step: int, save: Callable[..., None]) -> Callable[..., None]:
    def saving(self: Checkpoints, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        if number >= step:
            raise KeyboardInterrupt

    return saving


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_resumed_it_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = SETTINGS.model_copy(update=changes)
    for name in ("whole", "stopped"):
        _write(tmp_path / name, changes)
    whole = run(tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", _stopping(20, Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", settings)
    assert run(tmp_path / "stopped", settings) == whole


@pytest.mark.parametrize("changed", ["settings", "library"])
def test_it_is_not_resumed_with_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    _write(tmp_path, {"quantize": "4bit"})
    four = SETTINGS.model_copy(update={"quantize": "4bit"})
    run(tmp_path, four)
    if changed == "library":
        monkeypatch.setattr(four_bits, "version", lambda _: "0.49.1")
    with pytest.raises(Refused, match=r"(?s)settings|quantized"):
        run(tmp_path, four if changed == "library" else SETTINGS)


def test_both_engines_learn_alike(tmp_path: Path) -> None:
    """The same rows and start weights on a llama in fp32: the losses of the native engine and of hf."""
    base = base_of_family(tmp_path, "llama")
    settings = WeightSettings(rank=4)
    native = LoraModel(base, load_network(base.folder, torch.float32), settings, 0)
    hf = LoadedHFModel(base).trainable(settings, seed=1, state_bytes=16)
    folder = tmp_path / "start"
    folder.mkdir()
    with torch.no_grad():  # a start that changes something, so that its file can be read
        for model in (native, hf):
            for tensor in model.parameter_groups()[1].tensors:
                tensor.fill_(0.01)
    native.parameters_changed()
    native.save(folder)
    start = read_adapter_file(folder, base=base.digest, fingerprint=base.fingerprint).tensors
    with torch.no_grad():
        for name, tensor in hf.parameters.items():
            tensor.copy_(torch.from_numpy(start[f"base_model.model.{name.replace('.' + hf.adapter, '')}"]))
    rows = [Renderer(base.folder).conversation(messages) for messages in ROWS]
    curves = []
    for model in (native, hf):
        tensors = [tensor for group in model.parameter_groups() for tensor in group.tensors]
        optimizer = torch.optim.AdamW(tensors, lr=0.01, weight_decay=0.0)
        batch, curve = lay_out(rows, share=model.shares_prefix), []
        for _ in range(8):
            loss = model.loss(batch, CrossEntropy(), float(batch.labels.numel()))
            loss.backward()
            model.collect_gradients()
            curve.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
            model.parameters_changed()
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[1][-1] < 0.9 * curves[1][0]

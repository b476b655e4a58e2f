"""Several ranks that read only their rows of the weights, beside ranks that read all of them first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.engines.hf.test_support_matrix import _base, _two_steps, table
from tests.process_group import run_ranks
from tunesmith.core.errors import Refused
from tunesmith.engines.hf.loaded import ShardedHFModel, build_trainable
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.ranks import Ranks, connected_ranks, held, whole
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.weights import late_weights
from tunesmith.training.settings import TrainSettings

STARTS = {cells[0]: cells[1] for cells in table("How several ranks start")}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {}), ("opt", {}), ("phi3", {"precision": "bf16"}), ("llama", {"method": "full", "precision": "bf16"}),
]  # fmt: skip


def _rank(_rank: int, _size: int, folder: Path) -> None:
    for family, changes in CASES:
        _compare(connected_ranks(), folder, family, changes)


def _compare(ranks: Ranks, folder: Path, family: str, changes: dict[str, Any]) -> None:
    base, settings = _base(folder, family), TrainSettings.model_validate({"learning_rate": 0.01, **changes})
    found, losses = [], []
    for late in (True, False):
        model = HFModel(base, model_settings(settings), late=late)
        assert (model.late is not None) == late
        if late:
            sizes = [each.untyped_storage().nbytes() for each in model.module.parameters()]
            assert max(sizes) <= 4, "the weights take no memory before they are sharded"
        trained = build_trainable(model, settings, 1, ranks)
        assert all(0 < held(each).numel() < each.numel() for each in model.module.parameters())
        assert model.pads
        losses.append(_two_steps(trained, base, settings, ranks))
        parameters = dict(model.module.named_parameters())
        assert all(0 < held(each).numel() < each.numel() for each in parameters.values())
        found.append({name.replace(f".{trained.adapter}", ""): each for name, each in parameters.items()})
        found[-1] |= {f"buffer {name}": each for name, each in model.module.named_buffers()}
    one, two = found
    assert losses[0] == losses[1]
    assert one.keys() == two.keys()
    for name, each in one.items():
        assert each.dtype == two[name].dtype, name
        assert torch.equal(held(each), held(two[name])), name
    stored = load_file(base.folder / "model.safetensors")
    frozen = [name for name, each in one.items() if not (each.requires_grad or name.startswith("buffer "))]
    for name in frozen:
        assert torch.equal(whole(one[name].detach()).float(), stored[name.replace(".base_layer.", ".")].to(
            one[name].dtype).float())  # fmt: skip


@pytest.mark.slow
def test_rows_that_are_read_late_are_those_of_the_whole_weights(tmp_path: Path) -> None:
    """Weights, buffers, losses and adapters are equal, bit by bit."""
    for family, _ in CASES:
        _base(tmp_path, family)
    assert run_ranks(_rank, 2, tmp_path / "meeting", tmp_path) == [0, 0]


def test_files_that_do_not_hold_the_modules_tensors_are_read_whole(tmp_path: Path) -> None:
    """A tensor too many: the usual way says what is wrong."""
    base = _base(tmp_path, "llama")
    assert HFModel(base, late=True).late is not None
    path = base.folder / "model.safetensors"
    save_file({**load_file(path), "more.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"unexpected keys such as more\.weight"):
        HFModel(base, late=True)


@pytest.mark.parametrize("changes", [{"start": "pissa"}, {"dora": True}], ids=str)
def test_what_needs_whole_weights_is_refused_where_they_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = WeightSettings.model_validate({"rank": 2, **changes})
    monkeypatch.setattr(late_weights.DeviceMemory, "available", lambda self, sharing: 1000 // sharing)
    with pytest.raises(Refused, match=r"needs whole weights on every rank: 0\.0 GB") as refused:
        ShardedHFModel(_base(tmp_path, "llama"), Ranks(0, 2, local=2)).trainable(settings, seed=1, state_bytes=16)
    assert refused.value.where == f"train.{next(iter(changes))}"


@pytest.mark.parametrize(("setting", "reads"), STARTS.items())
def test_the_page_says_what_each_rank_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, reads: str
) -> None:
    settings = WeightSettings.model_validate({"rank": 2, **yaml.safe_load(setting)})
    monkeypatch.setattr(HFModel, "shard", lambda *given, **named: None)
    model = ShardedHFModel(_base(tmp_path, "llama"), Ranks(0, 2))
    model.trainable(settings, seed=1, state_bytes=16)
    assert model._model is not None
    assert (model._model.late is not None) == (reads == "its rows")

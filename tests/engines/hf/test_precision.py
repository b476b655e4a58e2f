"""Bases in bf16 under fp32 adapters, and transformers' implementations of attention, on tiny random models."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.hf_models import base_of_family
from tests.tiny import row
from tunesmith.core.errors import Refused, UsageError
from tunesmith.engines import factory
from tunesmith.engines.batch import lay_out
from tunesmith.engines.factory import check_weight_settings
from tunesmith.engines.hf import support
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.protocol import Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, parameters, update

ROWS = [row("turn on the light", '{"on":true}'), row("turn off", '{"on":false,"room":"hall"}')]


def _trained(loaded: LoadedHFModel, **changes: Any) -> HFTrainable:
    return loaded.trainable(WeightSettings.model_validate({"rank": 4, **changes}), seed=0, state_bytes=16)


def _losses(base: Base, trained: HFTrainable, steps: int = 6) -> list[float]:
    settings = TrainSettings(learning_rate=0.01)
    batch = lay_out([Renderer(base.folder).conversation(messages) for messages in ROWS], share=False)
    optimizer, losses = make_optimizer(trained, settings), []
    for _ in range(steps):
        losses.append(gradients(trained, CrossEntropy(), [batch]))
        update(trained, optimizer, 0.01, 1.0)
    moments = [each for state in optimizer.state.values() for each in state.values()]
    assert {each.dtype for each in [*parameters(trained), *moments]} == {torch.float32}
    return losses


@pytest.mark.parametrize(("family", "changes"), [("phi3", {"dora": True}), ("gpt2", {"b_rate": 4.0})])
def test_an_fp32_adapter_on_a_bf16_base_learns_the_same_within_rounding(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """Losses of six steps are within 1% of those in fp32, and not equal to them."""
    base = base_of_family(tmp_path, family)
    loaded = LoadedHFModel(base)
    rounded, exact = _trained(loaded, precision="bf16", **changes), _trained(loaded, **changes)
    frozen = [each for each in rounded._model.module.parameters() if not each.requires_grad]
    assert {each.dtype for each in frozen} == {torch.bfloat16}
    assert (rounded.environment()["precision"], exact.environment()["precision"]) == ("bf16", "fp32")
    found, expected = _losses(base, rounded), _losses(base, exact)
    assert found == pytest.approx(expected, rel=0.01)
    assert found != pytest.approx(expected, rel=1e-6)
    assert found[-1] < 0.9 * found[0]
    assert rounded._model.pads
    question = [Question(ROWS[0][:-1], ("on", "off"))]
    (plain,) = loaded.engine().choose(question)
    folder = tmp_path / "adapter"
    folder.mkdir()
    rounded.save(folder)
    engine = loaded.engine()
    engine.load_adapter("tuned", folder)
    assert engine.choose(question, "tuned")[0] != plain, "answered for by the base in fp32"


@pytest.mark.parametrize("family", ["gpt2"])
def test_implementations_of_attention_agree(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    loaded = LoadedHFModel(base)
    made = {name: _trained(loaded, attention=name) for name in ("sdpa", "eager")}
    assert {name: each.environment()["attention"] for name, each in made.items()} == {"sdpa": "sdpa", "eager": "eager"}
    losses = {name: _losses(base, each, 3) for name, each in made.items()}
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)
    assert _trained(loaded).environment()["attention"] == "sdpa"


def test_what_a_base_or_a_machine_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="does not compute this base with attention: sdpa") as refused:
        _trained(LoadedHFModel(base_of_family(tmp_path, "mamba")), attention="sdpa", targets=("in_proj",))
    assert refused.value.where == "train.attention"

    def check(**settings: Any) -> None:
        check_weight_settings("phi3", WeightSettings.model_validate(settings), "candidates.a.train")

    with pytest.raises(Refused, match=r"pissa .* bf16 would round") as refused:
        check(start="pissa", precision="bf16")
    assert refused.value.where == "candidates.a.train.precision"
    monkeypatch.setattr(factory, "gpu_present", lambda: False)
    with pytest.raises(Refused, match="on a GPU and in bf16 only") as refused:
        check(attention="flash_attention_2")
    assert refused.value.where == "candidates.a.train.attention"
    monkeypatch.setattr(factory, "gpu_present", lambda: True)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="flash_attention_2 needs flash_attn"):
        check(attention="flash_attention_2")
    with pytest.raises(UsageError, match="kernels: liger needs liger_kernel"):
        check(kernels="liger")


def test_liger_patches_the_families_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its package, whose kernels need a GPU."""
    patched: list[tuple[str, dict[str, bool]]] = []
    stand_in = ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    stand_in._apply_liger_kernel_to_instance = lambda module, **how: patched.append(  # type: ignore[attr-defined]
        (module.config.model_type, how)
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    settings = model_settings(WeightSettings(kernels="liger"))
    assert HFModel(base_of_family(tmp_path, "llama"), settings).settings.liger
    assert patched == [("llama", {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(Refused, match="no kernels for the family 'gpt2'") as refused:
        HFModel(base_of_family(tmp_path, "gpt2"), settings)
    assert refused.value.where == "train.kernels"

"""Full fine-tuning in transformers' modules, compared with a plain torch loop, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hf_models import base_of_family
from tests.tiny import row
from tests.trained import reference_loss
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.engines.batch import lay_out
from tunesmith.engines.hf.full import FullTrainable
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import MODEL_FILE
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, parameters, update

ROWS = [row("turn on the light", '{"intent":"on"}'), row("off", '{"intent":"off","area":"hall"}'), row("x", "y")]
SETTINGS = TrainSettings.model_validate({"method": "full", "learning_rate": 0.01, "weight_decay": 0.1, "clip": 1.0})


def _rows(base: Base) -> list[Rendered]:
    return [Renderer(base.folder).conversation(messages) for messages in ROWS]


def _trainable(base: Base, **settings: Any) -> FullTrainable:
    weights = WeightSettings.model_validate({"method": "full", **settings})
    found = LoadedHFModel(base).trainable(weights, seed=0, state_bytes=16)
    assert isinstance(found, FullTrainable)
    return found


@pytest.mark.parametrize("family", ["llama", "llama-untied", "phi3", "gpt2"])
def test_loss_gradients_and_steps_equal_a_plain_loop(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    rows, ours = _rows(base), _trainable(base)
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    theirs = dict(plain.named_parameters())
    assert ours.parameters.keys() == theirs.keys()
    decayed = [[each for each in theirs.values() if (each.dim() > 1) is decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed[0], "weight_decay": 0.1}, {"params": decayed[1], "weight_decay": 0.0}], lr=0.01
    )
    batches = [lay_out(rows[:2], share=ours.shares_prefix), lay_out(rows[2:], share=ours.shares_prefix)]
    moved = make_optimizer(ours, SETTINGS)
    for _ in range(3):
        expected = reference_loss(plain, rows)
        expected.backward()
        assert gradients(ours, CrossEntropy(), batches) == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, parameter in ours.parameters.items():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update(ours, moved, 0.01, 1.0)
        # Adam divides by the gradient's size: where a gradient is nearly zero, rounding decides its sign.
        apart = torch.cat([(each - theirs[name]).abs().flatten() for name, each in ours.parameters.items()])
        assert (apart > 1e-4).float().mean() < 0.01
        with torch.no_grad():  # so that the next gradients are those of the same weights
            for name, each in ours.parameters.items():
                theirs[name].copy_(each)
    folder = tmp_path / "trained"
    folder.mkdir()
    ours.save(folder)
    saved, stored = load_file(folder / MODEL_FILE), load_file(base.folder / MODEL_FILE)
    assert {name: (each.shape, each.dtype) for name, each in saved.items()} == {
        name: (each.shape, each.dtype) for name, each in stored.items()
    }
    names = {stored: name for name, stored in ours._model.stored.items()}
    assert all(torch.equal(each, ours.parameters[names[stored]]) for stored, each in saved.items())
    engine = LoadedHFModel(base).engine()
    engine.load_adapter("tuned", folder)
    asked = [Question(ROWS[0][:-1], ('{"intent":"on"}',))]
    assert engine.holds("tuned")
    assert engine.choose(asked, "tuned")[0][0] > engine.choose(asked)[0][0] + 1.0
    if family == "llama":  # the native engine reads what hf trained
        native = NativeEngine(base)
        native.load_adapter("tuned", folder)
        assert native.choose(asked, "tuned")[0][0] == pytest.approx(engine.choose(asked, "tuned")[0][0], rel=0.02)


def test_the_last_layers_and_bf16(tmp_path: Path) -> None:
    """With layers, nothing else changes. In bf16 fp32 master weights move: also by less than bf16 shows."""
    base = base_of_family(tmp_path, "phi3")
    ours = _trainable(base, layers=1, precision="bf16")
    assert all(name.startswith("model.layers.1.") for name in ours.parameters)
    assert {each.dtype for each in ours.parameters.values()} == {torch.bfloat16}
    assert {each.dtype for each in parameters(ours)} == {torch.float32}
    linears, head, batch = ours._model.linears, ours._model.head, lay_out(_rows(base), share=False)
    sizes = {name: each.weight.numel() for name, each in linears.items()}  # type: ignore[operator, union-attr]
    last = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    tokens, scored = ours._computed(batch)
    assert ours.flops(batch) == tokens * (4 * sum(sizes.values()) + 2 * last) + 4 * scored * head.weight.numel()
    before = {name: each.clone() for name, each in ours._model.module.named_parameters()}
    optimizer, batches = make_optimizer(ours, SETTINGS), [lay_out([one], share=False) for one in _rows(base)]
    small = gradients(ours, CrossEntropy(), batches)
    masters = [each.clone() for each in parameters(ours)]
    update(ours, optimizer, 1e-6, 1.0)
    assert all(not torch.equal(one, other) for one, other in zip(masters, parameters(ours), strict=True))
    found = [small]
    for _ in range(4):
        found.append(gradients(ours, CrossEntropy(), batches))
        update(ours, optimizer, 0.01, 1.0)
    assert found[-1] < 0.9 * found[0]
    for name, each in ours._model.module.named_parameters():
        assert torch.equal(each, before[name]) == (name not in ours.parameters), name
        if name in ours.parameters:
            assert torch.equal(each, ours._masters[name].bfloat16())


def test_what_would_not_be_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"layers\.0\.mlp.* out of other tensors") as refused:
        _trainable(base_of_family(tmp_path, "mixtral"))
    assert refused.value.where == "train.method"
    base = base_of_family(tmp_path, "gpt2")
    (tmp_path / "same").mkdir()
    with pytest.raises(TunesmithError, match="no weight changed enough"):
        _trainable(base).save(tmp_path / "same")
    assert not list((tmp_path / "same").iterdir())

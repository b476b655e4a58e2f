"""Full fine-tuning against transformers and torch's AdamW in fp32, number by number, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, ROWS, row, write_model
from tests.trained import full_model, gradients, reference_loss, saved
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.system import memory
from tunesmith.engines.batch import lay_out
from tunesmith.engines.native.adapters.full import FullModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer

# More labels than one chunk of the loss has, so that the head's gradient is a sum.
MANY = [*ROWS, *(row(f"say {n}", f'{{"n":{n},"said":"{"na" * 40}"}}') for n in range(8))]
RATE, DECAY = 0.003, 0.1


def _full(folder: Path, **changes: object) -> FullModel:
    settings = TrainSettings(method="full", **changes)  # type: ignore[arg-type]
    return full_model(load_network(folder, torch.float32), settings, folder)


def _rows(folder: Path) -> list[Rendered]:
    renderer = Renderer(folder)
    return [renderer.conversation(messages) for messages in MANY]


def _reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    # Where the padding token is the end token, transformers leaves a token out that occurs in every row.
    model.get_input_embeddings().padding_idx = None
    return model


def _weights(trained: FullModel, work: Path) -> dict[str, torch.Tensor]:
    return load_file(saved(trained, work / "saved") / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "layers"), [*((family, None) for family in FAMILIES), *((family, 2) for family in ("qwen2", "gemma3"))]
)
def test_gradients_and_steps_equal_transformers(tmp_path: Path, family: str, layers: int | None) -> None:
    folder = write_model(tmp_path / family, family)
    rows = _rows(folder)
    model = _reference(folder)
    learns = dict(model.named_parameters())
    if layers is not None:
        learns = {
            name: value for name, value in learns.items() if name.startswith(("model.layers.1", "model.layers.2"))
        }
        model.requires_grad_(False)
    for value in learns.values():
        value.requires_grad_()
    matrices = [value for value in learns.values() if value.ndim == 2]
    vectors = [value for value in learns.values() if value.ndim == 1]
    theirs = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], RATE, weight_decay=DECAY
    )
    trained = _full(folder, layers=layers)
    assert trained.trained_numbers == sum(value.numel() for value in learns.values())
    ours = make_optimizer(trained, TrainSettings(method="full", learning_rate=RATE, weight_decay=DECAY))
    step = [lay_out(rows[:4]), lay_out(rows[4:])]
    for turn in range(4):
        expected = reference_loss(model, rows)
        expected.backward()
        assert gradients(trained, step) == pytest.approx(float(expected.detach()), rel=1e-3 if turn else 2e-5)
        for master, kind in zip(trained.masters, (matrices, vectors), strict=True):
            assert master.grad is not None
            found, wanted = master.grad.norm(), torch.cat([value.grad.flatten() for value in kind]).norm()
            assert float(found) == pytest.approx(float(wanted), rel=5e-3 if turn else 1e-4)
        torch.nn.utils.clip_grad_norm_(trained.masters, 1.0)
        torch.nn.utils.clip_grad_norm_(learns.values(), 1.0)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        trained.parameters_changed()
    end, state = _weights(trained, tmp_path), model.state_dict()
    tied = model.config.tie_word_embeddings
    assert set(end) == set(state) - ({"lm_head.weight"} if tied else set())
    # Adam divides by the gradient's size: where a gradient is all but zero, rounding decides its sign.
    off = sum(int(((end[name] - state[name]).abs() > RATE / 10).sum()) for name in end)
    assert off <= 0.005 * sum(value.numel() for value in end.values())
    untouched = load_network(folder, torch.float32)
    assert torch.equal(end["model.embed_tokens.weight"], untouched.embedding) == (layers is not None)


@pytest.mark.parametrize("family", ["llama-untied", "qwen2", "qwen3"])
def test_every_weight_has_its_own_gradient(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / family, family)
    rows = _rows(folder)
    model = _reference(folder)
    reference_loss(model, rows).backward()
    trained = _full(folder)
    gradients(trained, [lay_out(rows)])
    # Written into the masters, the gradients come out under the stored tensors' names.
    for master in trained.masters:
        assert master.grad is not None
        master.copy_(master.grad)
    found = _weights(trained, tmp_path)
    for name, value in model.named_parameters():
        scale = float(value.grad.abs().max())
        assert torch.allclose(found[name], value.grad, atol=1e-4 * scale), name


def test_embedding_gradient_sums_in_fp32() -> None:
    from tunesmith.engines.native.network.network import embed

    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    embed(torch.zeros(3000, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == pytest.approx(3000, rel=0.01)  # added up in bf16 it ends at 256


def test_masters_start_as_the_stored_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    trained = full_model(load_network(folder), TrainSettings(method="full"), folder)
    assert trained.network.dtype == torch.bfloat16
    with pytest.raises(TunesmithError, match="no weight changed enough"):
        _weights(trained, tmp_path)
    trained.masters[1][0] += 0.5
    changed = _weights(trained, tmp_path)
    stored = load_file(folder / "model.safetensors")
    assert {name for name in changed if not torch.equal(changed[name], stored[name])} == {"model.norm.weight"}
    assert changed["model.norm.weight"].dtype == torch.float32


def test_too_little_memory_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m")
    needed = 24 * _full(folder).trained_numbers  # fp32 copies here
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(Refused, match="in full takes") as told:
        _full(folder)
    assert told.value.fix == "set train.layers to 2 or fewer, or train.method to lora"
    _full(folder, layers=2)
    _full(folder, keep="last")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(Refused) as told:
        _full(folder, layers=1)
    assert told.value.fix == "set train.method to lora"

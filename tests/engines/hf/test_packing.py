"""Batches without padding, compared with rows computed one at a time, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.hf_models import base_of_family, change_adapter
from tests.tiny import row
from tests.trained import gradients, reference_loss
from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.engines.batch import Batch, empty_batch, lay_out
from tunesmith.engines.hf.full import FullTrainable
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.hf.lora import LoraTrainable
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.packing import FLASH
from tunesmith.engines.hf.trainable import HFTrainable
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.packed import pack
from tunesmith.engines.protocol import Question
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import MODEL_FILE
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer, parameters, update

# Gemma's and Mistral's windows are shorter than the rows, and some do not reach the shared prefix.
PACKED = ("llama", "gemma3", "mistral-window", "phi3", "gpt2")
PADDED = ("falcon", "mamba")  # places that are no argument; a running state
ROWS = [*tiny.ROWS, row("on", "{}")]


def _rows(base: Base) -> list[Rendered]:
    return [Renderer(base.folder).conversation(messages) for messages in ROWS]


def _trainable(tmp_path: Path, family: str, **settings: Any) -> tuple[HFTrainable, list[Rendered]]:
    base = base_of_family(tmp_path, family)
    weights = WeightSettings.model_validate(settings if "method" in settings else {"rank": 2, **settings})
    return LoadedHFModel(base).trainable(weights, seed=0, state_bytes=16), _rows(base)


def _gradients(trainable: HFTrainable, batches: list[Batch]) -> list[torch.Tensor]:
    """The mean loss over all labels and its gradients."""
    loss = torch.tensor(gradients(trainable, batches))
    found = [loss, *(tensor.grad.clone() for tensor in trainable.parameters.values() if tensor.grad is not None)]
    for tensor in trainable.parameters.values():
        tensor.grad = None
    return found


@pytest.mark.parametrize("family", PACKED + PADDED)
def test_gradients_are_those_of_rows_alone(tmp_path: Path, family: str) -> None:
    settings = {"targets": ("in_proj", "x_proj")} if family == "mamba" else {}
    trainable, rows = _trainable(tmp_path, family, **settings)
    assert trainable.environment()["batches"] == ("packed" if family in PACKED else "padded")
    assert trainable.shares_prefix == (family in PACKED)
    change_adapter(trainable)
    alone = _gradients(trainable, [lay_out([one], share=False) for one in rows])
    assert len(alone) == 1 + len(trainable.parameters)
    for share in (False, True):
        together = _gradients(trainable, [lay_out(rows, share=share)])
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(trainable.loss(empty_batch(), CrossEntropy(), 1.0))


class _Flash:
    """In place of flash_attn, which needs a GPU: what its functions compute, and which boundaries they were given."""

    def __init__(self) -> None:
        self.bounds: list[list[int]] = []

    def functions(self, _name: str) -> tuple[Any, Any]:
        return (self.dense, self.varlen, None, None, None), (lambda **given: given, None)

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> torch.Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=given["softmax_scale"], enable_gqa=True
        )
        return found.transpose(1, 2)

    def varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        self.bounds.append(cu_seqlens_q.tolist())
        assert cu_seqlens_q.dtype == torch.int32
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == int(cu_seqlens_q.diff().max())
        assert torch.equal(given["cu_seqlens_k"], cu_seqlens_q)
        parts = zip(*(each[None].split(cu_seqlens_q.diff().tolist(), 1) for each in (query, key, value)), strict=True)
        return torch.cat([self.dense(*each, **given) for each in parts], 1)[0]


@pytest.mark.parametrize("family", ["phi3"])
def test_flash_attention_gets_the_rows_boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The path through transformers' own code, with a stand-in for the kernel: gradients are those of rows alone."""
    expected, rows = _trainable(tmp_path, family)
    change_adapter(expected)
    alone = _gradients(expected, [lay_out([one], share=False) for one in rows])
    flash = _Flash()
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", flash.functions)
    model = HFModel(expected._model.base)
    model.module.config._attn_implementation = model.attention = FLASH
    trainable = LoraTrainable(model, WeightSettings(rank=2), seed=0)
    change_adapter(trainable)
    assert trainable.environment()["batches"] == "packed"
    assert not trainable.shares_prefix
    flash.bounds.clear()
    together = _gradients(trainable, [lay_out(rows, share=trainable.shares_prefix)])
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    lengths = sorted((max(n for n, marked in enumerate(one.trained) if marked) for one in rows), reverse=True)
    assert flash.bounds == [[sum(lengths[:n]) for n in range(len(rows) + 1)]] * model.config.num_hidden_layers


def test_no_row_sees_another(tmp_path: Path) -> None:
    """Exactly: the losses of a row stay the same bits when the tokens of other rows change."""
    trainable, rows = _trainable(tmp_path, "llama")
    batch = lay_out(rows)
    counts = [sum(one.trained[1:]) for one in rows]
    before = trainable.label_losses(batch).split(counts)
    for changed in range(len(rows)):
        first = batch.prefix + sum(batch.lengths[:changed])
        ids = batch.ids.clone()
        ids[first : first + batch.lengths[changed]] = 5
        other = Batch(ids, batch.positions, batch.prefix, batch.lengths, batch.predicts, batch.labels)
        after = trainable.label_losses(other).split(counts)
        assert [torch.equal(one, two) for one, two in zip(before, after, strict=True)] == [
            number != changed for number in range(len(rows))
        ]


def test_a_batch_has_no_filler_and_its_prefix_once(tmp_path: Path) -> None:
    trainable, rows = _trainable(tmp_path, "llama")
    batch = lay_out(rows)
    packed = pack(batch)
    places = [max(place for place, marked in enumerate(one.trained) if marked) for one in rows]
    assert 0 < packed.prefix < min(places)
    tokens = packed.prefix + sum(place - packed.prefix for place in places)
    assert packed.ids.shape == packed.positions.shape == (1, tokens)
    assert tokens < batch.tokens
    assert torch.equal(packed.ids[0, packed.predicts], batch.ids[batch.predicts])
    assert torch.equal(packed.positions[0, packed.predicts], batch.positions[batch.predicts])
    # 4 for each frozen number, 6 for each trained one; the head computes labels only.
    model = trainable._model
    frozen = sum(each.weight.numel() for each in model.linears.values())  # type: ignore[operator, union-attr]
    head = 4 * batch.labels.numel() * model.head.weight.numel()
    assert trainable.flops(batch) == tokens * (4 * frozen + 6 * trainable.trained_numbers) + head
    model.packs = False
    padded = len(rows) * max(places)
    assert trainable.flops(batch) == padded * (4 * frozen + 6 * trainable.trained_numbers) + head


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_recompute_has_the_same_gradients_and_keeps_less(tmp_path: Path, family: str) -> None:
    """Bit by bit, and without the dropout that OPT's layers apply in training mode."""
    found, kept, needed = [], [], []
    for recompute in (False, True):
        trainable, rows = _trainable(tmp_path, family, recompute=recompute)
        change_adapter(trainable)
        batch, sizes = lay_out(rows, share=trainable.shares_prefix), []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(_gradients(trainable, [batch]))
        kept.append(sum(sizes))
        needed.append((trainable.memory_estimate(batch), -trainable.flops(batch)))
        assert not any("forward" in vars(module) for module in trainable._model.module.modules())
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < 0.6 * kept[0]
    assert needed[1] < needed[0]
    assert needed[1][1] < needed[0][1]


class _MostLogits(TorchDispatchMode):
    """The most rows whose log-probabilities or their gradients are computed at once."""

    rows = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if "log_softmax" in str(function):
            self.rows = max(self.rows, len(found))
        return found


@pytest.mark.parametrize(
    ("family", "plain"),
    [("gemma3", True), ("gpt2", True), ("falcon", True), ("cohere", False), ("granite", False)],
)
def test_the_loss_in_parts_has_the_same_gradients_and_fewer_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, plain: bool
) -> None:
    """Cohere and Granite scale what their heads give, and get all logits at once."""
    trainable, rows = _trainable(tmp_path, family)
    change_adapter(trainable)
    assert trainable._model.plain_head == trainable._model.shapes.plain_head == plain
    batch = lay_out(rows, share=trainable.shares_prefix)
    labels = batch.labels.numel()
    found = {}
    for at_once in (3, labels):
        monkeypatch.setattr("tunesmith.engines.hf.model.LOGITS_AT_ONCE", at_once)
        with _MostLogits() as most:
            found[at_once] = _gradients(trainable, [batch])
        assert most.rows == (at_once if plain else labels)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_trained_head_learns_from_every_part_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable, rows = _trainable(tmp_path, "llama-untied", method="full")
    batch, found = lay_out(rows), []
    for at_once in (3, batch.labels.numel()):
        monkeypatch.setattr("tunesmith.engines.hf.model.LOGITS_AT_ONCE", at_once)
        found.append(_gradients(trainable, [batch]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Full fine-tuning, compared with a plain torch loop


FULL = TrainSettings.model_validate({"method": "full", "learning_rate": 0.01, "weight_decay": 0.1, "clip": 1.0})


def _full(base: Base, **settings: Any) -> FullTrainable:
    weights = WeightSettings.model_validate({"method": "full", **settings})
    found = LoadedHFModel(base).trainable(weights, seed=0, state_bytes=16)
    assert isinstance(found, FullTrainable)
    return found


@pytest.mark.parametrize("family", ["llama", "llama-untied", "phi3", "gpt2"])
def test_loss_gradients_and_steps_equal_a_plain_loop(tmp_path: Path, family: str) -> None:
    base = base_of_family(tmp_path, family)
    rows, ours = _rows(base), _full(base)
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    theirs = dict(plain.named_parameters())
    assert ours.parameters.keys() == theirs.keys()
    decayed = [[each for each in theirs.values() if (each.dim() > 1) is decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed[0], "weight_decay": 0.1}, {"params": decayed[1], "weight_decay": 0.0}], lr=0.01
    )
    batches = [lay_out(rows[:2], share=ours.shares_prefix), lay_out(rows[2:], share=ours.shares_prefix)]
    moved = make_optimizer(ours, FULL)
    for _ in range(3):
        expected = reference_loss(plain, rows)
        expected.backward()
        assert gradients(ours, batches) == pytest.approx(float(expected.detach()), rel=1e-5)
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
    ours = _full(base, layers=1, precision="bf16")
    assert all(name.startswith("model.layers.1.") for name in ours.parameters)
    assert {each.dtype for each in ours.parameters.values()} == {torch.bfloat16}
    assert {each.dtype for each in parameters(ours)} == {torch.float32}
    linears, head, batch = ours._model.linears, ours._model.head, lay_out(_rows(base), share=False)
    sizes = {name: each.weight.numel() for name, each in linears.items()}  # type: ignore[operator, union-attr]
    last = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    tokens, scored = ours._computed(batch)
    assert ours.flops(batch) == tokens * (4 * sum(sizes.values()) + 2 * last) + 4 * scored * head.weight.numel()
    before = {name: each.clone() for name, each in ours._model.module.named_parameters()}
    optimizer, batches = make_optimizer(ours, FULL), [lay_out([one], share=False) for one in _rows(base)]
    small = gradients(ours, batches)
    masters = [each.clone() for each in parameters(ours)]
    update(ours, optimizer, 1e-6, 1.0)
    assert all(not torch.equal(one, other) for one, other in zip(masters, parameters(ours), strict=True))
    found = [small]
    for _ in range(4):
        found.append(gradients(ours, batches))
        update(ours, optimizer, 0.01, 1.0)
    assert found[-1] < 0.9 * found[0]
    for name, each in ours._model.module.named_parameters():
        assert torch.equal(each, before[name]) == (name not in ours.parameters), name
        if name in ours.parameters:
            assert torch.equal(each, ours._masters[name].bfloat16())


def test_what_would_not_be_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"layers\.0\.mlp.* out of other tensors") as refused:
        _full(base_of_family(tmp_path, "mixtral"))
    assert refused.value.where == "train.method"
    base = base_of_family(tmp_path, "gpt2")
    (tmp_path / "same").mkdir()
    with pytest.raises(TunesmithError, match="no weight changed enough"):
        _full(base).save(tmp_path / "same")
    assert not list((tmp_path / "same").iterdir())

"""Batches without padding, compared with rows computed one at a time, on tiny random models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.hf_models import base_of_family, change_adapter
from tests.tiny import row
from tests.trained import batch_loss, gradients
from tunesmith.core.errors import Refused
from tunesmith.engines.batch import Batch, Packed, empty_batch, lay_out
from tunesmith.engines.hf.engine import LoadedHFModel
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.hf.packing import FLASH
from tunesmith.engines.hf.trainable import FullTrainable, HFTrainable, LoraTrainable
from tunesmith.engines.settings import WeightSettings
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import make_optimizer, parameters, update

# Gemma's and Mistral's windows are shorter than the rows, and some do not reach the shared prefix.
PACKED = ("llama", "gemma3", "mistral-window", "phi3", "gpt2")
PADDED = ("falcon", "mamba")  # places that are no argument; a running state
ROWS = [*tiny.ROWS, row("on", "{}")]


def _trainable(tmp_path: Path, family: str, **settings: Any) -> tuple[HFTrainable, list[Rendered]]:
    base = base_of_family(tmp_path, family)
    rows = [Renderer(base.folder).conversation(messages) for messages in ROWS]
    weights = WeightSettings.model_validate(settings if "method" in settings else {"rank": 2, **settings})
    return LoadedHFModel(base).trainable(weights, seed=0, state_bytes=16), rows


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
    assert torch.isfinite(batch_loss(trainable, empty_batch(), 1.0))


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
    assert flash.bounds == [[sum(lengths[:n]) for n in range(len(rows) + 1)]] * model.module.config.num_hidden_layers


def test_a_batch_has_no_filler_and_its_prefix_once(tmp_path: Path) -> None:
    trainable, rows = _trainable(tmp_path, "llama")
    batch = lay_out(rows)
    packed = Packed(batch)
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
    [("gemma3", True), ("gpt2", True), ("llama-untied", True), ("cohere", False), ("granite", False)],
)
def test_the_loss_in_parts_has_the_same_gradients_and_fewer_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, plain: bool
) -> None:
    """Cohere and Granite scale what their heads give, and get all logits at once. One has a head that is trained."""
    trainable, rows = _trainable(tmp_path, family, **({"method": "full"} if family == "llama-untied" else {}))
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


# Full fine-tuning, compared with a plain torch loop


FULL = TrainSettings.model_validate({"method": "full", "learning_rate": 0.01, "weight_decay": 0.1, "clip": 1.0})


def test_full_training_of_the_last_layers_in_bf16(tmp_path: Path) -> None:
    """fp32 master weights move: also by less than bf16 shows."""
    ours, rows = _trainable(tmp_path, "phi3", method="full", layers=1, precision="bf16")
    assert isinstance(ours, FullTrainable)
    assert all(name.startswith("model.layers.1.") for name in ours.parameters)
    assert {each.dtype for each in ours.parameters.values()} == {torch.bfloat16}
    assert {each.dtype for each in parameters(ours)} == {torch.float32}
    linears, head, batch = ours._model.linears, ours._model.head, lay_out(rows, share=False)
    sizes = {name: each.weight.numel() for name, each in linears.items()}  # type: ignore[operator, union-attr]
    last = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    tokens, scored = ours._computed(batch)
    assert ours.flops(batch) == tokens * (4 * sum(sizes.values()) + 2 * last) + 4 * scored * head.weight.numel()
    optimizer, batches = make_optimizer(ours, FULL), [lay_out([one], share=False) for one in rows]
    small = gradients(ours, batches)
    masters = [each.clone() for each in parameters(ours)]
    update(ours, optimizer, 1e-6, 1.0)
    assert all(not torch.equal(one, other) for one, other in zip(masters, parameters(ours), strict=True))
    for _ in range(4):
        update(ours, optimizer, 0.01, 1.0)
        loss = gradients(ours, batches)
    assert loss < 0.9 * small
    assert all(torch.equal(each, ours._masters[name].bfloat16()) for name, each in ours.parameters.items())


def test_what_would_not_be_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"layers\.0\.mlp.* out of other tensors") as refused:
        _trainable(tmp_path, "mixtral", method="full")
    assert refused.value.where == "train.method"
